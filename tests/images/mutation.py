"""What the searches with structured mutants share: how a field is put wrong, what a mutant may cost, and how they are run."""

from __future__ import annotations

import random
import resource
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

from tokvm.core.errors import ImageError
from tokvm.core.units import MiB

CPU_LIMIT_S = 2.0
MEMORY_LIMIT = 256 * MiB
NARROW = [0, 1, 2, 3, 4, 7, 8, 0xFF, 0x200, 0x7FFF, 0xFFFF, 1 << 16, 1 << 21, 0x7FFFFFFF, 1 << 31, 0xFFFFFFFE, 0xFFFFFFFF]
WIDE = [1 << 32, 1 << 40, (1 << 41) - 512, 1 << 41, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 512, (1 << 64) - 1]
INTERESTING = [*NARROW, *WIDE]


def poke(
    rng: random.Random,
    raw: bytearray,
    at: int,
    width: int,
    order: Literal["little", "big"] = "big",
    values: Sequence[int] = INTERESTING,
) -> None:
    """Put the field of `width` bytes at `at` wrong: a flipped bit, random bytes, or one of `values`."""
    if at + width > len(raw):
        return
    choice = rng.random()
    if choice < 0.35:
        raw[at + rng.randrange(width)] ^= 1 << rng.randrange(8)
    elif choice < 0.5:
        raw[at : at + width] = rng.randbytes(width)
    else:
        value = rng.choice(values) & ((1 << 8 * width) - 1)
        raw[at : at + width] = value.to_bytes(width, order)


def refusal(call: Callable[[], object]) -> ImageError | None:
    """The ImageError that `call` ends with, if it does. Anything else goes on to the test."""
    try:
        call()
    except ImageError as exc:
        return exc
    return None


def drain(reader: Any) -> None:
    """Read all of it; every chunk must lie within the disk."""
    for chunk in reader.chunks():
        assert 0 <= chunk.offset < chunk.offset + chunk.length <= reader.size
        chunk.release()


def run_mutants(
    originals: Sequence[bytes],
    mutate: Callable[[random.Random, bytes], bytes],
    attempt: Callable[[bytes], str],
    *,
    seed: int,
    count: int,
) -> dict[str, int]:
    """How many mutants were `read` and how many `refused` (what `attempt` answers). Each within the limits."""
    rng = random.Random(seed)
    outcomes = {"read": 0, "refused": 0}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(count):
        raw = mutate(rng, rng.choice(originals))
        start = time.process_time()
        outcomes[attempt(raw)] += 1
        spent = time.process_time() - start
        assert spent <= CPU_LIMIT_S, f"mutant {number} of seed {seed} took {spent:.1f} s of CPU"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown <= MEMORY_LIMIT
    return outcomes
