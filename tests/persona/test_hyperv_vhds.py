"""The VHD and AVHD files of the played Hyper-V host hold what its guests wrote."""

from __future__ import annotations

import random

import pytest
from tests.images.vhdx_witnesses import by_libvhdi
from tests.persona.conftest import BuildHyperV
from tests.persona.test_hyperv_disks import SIZE, by_tokvm, frozen, live, scribble

from tokvm.core.errors import ImageError
from tokvm.testing.hyperv.host import DiskSpec, HyperVHost, MachineSpec


def old_machine(build: BuildHyperV, *, kind: str = "dynamic", **options: object) -> HyperVHost:
    return build(MachineSpec("web", disks=[DiskSpec(SIZE, kind=kind, format="vhd")], generation=1), **options)


@pytest.mark.parametrize("kind", ["dynamic", pytest.param("fixed", marks=pytest.mark.slow)])
def test_every_checkpoint_holds_what_the_guest_had_written_then(build_hyperv: BuildHyperV, kind: str) -> None:
    host, rng, made = old_machine(build_hyperv, kind=kind), random.Random(kind), []
    for number in range(3):
        scribble(host, rng)
        made.append(host.foreign_checkpoint("web", f"c{number}")["id"])
    scribble(host, rng)
    assert [path.rpartition(".")[2] for path in host.chain("web")] == ["avhd", "avhd", "avhd", "vhd"]
    for id_ in made:
        wanted, files = host.read_disk("web", checkpoint=id_), frozen(host, id_)
        assert by_tokvm(files, "vhd") == wanted
    (base,) = frozen(host, made[0])  # of a child libvhdi takes every bit of the bitmap after a set one in its byte for set
    assert by_libvhdi(base) == host.read_disk("web", checkpoint=made[0])
    assert len({host.read_disk("web", checkpoint=id_) for id_ in made}) == 3


@pytest.mark.parametrize("which", [1, *(pytest.param(which, marks=pytest.mark.slow) for which in (0, 2))])
def test_a_deleted_checkpoint_is_merged_into_its_parent(build_hyperv: BuildHyperV, which: int) -> None:
    """And who was the child of the merged file names the other now."""
    host, rng = old_machine(build_hyperv), random.Random(which)
    made = []
    for number in range(3):
        scribble(host, rng)
        made.append(host.foreign_checkpoint("web", f"c{number}")["id"])
    scribble(host, rng)
    host.delete_checkpoint("web", made[which])
    for id_ in (id_ for id_ in made if id_ != made[which]):
        assert by_tokvm(frozen(host, id_), "vhd") == host.read_disk("web", checkpoint=id_)
    host.guest_stops("web")
    assert by_tokvm(live(host), "vhd") == host.read_disk("web")


def test_the_file_of_a_running_vm_is_no_image(build_hyperv: BuildHyperV) -> None:
    host = old_machine(build_hyperv)
    host.write_disk("web", offset=0, data=b"x" * 512)
    for _ in range(2):
        with pytest.raises(ImageError, match="footer"):
            by_tokvm(live(host)[-1:], "vhd")
        host.foreign_checkpoint("web")


def test_the_host_calls_it_what_it_is(build_hyperv: BuildHyperV) -> None:
    host = old_machine(build_hyperv)
    host.foreign_checkpoint("web")
    (disk,) = host.ask("inspect", {"vm": host.id("web")}).value["disks"]
    assert (disk["controller"], disk["number"], disk["location"]) == ("IDE", 0, 0)
    assert [layer["format"] for layer in disk["layers"]] == ["VHD", "VHD"]
    assert {(layer["logicalSector"], layer["physicalSector"]) for layer in disk["layers"]} == {(512, 512)}
