"""CRC-32C (Castagnoli) of bytes, at some hundred MB/s without a compiled helper.

    data, zeros put in front of it     |lane 64|lane 64|lane 64| …      a table for each place in a lane, all lanes at once
    neighbours are merged, pair by pair:  crc(A B) = crc(A) moved over len(B) zeros, xor crc(B)

Zeros in front have no effect while the register starts at 0. The usual start (all ones) is put in as a register that is moved
over the whole length. numpy is loaded on first use, so that whoever needs only the structures' constants starts fast.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Registers = npt.NDArray[np.uint32]

_POLYNOMIAL = 0x82F6_3B78  # 0x1EDC6F41, least significant bit first
_ONES = 0xFFFF_FFFF
_LANE = 64  # bytes, 2^n


def crc32c(data: bytes | bytearray | memoryview) -> int:
    import numpy as np

    raw = np.frombuffer(data, np.uint8)
    lanes = np.zeros((-(-len(raw) // _LANE) or 1, _LANE), np.uint8)
    lanes.reshape(-1)[lanes.size - len(raw) :] = raw
    return int(merged(lane_registers(lanes), _LANE)) ^ moved(_ONES, len(raw)) ^ _ONES


def row_registers(rows: npt.NDArray[np.uint8]) -> Registers:
    """The register, started at 0, after each row; rows of 64 * 2^n bytes. What `joined` puts together."""
    lanes = lane_registers(rows.reshape(-1, _LANE)).reshape(len(rows), -1)
    return merged(lanes, _LANE)


def joined(registers: list[int], width: int) -> int:
    """The CRC-32C of rows of `width` bytes, from the register of each."""
    register = _ONES
    for following in registers:
        register = _move(register, width) ^ following
    return register ^ _ONES


def lane_registers(lanes: npt.NDArray[np.uint8]) -> Registers:
    import numpy as np

    tables = _lane_tables()
    found = np.zeros(len(lanes), np.uint32)
    for place in range(_LANE):
        found ^= tables[_LANE - 1 - place].take(lanes[:, place])
    return found


def merged(registers: Registers, width: int) -> Registers:
    """The register over all of the last axis, whose items are of `width` bytes each."""
    import numpy as np

    while registers.shape[-1] > 1:
        if registers.shape[-1] % 2:
            registers = np.concatenate((np.zeros_like(registers[..., :1]), registers), axis=-1)
        left, right = registers[..., ::2], registers[..., 1::2]
        tables = _move_tables(width)
        registers = right ^ tables[0].take(left & 0xFF)
        for place in range(1, 4):
            registers ^= tables[place].take(left >> (8 * place) & 0xFF)
        width *= 2
    found: Registers = registers[..., 0]
    return found


def moved(register: int, count: int) -> int:
    """A register after `count` more bytes of zeros."""
    width = 1
    while count:
        if count & 1:
            register = _move(register, width)
        count >>= 1
        width *= 2
    return register


def _move(register: int, width: int) -> int:
    tables = _move_lists(width)
    return (
        tables[0][register & 0xFF]
        ^ tables[1][register >> 8 & 0xFF]
        ^ tables[2][register >> 16 & 0xFF]
        ^ tables[3][register >> 24]
    )


@lru_cache
def _lane_tables() -> Registers:
    """tables[k][b]: the register after byte b and k zeros."""
    import numpy as np

    first = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        first = np.where(first & 1, first >> 1 ^ np.uint32(_POLYNOMIAL), first >> 1).astype(np.uint32)
    tables = [first]
    while len(tables) < _LANE:
        tables.append(tables[-1] >> 8 ^ first[tables[-1] & 0xFF])
    return np.array(tables)


@lru_cache(maxsize=64)
def _move_lists(width: int) -> list[list[int]]:
    """Four tables, one for each byte of a register: what it becomes after `width` (2^n) bytes of zeros."""
    if width == 1:
        step = _lane_tables()[0].tolist()
        return [step] + [[byte << 8 * (place - 1) for byte in range(256)] for place in range(1, 4)]
    half = width // 2
    return [[_move(_move(byte << 8 * place, half), half) for byte in range(256)] for place in range(4)]


@lru_cache(maxsize=64)
def _move_tables(width: int) -> Registers:
    import numpy as np

    return np.array(_move_lists(width), np.uint32)
