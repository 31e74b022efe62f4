"""Answers of a monitor, with the types of their members checked before use."""

from __future__ import annotations

from typing import Any, Protocol

from snapengine.base.jsonfields import Fields
from snapengine.base.names import one_line
from snapengine.errors import MachineError


class Executes(Protocol):
    """The part of a monitor that executes commands."""

    def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        """The answer. Raises MachineError."""


class Reply(Fields):
    """One JSON object of an answer. Each method raises `MachineError` for a member of the wrong type or
    range."""

    refusal = MachineError

    def count(self, key: str) -> int:
        """A number; 0 if it is missing. At most 40 bits, so that milliseconds fit into 2^63 ns."""
        return self.number(key, 40) if self.has(key) else 0


class Migration(Reply):
    """The answer to query-migrate."""

    @property
    def status(self) -> str:
        """``"none"`` before the first migration."""
        return one_line(self.plain("status")) if self.has("status") else "none"

    @property
    def reason(self) -> str:
        """Why it failed."""
        return one_line(self.plain("error-desc")) if self.has("error-desc") else "it does not say why"


def ask(monitor: Executes, command: str, arguments: dict[str, Any] | None = None) -> Reply:
    """The object that a command returns."""
    return Reply(monitor.execute(command, arguments), f"QEMU's answer to {command}")


def ask_migration(monitor: Executes) -> Migration:
    """The state of QEMU's migration."""
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
