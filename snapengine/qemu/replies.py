"""What a monitor answers: members with their types checked, before anybody uses them."""

from __future__ import annotations

from typing import Any, Protocol

from snapengine.base.jsonfields import Fields
from snapengine.base.names import one_line
from snapengine.errors import MachineError


class Executes(Protocol):
    """A monitor, as far as asking is concerned."""

    def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        """The answer. Raises MachineError."""


class Reply(Fields):
    """One JSON object of an answer; each method raises `MachineError` for what is not as it should be."""

    refusal = MachineError

    def count(self, key: str) -> int:
        """A number that may be missing: then 0. As milliseconds, it is less than 2^63 ns."""
        return self.number(key, 40) if self.has(key) else 0


class Migration(Reply):
    """The answer to query-migrate."""

    @property
    def status(self) -> str:
        """``"none"`` before the first one."""
        return one_line(self.plain("status")) if self.has("status") else "none"

    @property
    def reason(self) -> str:
        """Why it failed."""
        return one_line(self.plain("error-desc")) if self.has("error-desc") else "it does not say why"


def ask(monitor: Executes, command: str, arguments: dict[str, Any] | None = None) -> Reply:
    """The object that a command returns."""
    return Reply(monitor.execute(command, arguments), f"QEMU's answer to {command}")


def ask_migration(monitor: Executes) -> Migration:
    """What QEMU says of its migration."""
    return Migration(ask(monitor, "query-migrate").members, "QEMU's answer to query-migrate")


def ask_list(monitor: Executes, command: str, arguments: dict[str, Any] | None = None) -> list[Reply]:
    """The objects of the list that a command returns."""
    answer = monitor.execute(command, arguments)
    if type(answer) is not list:
        raise MachineError(f"QEMU's answer to {command} is not a list")
    return [Reply(item, f"an item of QEMU's answer to {command}") for item in answer]


def ask_text(monitor: Executes, command: str, arguments: dict[str, Any] | None = None) -> str:
    """The text that a command returns."""
    answer = monitor.execute(command, arguments)
    if type(answer) is not str:
        raise MachineError(f"QEMU's answer to {command} is not text")
    return answer
