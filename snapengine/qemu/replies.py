"""What a monitor answers: members with their types checked, before anybody uses them."""

from __future__ import annotations

from typing import Any

from snapengine.errors import MachineError
from snapengine.jsonfields import Fields
from snapengine.qemu.monitor import Monitor


class Reply(Fields):
    """One JSON object of an answer; each method raises `MachineError` for what is not as it should be."""

    refusal = MachineError


def ask(monitor: Monitor, command: str, arguments: dict[str, Any] | None = None) -> Reply:
    """The object that a command returns."""
    return Reply(monitor.execute(command, arguments), f"QEMU's answer to {command}")


def ask_list(monitor: Monitor, command: str, arguments: dict[str, Any] | None = None) -> list[Reply]:
    """The objects of the list that a command returns."""
    answer = monitor.execute(command, arguments)
    if type(answer) is not list:
        raise MachineError(f"QEMU's answer to {command} is not a list")
    return [Reply(item, f"an item of QEMU's answer to {command}") for item in answer]


def ask_text(monitor: Monitor, command: str, arguments: dict[str, Any] | None = None) -> str:
    """The text that a command returns."""
    answer = monitor.execute(command, arguments)
    if type(answer) is not str:
        raise MachineError(f"QEMU's answer to {command} is not text")
    return answer
