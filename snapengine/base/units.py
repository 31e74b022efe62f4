"""Parsing and formatting of sizes and times. Parsing is exact: sizes are not converted to float."""

from __future__ import annotations

import re

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(iB)?|B)?", re.IGNORECASE | re.ASCII)
_STEPS = ("B", "KiB", "MiB", "GiB", "TiB")
_MAX_SIZE = (1 << 63) - 1  # largest off_t


def parse_size(text: str) -> int:
    """Bytes from ``4096``, ``64M``, ``1.5GiB`` or ``10 kib``. K, M, G and T are powers of 1024.

    Raises
    ------
    ValueError
        Not a size, not a whole number of bytes, or more than a file can hold.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        hint = "; units are powers of 1024, written K, M, G, T or KiB ..." if text[:1].isdigit() else ""
        raise ValueError(f"{text!r} is not a size such as 4096, 64M or 1.5GiB{hint}")
    power = "BKMGT".index((match[2] or "B").upper())
    whole, _, decimals = match[1].partition(".")
    size: int
    size, rest = divmod(int(whole + decimals) << 10 * power, 10 ** len(decimals))
    if rest:
        raise ValueError(f"{text!r} is not a whole number of bytes")
    if size > _MAX_SIZE:
        raise ValueError(f"{text!r} is too large")
    return size


def parse_seconds(text: str) -> float:
    """Seconds from ``2``, ``0.3`` or ``300ms``. The result is positive and finite."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)\s*(ms|s)?", text.strip(), re.ASCII)
    seconds = float(match[1]) / (1000 if match[2] == "ms" else 1) if match else 0.0
    if not 0 < seconds < 1e9:
        raise ValueError(f"{text!r} is not a time such as 10, 0.3 or 300ms")
    return seconds


def format_size(size: float) -> str:
    """4096 as ``"4.00 KiB"``: three digits, in the appropriate unit."""
    value = float(size)
    for step in _STEPS[:-1]:
        if abs(value) < 999.5:
            return f"{value:.0f} B" if step == "B" else _three_digits(value, step)
        value /= 1024
    return _three_digits(value, _STEPS[-1])


def format_ns(nanoseconds: float) -> str:
    """A time in the appropriate unit: ``"850 ns"``, ``"12.3 µs"``, ``"4.56 ms"``, ``"7.89 s"``."""
    value = float(nanoseconds)
    for unit in ("ns", "µs", "ms"):
        if abs(value) < 999.5:
            return f"{value:.0f} ns" if unit == "ns" else _three_digits(value, unit)
        value /= 1000
    return _three_digits(value, "s")


def format_count(count: float) -> str:
    """``1234567`` as ``"1 234 567"``, with narrow no-break spaces."""
    return f"{count:,.0f}".replace(",", "\u202f")


def _three_digits(value: float, unit: str) -> str:
    decimals = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{decimals}f} {unit}"
