"""What holds for every test."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def _leaks_are_told_where_they_were_made(request: pytest.FixtureRequest) -> Iterator[None]:
    """What is left to the garbage collector fails the test that runs when it is collected: let that be one of this file.

    Not in the fast ring, whose tests change files all the time."""
    yield
    if "not slow" not in request.config.getoption("markexpr"):
        gc.collect()
