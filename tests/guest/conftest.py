"""libguestfs' appliance for these tests: made from the lab's kernel where the machine has none."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tokvm.domain.accel import kvm_works
from tokvm.lab.kernel import appliance_environment


@pytest.fixture(scope="session", autouse=True)
def appliance_kernel() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in appliance_environment().items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="session")
def tcg() -> bool:
    """Whether appliances have to be emulated here."""
    return not kvm_works()
