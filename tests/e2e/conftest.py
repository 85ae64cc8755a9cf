"""A bench for each hypervisor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.e2e.bench import Bench, start_nursery
from tests.e2e.places import VM, EsxPlace, HyperVPlace, Place, XenPlace

from tokvm.testing.hyperv.host import ClusterSpec, HyperVHost


def clustered(folder: Path) -> HyperVPlace:
    """A role of a failover cluster, which the cluster starts again wherever it can."""
    return HyperVPlace(folder, role=ClusterSpec(group=VM))


def slowly_merging(folder: Path) -> HyperVPlace:
    return HyperVPlace(folder, merge_s=3.0)


PLACES: dict[str, Callable[[Path], Place]] = {
    "xenserver": XenPlace,
    "hyperv": HyperVPlace,
    "cluster": clustered,
    "slow merge": slowly_merging,
    "esx": EsxPlace,
}


@contextmanager
def a_bench(folder: Path, make: Callable[[Path], Place]) -> Iterator[Bench]:
    nursery = start_nursery()
    place = make(folder / "host")
    try:
        with place.host:
            yield Bench(folder, place, nursery)
            assert place.host.violations() == []
    finally:
        nursery.kill()
        nursery.communicate()


@pytest.fixture
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    """Parametrized with the name of its place."""
    with a_bench(tmp_path, PLACES[request.param]) as made:
        yield made


@pytest.fixture
def host(bench: Bench) -> HyperVHost:
    """The bench's, where it is a Hyper-V."""
    assert isinstance(bench.place, HyperVPlace)
    return bench.place.host
