"""The command line of a saved machine, to start it again."""

from __future__ import annotations

import re

from snapengine.errors import MachineError
from snapengine.image import Image
from snapengine.qemu.blobs import machine_of

# What a restore sets itself; the value says how many arguments follow.
OWN_OPTIONS = {"-S": 0, "-daemonize": 0, "-incoming": 1, "-loadvm": 1}
INHERITED = re.compile(r"(^|[,=:])(vhost)?fds?[=:]\d|/dev/fdset/\d|/master-key\.aes")


def command_of(image: Image) -> list[str]:
    """Return the command line of the machine in `image`, without the options that a restore sets.

    Relative paths in it are relative to the directory in which the machine was started.

    Raises
    ------
    ImageError
        The image is not of a machine, or is damaged.
    MachineError
        It has no command line (it was made from a stream), or the command line needs what the process that
        started it had open: libvirt's do.
    """
    line = list((machine_of(image) or {}).get("command_line", []))
    if not line:
        raise MachineError(f"{image.name}: has no command line of QEMU: give one behind --")
    for argument in line:
        if INHERITED.search(argument):
            raise MachineError(
                f"{image.name}: the saved command line needs files that were open in the process that "
                f"started QEMU ({argument!r}), as with libvirt: give a command behind --"
            )
    command = []
    rest = iter(line)
    for argument in rest:
        option = argument.replace("--", "-", 1) if argument.startswith("--") else argument
        if option not in OWN_OPTIONS:
            command.append(argument)
        elif OWN_OPTIONS[option]:
            next(rest, None)
    return command
