"""vSphere's values without a server: places, paths, records, changed areas, hardware, templates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokvm.core.errors import HostKeyError, SourceError, UsageError
from tokvm.core.extents import ExtentKind
from tokvm.core.machine import PowerState, Snapshot
from tokvm.images.chain import Chain
from tokvm.remote.tls import CertificateRefused, TlsTrust, parse_fingerprint
from tokvm.sources.vmware.api import cbt, lease, nbd, properties, snapshots
from tokvm.sources.vmware.api.datastores import bare_name, beside, folder_target, split_path
from tokvm.sources.vmware.api.faults import VsphereError, error_of
from tokvm.sources.vmware.api.machine import disks_of, hardware_version, power_state, snapshots_of
from tokvm.sources.vmware.api.place import Place
from tokvm.sources.vmware.api.record import Fence, Record
from tokvm.sources.vmware.api.vmomi import versions, vim
from tokvm.sources.vmware.hardware import Node

MiB = 1 << 20
T = TypeVar("T")


# ---- places and paths


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("//vc.example", Place("vc.example")),
        ("//root@esx1:8443", Place("esx1", "root", 8443)),
        ("//me@vsphere.local@vc/Folder%2F1/DC%201/", Place("vc", "me@vsphere.local", 443, "Folder/1/DC 1")),
        ("//root@[fe80::1]:444/ha-datacenter", Place("fe80::1", "root", 444, "ha-datacenter")),
    ],
)
def test_a_place_is_what_was_typed(text: str, place: Place) -> None:
    assert Place.parse(text) == place
    assert Place.parse(place.url.removeprefix("vpx:")) == place


@pytest.mark.parametrize(
    "text", ["", "//", "//root:secret@vc", "//@vc", "//vc:0", "//vc:99999", "//vc:x", "//a b", "//-", "//ü"]
)
def test_a_place_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        Place.parse(text)


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("[ds] a/b.vmdk", ("ds", "a/b.vmdk")),
        ("[Store 1] $(reboot)/'x' \".vmdk", ("Store 1", "$(reboot)/'x' \".vmdk")),
        ("[a] b] c/d.vmdk", ("a] b", "c/d.vmdk")),
        ("[a] b]/c] d.vmdk", ("a", "b]/c] d.vmdk")),
    ],
)
def test_datastore_paths_are_taken_apart_by_the_names_there_are(path: str, parts: tuple[str, str]) -> None:
    assert split_path(path, lambda: ["ds", "Store 1", "a] b"] if parts[0] != "a" else ["a"]) == parts


@pytest.mark.parametrize(
    "path", ["", "x.vmdk", "[ds]x", "[] x", "[ds] ../x", "[ds] a/../x", "[ds] /etc/x", "[ds] a//x", "[ds] a\nb"]
)
def test_paths_that_lead_elsewhere_are_refused(path: str) -> None:
    with pytest.raises(SourceError):
        split_path(path)


def test_a_path_that_may_lie_on_two_datastores_is_refused() -> None:
    with pytest.raises(SourceError, match="2 datastores"):
        split_path("[a] b] c/d.vmdk", lambda: ["a", "a] b"])


def test_names_beside_a_descriptor() -> None:
    assert beside("[ds] vm/disk.vmdk", "disk-flat.vmdk") == "[ds] vm/disk-flat.vmdk"
    assert beside("[ds] disk.vmdk", "disk-flat.vmdk") == "[ds] disk-flat.vmdk"
    assert (bare_name("[ds] a b/disk.vmdk"), bare_name("[ds] disk.vmdk")) == ("disk.vmdk", "disk.vmdk")


def test_vcenter_wants_its_names_encoded_twice_and_esxi_once() -> None:
    path = "[Store 1+ä] a b/x#1.vmdk"
    assert folder_target(path, datacenter="F/DC 1", twice=True) == (
        "/folder/a%20b/x%231.vmdk?dcPath=F%252FDC%25201&dsName=Store%25201%252B%25C3%25A4"
    )
    assert folder_target(path, datacenter="ha-datacenter", twice=False) == (
        "/folder/a%20b/x%231.vmdk?dcPath=ha-datacenter&dsName=Store%201%2B%C3%A4"
    )


# ---- trust


def test_a_fingerprint_is_read_as_people_write_it() -> None:
    digits = "ab" * 32
    shown = ":".join(["AB"] * 32)
    assert {parse_fingerprint(text) for text in (digits, shown, f"SHA256:{shown}", f"sha-256={digits}", f" {shown}\n")} == {
        digits
    }


@pytest.mark.parametrize("text", ["", "ab", "zz" * 32, "ab" * 20, "ab" * 33, "SHA1:" + "ab" * 20])
def test_what_is_no_sha256_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_fingerprint(text)


def test_a_ca_and_a_pin_are_not_both_taken() -> None:
    with pytest.raises(UsageError, match="both"):
        TlsTrust.of(ca_file="ca.pem", fingerprints=("ab" * 32,))
    assert issubclass(CertificateRefused, HostKeyError)


# ---- faults


def test_a_fault_is_told_by_its_own_name_or_its_kind() -> None:
    error = error_of(vim.fault.NoPermission(msg="no", privilegeId="VApp.Export"), where="vpx://vc", doing="exporting")
    assert (error.fault, "VApp.Export" in error.what, "role" in error.fix) == ("NoPermission", True, True)
    derived = error_of(vim.fault.FileLocked(msg="x", file="y"), where="", doing="z")
    assert (derived.fault, "holds" in derived.fix) == ("FileLocked", True)


def test_the_newest_version_of_the_api_comes_first() -> None:
    names = [name for _, name in versions()]
    assert names.index("8.0.2.0") < names.index("7.0.0.0") < names.index("6.5")


# ---- our record


FENCE = Fence("to 'KVM'; $(x)", "domain-c1", "high", "host-1", "powerOn")


@pytest.mark.parametrize(
    "record", [Record(), Record("me"), Record("me", FENCE, 1700000000, False), Record(fence=FENCE), Record(cbt=True)]
)
def test_a_record_comes_back(record: Record) -> None:
    assert Record.from_text(record.to_text()) == record


@pytest.mark.parametrize(
    "text",
    [
        "x",
        "[]",
        '{"v":2}',
        '{"v":1,"new":1}',
        '{"v":1,"owner":1}',
        '{"v":1,"asked":true}',
        '{"v":1,"cbt":1}',
        '{"v":1,"fence":{}}',
        '{"v":1,"fence":{"reason":"r"}}',
        "[" * 5000,
        '{"v":1,"owner":"' + "x" * 5000 + '"}',
    ],
)
def test_what_we_did_not_write_is_no_record(text: str) -> None:
    with pytest.raises((ValueError, RecursionError)):
        Record.from_text(text)


# ---- changed areas


@dataclass
class AskingClient:
    """What cbt needs of a client."""

    where: str = "vpx://vc"

    def ask(self, question: Callable[[], T], doing: str) -> T:
        assert doing
        return question()


@dataclass
class TrackedVm:
    """Pages of QueryChangedDiskAreas as real ones are: short, some without an area, and a fault at the disk's end."""

    size: int
    areas: list[tuple[int, int]]
    page: int = 1 << 62
    asked: list[int] = field(default_factory=list)
    fault: Any = None

    def QueryChangedDiskAreas(self, *, snapshot: Any, deviceKey: int, startOffset: int, changeId: str) -> Any:
        assert (snapshot, deviceKey, changeId) == ("snapshot", 2000, "52 aa/1")
        self.asked.append(startOffset)
        if self.fault is not None:
            raise self.fault
        if startOffset >= self.size:
            raise vim.fault.FileFault(file="startOffset")
        end = min(startOffset + self.page, self.size)
        found = [
            vim.VirtualMachine.DiskChangeInfo.DiskChangeExtent(start=at, length=length)
            for at, length in self.areas
            if startOffset <= at < end
        ]
        return vim.VirtualMachine.DiskChangeInfo(startOffset=startOffset, length=end - startOffset, changedArea=found)


def areas_of(vm: TrackedVm) -> list[tuple[int, int]]:
    found = cbt.changed(AskingClient(), vm, "snapshot", 2000, vm.size, "52 aa/1")  # type: ignore[arg-type]
    return list(found.ranges(0, vm.size))


@given(
    blocks=st.sets(st.integers(0, 63)),
    page=st.integers(1, 64),
)
@pytest.mark.slow
def test_every_page_is_asked_for_also_behind_empty_ones(blocks: set[int], page: int) -> None:
    vm = TrackedVm(64 * MiB, [(block * MiB, MiB) for block in sorted(blocks)], page * MiB)
    assert areas_of(vm) == vm.areas
    assert vm.asked == list(range(0, 64 * MiB, page * MiB))
    assert max(vm.asked) < vm.size


def test_a_disk_whose_size_is_no_multiple_of_anything() -> None:
    assert areas_of(TrackedVm(3 * MiB + 512, [(3 * MiB, 512)], MiB)) == [(3 * MiB, 512)]


@pytest.mark.parametrize("areas", [[(-512, 512)], [(0, 0)], [(MiB - 512, 1024)], [(0, 1024), (512, 1024)]])
def test_areas_that_cannot_be_are_refused(areas: list[tuple[int, int]]) -> None:
    with pytest.raises(SourceError, match="areas"):
        cbt.Areas.of(MiB, areas, where="vc")


def test_a_page_that_does_not_go_on_is_refused() -> None:
    vm = TrackedVm(4 * MiB, [], 0)
    with pytest.raises(SourceError, match="page"):
        areas_of(vm)


def test_areas_are_cut_at_the_range_that_is_asked_for() -> None:
    areas = cbt.Areas.of(100, [(50, 20), (10, 20)], where="")
    assert list(areas.ranges(0, 100)) == [(10, 20), (50, 20)]
    assert list(areas.ranges(15, 60)) == [(15, 15), (50, 10)]
    assert list(areas.ranges(30, 50)) == []
    assert areas.digest != cbt.Areas.of(100, [(50, 20), (10, 19)], where="").digest


def test_another_uuid_means_that_tracking_began_anew() -> None:
    assert cbt.same_tracking("52 de c0/5", "52 de c0/9")
    assert not cbt.same_tracking("52 de c0/5", "52 aa bb/1")
    assert not cbt.same_tracking("", "52 aa bb/1")
    assert not cbt.same_tracking("52 aa/1", "")


def test_areas_in_use_that_nobody_knows_are_all_of_the_disk() -> None:
    class Refusing(AskingClient):
        def ask(self, question: Callable[[], T], doing: str) -> T:
            raise VsphereError("no", where="", fault="FileFault")

    assert cbt.in_use(Refusing(), None, None, 2000, MiB) is None  # type: ignore[arg-type]


# ---- a disk behind an NBD server


@pytest.mark.parametrize(
    "text", ["nbd://host", "nbd+unix:///", "nbd+unix:///x?socket=/a", "nbd+unix:///?socket={nobody}", "/run/x"]
)
def test_templates_that_cannot_be_used_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        nbd.check_template(text)


def test_a_template_is_filled() -> None:
    template = "nbd+unix:///?socket=/run/{uuid}-{number}-{index}.sock"
    nbd.check_template(template)
    uri = nbd.filled(template, uuid="u", snapshot="s", number="2000", index="0")
    assert nbd.socket_of(uri) == "/run/u-2000-0.sock"


class Bytes:
    """What AreasLayer needs of a file."""

    name, size, stamp = "export", MiB, ""


def rows(layer: Any) -> list[tuple[int, int, ExtentKind]]:
    return [(one.offset, one.length, one.kind) for window in layer.windows(max_rows=1) for one in window]


def test_a_delta_names_what_changed_and_a_base_zeros_too() -> None:
    areas = cbt.Areas.of(MiB, [(0, 512), (4096, 8192)], where="")
    delta = nbd.AreasLayer(Bytes(), areas, size=MiB, at="cbt-b", since="cbt-a")  # type: ignore[arg-type]
    assert rows(delta) == [(0, 512, ExtentKind.DATA), (4096, 8192, ExtentKind.DATA)]
    assert Chain.open([delta]).partial
    base = nbd.AreasLayer(Bytes(), areas, size=MiB, at="cbt-b", since="")  # type: ignore[arg-type]
    assert sum(length for _, length, _ in rows(base)) == MiB
    assert {kind for _, _, kind in rows(base)} == {ExtentKind.DATA, ExtentKind.ZERO}
    assert not Chain.open([base]).partial
    assert rows(nbd.AreasLayer(Bytes(), None, size=MiB, at="x", since="")) == [(0, MiB, ExtentKind.DATA)]  # type: ignore[arg-type]


# ---- hardware as the API has it


def backing(*files: str, **fields: Any) -> Any:
    made = None
    for name in reversed(files):
        made = vim.vm.device.VirtualDisk.FlatVer2BackingInfo(fileName=name, parent=made, diskMode="persistent")
    for key, value in fields.items():
        setattr(made, key, value)
    return made


def disk(key: int, controller: int, unit: int, found: Any, size: int = MiB) -> Any:
    return vim.vm.device.VirtualDisk(
        key=key, controllerKey=controller, unitNumber=unit, capacityInKB=size // 1024, capacityInBytes=size, backing=found
    )


def hardware(*devices: Any) -> Any:
    scsi = vim.vm.device.ParaVirtualSCSIController(key=1000, busNumber=0, sharedBus="noSharing")
    shared = vim.vm.device.VirtualLsiLogicSASController(key=1001, busNumber=1, sharedBus="physicalSharing")
    nvme = vim.vm.device.VirtualNVMEController(key=31000, busNumber=0)
    ide = vim.vm.device.VirtualIDEController(key=200, busNumber=0)
    return vim.vm.VirtualHardware(numCPU=1, memoryMB=1, device=[nvme, shared, scsi, ide, *devices])


def test_disks_are_in_the_guests_order_with_their_chains() -> None:
    found = disks_of(
        hardware(
            disk(2001, 1000, 10, backing("[ds] v/b-000001.vmdk", "[ds] v/b.vmdk")),
            disk(2000, 1000, 2, backing("[ds] v/a.vmdk")),
            disk(2016, 1001, 0, backing("[ds] v/c.vmdk")),
        ),
        "vc",
    )
    assert [one.key for one in found] == ["scsi0:2:[ds] v/a.vmdk", "scsi0:10:[ds] v/b.vmdk", "scsi1:0:[ds] v/c.vmdk"]
    assert found[1].layers == ("[ds] v/b-000001.vmdk", "[ds] v/b.vmdk")
    assert [one.device.shared for one in found] == ["", "", "physicalSharing"]


def test_mappings_and_sharing_are_seen() -> None:
    mapping = vim.vm.device.VirtualDisk.RawDiskMappingVer1BackingInfo(fileName="[ds] r.vmdk", compatibilityMode="virtualMode")
    both = disks_of(
        hardware(disk(2000, 1000, 0, mapping), disk(2001, 1000, 1, backing("[ds] s.vmdk", sharing="sharingMultiWriter"))), "vc"
    )
    assert [(one.device.rdm, one.device.shared) for one in both] == [("virtualMode", ""), ("", "sharingMultiWriter")]


@pytest.mark.parametrize(
    "devices",
    [
        (disk(2000, 1000, 0, backing("[ds] a.vmdk")), disk(2001, 1000, 0, backing("[ds] b.vmdk"))),
        (disk(2000, 99, 0, backing("[ds] a.vmdk")),),
        (disk(2000, 1000, 0, backing("[ds] a.vmdk"), size=0),),
        (disk(2000, 1000, 0, backing("[ds] a.vmdk", "[ds] a.vmdk")),),
        (disk(2000, 1000, 0, backing(*(f"[ds] {n}.vmdk" for n in range(65)))),),
    ],
)
def test_descriptions_that_do_not_hang_together_are_refused(devices: tuple[Any, ...]) -> None:
    with pytest.raises(SourceError):
        disks_of(hardware(*devices), "vc")


def test_power_is_unknown_while_the_host_is_not_connected() -> None:
    assert power_state("connected", "poweredOff") is PowerState.OFF
    assert power_state("disconnected", "poweredOff") is PowerState.UNKNOWN
    assert power_state("connected", "suspended") is PowerState.SUSPENDED
    assert (hardware_version("vmx-07"), hardware_version("vmx-x")) == (7, 0)


def test_a_tree_of_snapshots_is_flattened_however_deep() -> None:
    tree = None
    for number in range(200, 0, -1):
        ref = vim.vm.Snapshot(f"snapshot-{number}", None)
        children: list[Any] = [tree] if tree is not None else []
        tree = vim.vm.SnapshotTree(snapshot=ref, name=f"s\n{number}", childSnapshotList=children)
    found = snapshots_of(vim.vm.SnapshotInfo(rootSnapshotList=[tree]), "vc")
    assert [one.name for one in found][:2] == ["s\n1", "s\n2"]
    assert len(found) == 200
    assert snapshots_of(None, "vc") == []


@pytest.mark.parametrize(
    ("key", "node"),
    [
        ("/vm-7/ParaVirtualSCSIController0:1", Node("scsi", 0, 1)),
        ("/8/VirtualLsiLogicSASController3:15", Node("scsi", 3, 15)),
        ("/vm-7/VirtualIDEController1:0", Node("ide", 1, 0)),
        ("/vm-7/VirtualAHCIController0:29", Node("sata", 0, 29)),
        ("/vm-7/VirtualNVMEController0:0", Node("nvme", 0, 0)),
        ("/vm-7/nvram", None),
    ],
)
def test_a_leases_key_names_the_disks_place(key: str, node: Node | None) -> None:
    assert lease._node_of(key) == node


@pytest.mark.parametrize(
    "url", ["https://*:x/nfc/1/disk-0.vmdk", "https://[::1/nfc", "https://*:99999/nfc", "file:///etc/shadow"]
)
def test_a_lease_s_url_that_cannot_be_is_refused(url: str) -> None:
    with pytest.raises(SourceError, match=r"no URL|not https"):
        lease._parted(url, "vc")


def test_pages_without_end_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(properties, "MOST_PAGES", 5)
    page = SimpleNamespace(objects=[], token="more")
    collector = SimpleNamespace(
        RetrievePropertiesEx=lambda **_: page, ContinueRetrievePropertiesEx=lambda token: page if token else None
    )
    client: Any = SimpleNamespace(where="vc", content=SimpleNamespace(propertyCollector=collector))
    with pytest.raises(SourceError, match="more than 5 pages"):
        properties._pages(client, None)


def test_a_key_of_another_kind_of_source_is_refused() -> None:
    uuid = "5f1c2a52-0000-4000-8000-000000000001"
    assert snapshots.ids_of(Snapshot(snapshots.key_of(uuid, "1-snapshot-3"), "m", {}), "vc") == (uuid, "1-snapshot-3")
    for key in ("", "snapshot-1", f"{uuid}/", f"{uuid}/a b", "x/snapshot-1"):
        with pytest.raises(SourceError):
            snapshots.ids_of(Snapshot(key, "m", {}), "vc")
