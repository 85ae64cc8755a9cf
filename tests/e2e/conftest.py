"""A bench for each hypervisor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from tests.e2e.bench import Bench, start_nursery
from tests.e2e.places import VM, EsxPlace, HyperVPlace, Place, VspherePlace, XenPlace

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
    "vcenter": partial(VspherePlace, vcenter=True, ssh=True, store="VMFS-6"),
    "no rights": partial(VspherePlace, vcenter=True, ssh=True, store="VMFS-6", denied=("Host.Inventory.EditCluster",)),
    "lease": partial(VspherePlace, vcenter=True, ssh=False, store="VMFS-6"),
    "hostd": partial(VspherePlace, vcenter=False, ssh=False, store="NFS"),
}


@contextmanager
def a_bench(folder: Path, make: Callable[[Path], Place]) -> Iterator[Bench]:
    place = make(folder / "host")
    nursery = start_nursery(place.imports)
    try:
        yield Bench(folder, place, nursery)
        assert place.violations() == []
    finally:
        place.close()
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
