"""Bytes inside, other units at the edge and in the name."""

from __future__ import annotations

import re
import time

SECTOR = 512
KiB = 1 << 10
MiB = 1 << 20
GiB = 1 << 30
TiB = 1 << 40

_SUFFIXES = {"": 1, "B": 1, "K": KiB, "M": MiB, "G": GiB, "T": TiB}
_SIZE = re.compile(r"(\d{1,19})(?:\.(\d{1,6}))?\s*([KMGT]?)(?:iB|B)?", re.IGNORECASE)


def round_up(value: int, step: int) -> int:
    """The smallest multiple of `step` that is not below `value`."""
    return -(-value // step) * step


def seconds_since(begun: float) -> float:
    """From a moment of time.monotonic() to now, to the millisecond."""
    return round(time.monotonic() - begun, 3)


def parse_size(text: str) -> int:
    """Bytes meant by `512`, `64K`, `1.5 GiB` (always powers of 1024). ValueError when it is no size."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a size; write for example 512, 64K, 1.5G")
    whole, fraction, suffix = match.groups()
    scale = _SUFFIXES[suffix.upper()]
    exact = int(whole) * scale
    if fraction:
        exact += int(fraction) * scale // 10 ** len(fraction)
    return exact


def format_bytes(count: float) -> str:
    """`1.5 GiB`: three significant digits, binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"


def format_rate(bytes_per_s: float) -> str:
    return f"{format_bytes(bytes_per_s)}/s"


def format_duration(seconds: float) -> str:
    """`0.84 s`, `12.3 s`, `4 min 05 s`, `2 h 07 min`."""
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


_DURATION = re.compile(r"(\d{1,9}(?:\.\d{1,6})?)\s*(ms|s|m|min|h)?")
_SECONDS = {"ms": 0.001, None: 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


def parse_duration(text: str) -> float:
    """Seconds meant by `90`, `60s`, `2m`, `1.5h`, `20ms`. ValueError when it is no duration."""
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a duration; write for example 60s, 2m, 1.5h")
    return float(match[1]) * _SECONDS[match[2]]
