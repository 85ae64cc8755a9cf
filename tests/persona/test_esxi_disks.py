"""The VMDK files of the played ESXi host hold what its guests wrote: qemu-img and tokvm read them."""

from __future__ import annotations

import random
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.persona.conftest import BuildEsxi, MiB

from tokvm.images.chain import Chain
from tokvm.images.listed import open_layers
from tokvm.images.reader import ChainReader
from tokvm.testing.esxi.host import DatastoreSpec, DiskSpec, EsxHost, MachineSpec
from tokvm.testing.hyperv.backend import UNMAPPED, ZERO, FileBackend

SIZE = 9 * MiB + 512
TYPES = {"VMFS-6": "sesparse", "VMFS-5": "delta", "NFS": "delta"}


def by_qemu(host: EsxHost, path: str) -> bytes:
    """QEMU finds the parents by their hints, and compares CIDs."""
    image = str(host.local(path))
    command = ["qemu-img", "convert", "-f", "vmdk", "-O", "raw", image, f"{image}.raw"]
    subprocess.run(command, check=True, capture_output=True)
    raw = Path(f"{image}.raw")
    data = raw.read_bytes()
    raw.unlink()
    return data


def by_tokvm(host: EsxHost, files: list[str]) -> bytes:
    """files: top first."""
    layers = open_layers([str(host.local(path)) for path in reversed(files)], lambda _: "vmdk")
    reader = ChainReader(Chain.open(layers))
    raw = bytearray(reader.size)
    try:
        for chunk in reader.chunks():
            raw[chunk.offset : chunk.offset + chunk.length] = bytes(chunk.length) if chunk.data is None else chunk.data
            chunk.release()
    finally:
        reader.close()
    return bytes(raw)


def scribble(host: EsxHost, rng: random.Random, disk: int = 0, *, times: int = 12) -> None:
    """Writes and trims anywhere, of any size; the file of a VM that is off is written once, at the end."""
    guests, guest = host.guests, host.vm("web")["guest"]
    for _ in range(times):
        first = rng.randrange(SIZE // 512)
        sectors = min(rng.choice([1, 3, 128, 5000]), SIZE // 512 - first)
        if rng.random() < 0.3:
            guests.trim(guest, disk, first * 512, sectors * 512, rng.choice([ZERO, UNMAPPED]))
        else:
            guests.write(guest, disk, first * 512, rng.randbytes(512) * sectors)
    host.write_disk("web", disk, offset=0, data=rng.randbytes(512))


def one_machine(build: BuildEsxi, type_: str = "VMFS-6", *, running: bool = True, **options: object) -> EsxHost:
    spec = MachineSpec("web", disks=[DiskSpec(SIZE)], running=running)
    return build(spec, datastores=[DatastoreSpec(type=type_)], **options)


def descriptor(host: EsxHost, path: str) -> dict[str, str]:
    text = host.local(path).read_text()
    return dict(re.findall(r'^(CID|parentCID|createType|parentFileNameHint)="?([^"\n]*)"?$', text, re.MULTILINE))


@pytest.mark.parametrize(
    ("type_", "seed"),
    [
        ("VMFS-6", 0),
        ("VMFS-5", 0),
        *(pytest.param(type_, seed, marks=pytest.mark.slow) for type_ in TYPES for seed in (1, 2)),
    ],
)
@pytest.mark.slow
def test_every_snapshot_holds_what_the_guest_had_written_then(build_esxi: BuildEsxi, type_: str, seed: int) -> None:
    host = one_machine(build_esxi, type_)
    rng = random.Random(seed)
    made = []
    for number in range(3):
        scribble(host, rng)
        made.append(host.foreign_snapshot("web", f"s{number}")["id"])
    scribble(host, rng)
    for number in made:
        wanted, files = host.read_disk("web", snapshot=number), host.frozen("web", number)
        assert by_qemu(host, files[0]) == wanted
        assert by_tokvm(host, files) == wanted
    assert len({host.read_disk("web", snapshot=number) for number in made}) == 3
    host.guest_stops("web")
    assert by_qemu(host, host.chain("web")[0]) == host.read_disk("web")
    assert [Path(host.extent(path)).stem for path in host.chain("web")[:3]] == [
        f"web-{number:06}-{TYPES[type_]}" for number in (3, 2, 1)
    ]


def test_the_file_that_a_vm_runs_on_holds_no_truth(build_esxi: BuildEsxi) -> None:
    host = one_machine(build_esxi)
    host.write_disk("web", offset=0, data=b"x" * 512)
    assert not any(host.local(host.extent(host.chain("web")[0])).read_bytes()[:512])
    host.foreign_snapshot("web")
    host.write_disk("web", offset=512, data=b"y" * 512)
    top = host.local(host.extent(host.chain("web")[0]))
    assert b"y" * 512 not in top.read_bytes()
    with pytest.raises(subprocess.CalledProcessError):  # its journal is open
        by_qemu(host, host.chain("web")[0])
    host.guest_stops("web")
    assert by_qemu(host, host.chain("web")[0]) == b"x" * 512 + b"y" * 512 + bytes(SIZE - 1024)


def test_a_running_vms_layers_bear_one_cid_until_they_are_closed(build_esxi: BuildEsxi) -> None:
    host = one_machine(build_esxi)
    before = descriptor(host, host.chain("web")[0])["CID"]
    for _ in range(2):
        host.foreign_snapshot("web")
    found = [descriptor(host, path) for path in host.chain("web")]
    assert [one["CID"] for one in found] == [before] * 3
    assert [one["parentCID"] for one in found] == [before, before, "ffffffff"]
    assert [one.get("parentFileNameHint") for one in found] == ["web-000001.vmdk", "web.vmdk", None]
    host.guest_stops("web")
    closed = [descriptor(host, path) for path in host.chain("web")]
    assert closed[0]["CID"] != before
    assert closed[1:] == found[1:]


@pytest.mark.parametrize("running", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("which", [0, 1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_removing_any_snapshot_loses_nothing(build_esxi: BuildEsxi, which: int, running: bool) -> None:
    host = one_machine(build_esxi, running=running)
    rng = random.Random(which)
    for number in range(3):
        scribble(host, rng)
        host.foreign_snapshot("web", f"s{number}")
    scribble(host, rng)
    host.delete_snapshot("web", which + 1)
    left = [one["id"] for one in host.snapshots("web")]
    assert len(left) == 2
    for number in left:
        assert by_qemu(host, host.frozen("web", number)[0]) == host.read_disk("web", snapshot=number)
    if running:
        host.guest_stops("web")
    assert by_qemu(host, host.chain("web")[0]) == host.read_disk("web")
    names = {path.name for path in host.local(host.directory("web")).glob("*.vmdk")}
    assert len(names) == 6  # three files of two parts each


def test_a_snapshot_with_two_branches_above_it_is_forgotten_and_not_merged(build_esxi: BuildEsxi) -> None:
    host = one_machine(build_esxi, running=False)
    rng = random.Random(9)
    for number in range(2):
        scribble(host, rng)
        host.foreign_snapshot("web", f"s{number}")
    host.revert("web", 1)
    scribble(host, rng)
    host.foreign_snapshot("web", "branch")
    host.delete_snapshot("web", 1)
    assert [one["id"] for one in host.snapshots("web")] == [2, 3]
    for number in (2, 3):
        assert by_qemu(host, host.frozen("web", number)[0]) == host.read_disk("web", snapshot=number)
    assert host.frozen("web", 2)[-1] == host.frozen("web", 3)[-1]


def test_what_a_running_guest_holds_now_is_asked_of_nobody(build_esxi: BuildEsxi, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real guest's disk is open in its QEMU."""
    host = one_machine(build_esxi)

    def strict(method: str, upto: int) -> Callable[..., Any]:
        real = getattr(FileBackend, method)

        def checked(self: FileBackend, *words: Any) -> Any:
            assert words[upto] or not host.guests.is_running(words[0]), words
            return real(self, *words)

        return checked

    for method, upto in (("changes", 3), ("data", 2)):
        monkeypatch.setattr(FileBackend, method, strict(method, upto))
    for _ in range(2):
        host.write_disk("web", offset=512, data=b"q" * 512)
        made = host.foreign_snapshot("web")["id"]
    host.delete_snapshot("web", made)
    host.delete_snapshot("web", 1)
    assert len(host.chain("web")) == 1
    with pytest.raises(AssertionError):
        host.guests.changes(host.vm("web")["guest"], 0, "", "")


def test_a_freed_name_is_given_to_the_next_delta(build_esxi: BuildEsxi) -> None:
    """So a path is no identity: the same name may hold other changes the next time."""
    host = one_machine(build_esxi)
    first = host.foreign_snapshot("web")["id"]
    host.foreign_snapshot("web")
    assert [Path(path).name for path in host.chain("web")] == ["web-000002.vmdk", "web-000001.vmdk", "web.vmdk"]
    host.delete_snapshot("web", first)
    assert [Path(path).name for path in host.chain("web")] == ["web-000002.vmdk", "web.vmdk"]
    host.foreign_snapshot("web")
    assert [Path(path).name for path in host.chain("web")] == ["web-000001.vmdk", "web-000002.vmdk", "web.vmdk"]


@pytest.mark.slow
def test_a_clone_is_the_disk_as_it_was_frozen(build_esxi: BuildEsxi) -> None:
    host = one_machine(build_esxi)
    scribble(host, random.Random(4))
    made = host.foreign_snapshot("web")["id"]
    scribble(host, random.Random(5))
    source, folder = host.frozen("web", made)[0], f"{host.directory('web')}/tokvm-clone"
    assert host.run(f"mkdir -p {folder}").code == 0
    done = host.run(f"vmkfstools -i {source} {folder}/base.vmdk -d thin")
    assert (done.code, "Clone: 100% done." in done.stdout) == (0, True)
    assert by_qemu(host, f"{folder}/base.vmdk") == host.read_disk("web", snapshot=made)
    assert host.run(f"vmkfstools -i {source} {folder}/base.vmdk -d thin").stderr.startswith("Failed to clone disk")
    assert host.ask("ls", "-1", folder).stdout == "base-flat.vmdk\nbase.vmdk\n"
    assert host.run(f"rmdir {folder}").code == 1
    assert host.run(f"vmkfstools -U {folder}/base.vmdk").code == host.run(f"rmdir {folder}").code == 0
    assert host.ask("ls", "-1", folder).code == 1
    assert host.violations() == []


def test_disks_elsewhere_and_disks_that_no_snapshot_touches(build_esxi: BuildEsxi) -> None:
    """A delta lies beside its parent; an independent disk runs on in its own file."""
    disks = [
        DiskSpec(SIZE),
        DiskSpec(SIZE, path="[Slow disks] other dir/d.vmdk", bus="sata"),
        DiskSpec(SIZE, mode="independent_persistent", bus="nvme"),
    ]
    host = build_esxi(MachineSpec("web", disks=disks), datastores=[DatastoreSpec(), DatastoreSpec("Slow disks", type="VMFS-5")])
    host.foreign_snapshot("web")
    home, slow = (one["uuid"] for one in host.state()["datastores"])
    assert host.chain("web", 0)[0] == f"/vmfs/volumes/{home}/web/web-000001.vmdk"
    assert host.chain("web", 1)[0] == f"/vmfs/volumes/{slow}/other dir/d-000001.vmdk"
    assert host.extent(host.chain("web", 1)[0]).endswith("/d-000001-delta.vmdk")
    assert host.chain("web", 2) == [f"/vmfs/volumes/{home}/web/web_2.vmdk"]
    vmsd = host.local(f"{host.directory('web')}/web.vmsd").read_text()
    assert 'snapshot0.numDisks = "2"' in vmsd
    assert f'snapshot0.disk1.fileName = "/vmfs/volumes/{slow}/other dir/d.vmdk"' in vmsd
    assert 'snapshot0.disk1.node = "sata0:0"' in vmsd
    vmx = host.local(f"{host.directory('web')}/web.vmx").read_text()
    assert 'nvme0:0.mode = "independent-persistent"' in vmx


def test_a_giant_has_sesparse_deltas_on_vmfs_5_too(build_esxi: BuildEsxi) -> None:
    host = build_esxi(MachineSpec("web", disks=[DiskSpec(3 << 40)], running=False), datastores=[DatastoreSpec(type="VMFS-5")])
    host.write_disk("web", offset=(3 << 40) - 512, data=b"z" * 512)
    made = host.foreign_snapshot("web")["id"]
    assert host.extent(host.chain("web")[0]).endswith("-000001-sesparse.vmdk")
    with host.local(host.extent(host.frozen("web", made)[0])).open("rb") as flat:
        flat.seek(-512, 2)
        assert flat.read() == b"z" * 512
