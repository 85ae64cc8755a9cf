"""Traps of the field that vSphere's API has as SSH has them, and some of changed block tracking (docs/vmware.md has all)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.sources.vsphere_rig import SIZE, MiB, Rig, applied, rigs

from tokvm.core.errors import ImageError, SourceError, UsageError
from tokvm.sources.vmware.api import tracking
from tokvm.sources.vmware.api.lease import LeasedDisk
from tokvm.testing.esxi.host import DatastoreSpec, DiskSpec, HostOptions

pytestmark = pytest.mark.slow
Make = Callable[..., Rig]
MARK = "tokvm-ab12cd34-"
NFS = HostOptions(datastores=[DatastoreSpec("nfs 1", type="NFS"), DatastoreSpec("nfs 2", type="NFS")])


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    yield from rigs(tmp_path, monkeypatch)


def descriptor(rig: Rig, name: str) -> Path:
    return rig.host.local(f"{rig.host.directory('web')}/{name}")


def test_layers_with_one_cid_are_told_apart_by_file_name(make: Make) -> None:
    """A running VM's layers all bear the base's CID: who went by it would read the wrong layer, or lose one."""
    rig = make(options=NFS)
    made = []
    for number in (1, 2, 3):
        rig.write(number * MiB, os.urandom(512))
        made.append(rig.source.snapshot(rig.vm, f"{MARK}{number}"))
    base = applied(rig.source.open_disk(rig.vm.disks[0], made[0], None))
    assert applied(rig.source.open_disk(rig.vm.disks[0], made[2], made[0]), base) == rig.content()
    lies = descriptor(rig, "web-000002.vmdk")
    right = lies.read_text()
    lies.write_text(right.replace('parentFileNameHint="web-000001.vmdk"', 'parentFileNameHint="web.vmdk"'))
    assert lies.read_text() != right
    for since in (made[0], made[1], None):
        with pytest.raises((SourceError, ImageError), match="made over the file"):
            rig.source.open_disk(rig.vm.disks[0], made[2], since)


def test_a_layer_that_its_descriptor_makes_another_size_is_not_read(make: Make) -> None:
    """What it leaves out would stay on the target as it was. Of a base there is the export, which goes by no descriptor."""
    rig = make(options=NFS)
    rig.write(SIZE - 512, b"x" * 512)
    made = [rig.source.snapshot(rig.vm, f"{MARK}{number}") for number in (1, 2)]
    for name in ("web.vmdk", "web-000001.vmdk"):
        lies = descriptor(rig, name)
        right = lies.read_text()
        lies.write_text(right.replace(f"RW {SIZE // 512} ", f"RW {SIZE // 512 - 8} "))
        assert lies.read_text() != right
    with pytest.raises((SourceError, ImageError), match=r"not what the server says|smaller|does not match"):
        rig.source.open_disk(rig.vm.disks[0], made[1], made[0])
    base = rig.source.open_disk(rig.vm.disks[0], made[0], None)
    assert isinstance(base, LeasedDisk)
    assert applied(base) == rig.content()


def test_a_vm_that_was_moved_to_other_storage_is_not_read_on(make: Make) -> None:
    rig = make(options=NFS)
    vm = rig.vm
    first = rig.source.snapshot(vm, f"{MARK}1")
    rig.host.storage_vmotion("web", "nfs 2")
    with pytest.raises(SourceError, match="no such disk"):
        rig.source.open_disk(vm.disks[0], first, None)
    assert rig.vm.disks[0].key.startswith("scsi0:0:[nfs 2] ")


def test_after_vmotion_the_delta_is_read_as_before(make: Make) -> None:
    rig = make(options=NFS)
    made = []
    for number in (1, 2):
        rig.write(number * MiB, os.urandom(64 * 512))
        made.append(rig.source.snapshot(rig.vm, f"{MARK}{number}"))
        rig.host.vmotion_away("web") if number == 1 else rig.host.vmotion_back("web")
    base = applied(rig.source.open_disk(rig.vm.disks[0], made[0], None))
    assert applied(rig.source.open_disk(rig.vm.disks[0], made[1], made[0]), base) == rig.content()


def test_a_template_is_no_vm_to_migrate(make: Make) -> None:
    rig = make(fields={"template": True})
    assert rig.source.list_machines() == []
    with pytest.raises(UsageError, match="no VM"):
        rig.source.find("web")


def test_one_host_alone_says_that_the_vm_may_be_elsewhere(make: Make) -> None:
    rig = make(vcenter=False, options=NFS)
    rig.host.vmotion_away("web")
    with pytest.raises(UsageError, match="there is no VM") as caught:
        rig.connect().power(rig.uuid)
    assert "or its vCenter" in caught.value.fix
    with pytest.raises(UsageError, match="there is no VM") as caught:
        rig.connect().find(rig.uuid)
    assert "or its vCenter" in caught.value.fix


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ({"fields": {"version": "vmx-04"}}, "vmx-07 is the oldest"),
        ({"disks": [DiskSpec(MiB), DiskSpec(MiB, mode="independent_persistent")]}, "cannot be tracked"),
        ({"disks": [DiskSpec(MiB), DiskSpec(MiB, rdm="physicalMode")]}, "cannot be tracked"),
    ],
)
def test_what_cannot_be_tracked_is_refused_before_anything_is_switched_on(
    make: Make, spec: dict[str, object], why: str
) -> None:
    rig = make(**spec)
    source = rig.connect(cbt=True)
    assert any(why in one.what for one in source.check(rig.vm))
    with pytest.raises(SourceError, match=why):
        tracking.enable(source._client, source._machines, rig.uuid)
    assert not rig.vsphere.tracks("web")
    assert rig.vsphere.extra_config("web") == {}
