"""What bad days of all hosts have in common: which of them come every day."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product

import pytest
from _pytest.mark import ParameterSet


def cases(*axes: Iterable[object], daily: Iterable[tuple[object, ...]]) -> list[ParameterSet]:
    """Everything with everything, at night; these alone every day."""
    wanted = list(daily)
    found = list(product(*axes))
    assert all(one in found for one in wanted), "a case that there is not"
    return [
        pytest.param(*one, marks=() if one in wanted else pytest.mark.nightly, id=", ".join(map(_named, one))) for one in found
    ]


def days(names: str, *found: list[ParameterSet]) -> pytest.MarkDecorator:
    """Parametrizes `bench` and these: cases whose first axis is places."""
    return pytest.mark.parametrize(("bench", *names.split()), [one for some in found for one in some], indirect=["bench"])


def _named(value: object) -> str:
    return getattr(value, "__name__", str(value))
