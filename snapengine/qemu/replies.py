"""Replies of a QEMU monitor. The types of their members are checked before use."""

from __future__ import annotations

from typing import Any, Protocol

from snapengine.base.jsonfields import Fields
from snapengine.base.names import one_line
from snapengine.errors import MachineError


class Executes(Protocol):
    """The part of a monitor that executes commands."""

    def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        """Return the reply. Raises MachineError."""


class Reply(Fields):
    """One JSON object of a reply. Methods raise `MachineError` for members of wrong type or range."""

    error_type = MachineError

    def count(self, key: str) -> int:
        """Return a number, or 0 if it is missing. At most 40 bits, so milliseconds fit into 2^63 ns."""
        return self.number(key, 40) if self.has(key) else 0


class Migration(Reply):
    """The reply to query-migrate."""

    @property
    def status(self) -> str:
        """The migration's status; ``"none"`` before the first migration."""
        return one_line(self.string("status")) if self.has("status") else "none"

    @property
    def reason(self) -> str:
        """Why the migration failed."""
        return one_line(self.string("error-desc")) if self.has("error-desc") else "QEMU gives no reason"


def ask(monitor: Executes, command: str, arguments: dict[str, Any] | None = None) -> Reply:
    """Execute a command that returns an object."""
    return Reply(monitor.execute(command, arguments), f"QEMU's reply to {command}")


def ask_migration(monitor: Executes) -> Migration:
    """Query the state of QEMU's migration."""
    return Migration(ask(monitor, "query-migrate").members, "QEMU's reply to query-migrate")


def ask_list(monitor: Executes, command: str, arguments: dict[str, Any] | None = None) -> list[Reply]:
    """Execute a command that returns a list of objects."""
    reply = monitor.execute(command, arguments)
    if type(reply) is not list:
        raise MachineError(f"QEMU's reply to {command} is not a list")
    return [Reply(item, f"an item of QEMU's reply to {command}") for item in reply]


def ask_text(monitor: Executes, command: str, arguments: dict[str, Any] | None = None) -> str:
    """Execute a command that returns text."""
    reply = monitor.execute(command, arguments)
    if type(reply) is not str:
        raise MachineError(f"QEMU's reply to {command} is not text")
    return reply
