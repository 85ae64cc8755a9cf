"""A signal ends a command like Ctrl-C, and leaves it the time to put a VM right."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from tokvm.cli import options


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    kept = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGTERM)}
    for number in kept:
        signal.signal(number, options._on_term)
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def test_the_second_hangup_of_a_closing_terminal_ends_no_rescue() -> None:
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGHUP)
    signal.raise_signal(signal.SIGHUP)


def test_who_asks_again_to_terminate_is_heard() -> None:
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
