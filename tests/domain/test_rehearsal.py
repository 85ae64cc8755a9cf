"""Rehearsals of real guests under a real libvirtd. The guest is one initrd that looks for its disk, asks for an address, offers
a login and plays a guest agent; its kernel has no AHCI driver (Debian's cloud kernel), so that it finds no disk on SATA.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import pytest

from tokvm.core.errors import DomainError, UsageError
from tokvm.core.machine import DiskBus, Firmware, Nic, NicModel
from tokvm.core.units import MiB
from tokvm.domain import rehearsal
from tokvm.domain.base import Accel, DirectKernel, DomainPlan, Outcome, Sign
from tokvm.domain.host import LibvirtHost
from tokvm.domain.nics import FrameSink
from tokvm.domain.nvram import DESCRIPTORS, find_template, write_variables
from tokvm.domain.picture import PNG
from tokvm.domain.rehearsal import PICTURE, SERIAL, VARIABLES, RehearsalPlan, rehearsal_name, rehearsed
from tokvm.domain.xml import Stage as XmlStage
from tokvm.domain.xml import domain_xml
from tokvm.lab.guest_image import KERNEL_WORDS
from tokvm.lab.guest_initrd import cpio
from tokvm.lab.kernel import find_kernel, module_bytes
from tokvm.remote.process import run

pytestmark = pytest.mark.root
NewPlan = Callable[..., DomainPlan]

MARK = b"the guest's root"
MAC = "00:50:56:00:00:01"
INIT = b"""#!/bin/busybox sh
bb=/bin/busybox
$bb mount -t devtmpfs dev /dev
while read -r module; do $bb insmod "/modules/$module" 2>/dev/null; done </modules.list
exec >/dev/ttyS0
for _ in 1 2 3 4 5 6 7 8 9 10; do
    for disk in /dev/vda /dev/sda /dev/nvme0n1; do
        [ "$($bb head -c 16 $disk 2>/dev/null)" = "the guest's root" ] && found=$disk
    done
    [ "$found" ] && break
    $bb usleep 100000
done
if [ ! "$found" ]; then
    echo "Gave up waiting for root file system device."
    echo "ALERT!  UUID=1 does not exist.  Dropping to a shell!"
    $bb printf '(initramfs) '
    $bb sleep 1000
fi
$bb ifconfig eth0 up
$bb udhcpc -i eth0 -n -q -t 1 -T 1 -x hostname:lab -s /bin/busybox >/dev/null 2>&1
$bb printf "lab on $found login: "
$bb sleep 2
for port in /dev/vport*p1; do exec 3<>$port; done
while :; do
    read -r line <&3 || { $bb usleep 100000; continue; }
    case $line in
        *guest-sync*) id=${line##*:} && echo "{\\"return\\": ${id%%\\}*}}" >&3 ;;
        *guest-ping*) echo '{"return": {}}' >&3 ;;
        *guest-get-osinfo*) echo '{"return": {"pretty-name": "Lab 1"}}' >&3 ;;
    esac
done
"""
MODULES = ("virtio_pci", "virtio_blk", "virtio_net", "vmxnet3", "vmw_pvscsi", "sd_mod", "af_packet", "virtio_console")


class Libvirtd(Protocol):
    uri: str
    folder: Path

    def start(self) -> None: ...
    def stop(self) -> None: ...


@dataclass(frozen=True)
class Stage:
    """A target, libvirt itself to look behind it, and a way to make rehearsals."""

    target: LibvirtHost
    raw: Any
    make: Callable[..., RehearsalPlan]

    def domains(self) -> list[str]:
        return [one.name() for one in self.raw.listAllDomains()]


@pytest.fixture(scope="session")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> DirectKernel:
    folder = tmp_path_factory.mktemp("rehearsal")
    found = find_kernel()
    modules = found.files_of(MODULES)
    names = [file.name.split(".ko")[0] + ".ko" for file in modules]
    initrd = cpio(
        [
            *((name, 0o040755, b"") for name in ("bin", "dev", "modules")),
            ("init", 0o100755, INIT),
            ("bin/busybox", 0o100755, Path("/bin/busybox").read_bytes()),
            ("modules.list", 0o100644, "".join(f"{name}\n" for name in names).encode()),
            *((f"modules/{name}", 0o100644, module_bytes(file)) for name, file in zip(names, modules, strict=True)),
        ]
    )
    (folder / "initrd").write_bytes(initrd)
    return DirectKernel(str(found.image), str(folder / "initrd"), KERNEL_WORDS)


@pytest.fixture
def stage(libvirtd: Libvirtd, new_plan: NewPlan, tmp_path: Path) -> Iterator[Stage]:
    import libvirt

    def make(**facts: Any) -> RehearsalPlan:
        more = {"memory": 160 * MiB, "vcpus": 1, "nics": (Nic(0, MAC, slot=192),), **facts}
        plan = new_plan(**more)
        folder = tmp_path / "rehearsal"
        folder.mkdir()
        overlays = []
        for index, disk in enumerate(plan.disks):
            Path(disk.path).write_bytes(MARK.ljust(MiB, b"\0"))
            overlays.append(str(folder / f"{index}.qcow2"))
            argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", disk.path, overlays[-1]]
            assert run(argv, timeout_s=30, where="qemu-img").code == 0
        return RehearsalPlan(plan=plan, overlays=tuple(overlays), folder=folder)

    target, connection = LibvirtHost(libvirtd.uri, accel=Accel.TCG), libvirt.open(libvirtd.uri)
    yield Stage(target, connection, make)
    target.clean_up_rehearsals()
    target.close()
    connection.close()


def left_in(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if file.suffix != ".qcow2")


def size_of_png(data: bytes) -> tuple[int, int, int]:
    """Width, height and bytes of pixels of a PNG with one IDAT chunk."""
    assert data.startswith(PNG)
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    at = data.index(b"IDAT")
    return width, height, len(zlib.decompress(data[at + 4 : at + 4 + int.from_bytes(data[at - 4 : at], "big")]))


@pytest.mark.slow
def test_a_guest_that_lives_is_seen_and_photographed(stage: Stage, kernel: DirectKernel) -> None:
    plan = stage.make(bus=DiskBus.PVSCSI, more={"kernel": kernel, "nic_model": NicModel.VMXNET3})
    seen = stage.target.rehearse(plan, deadline_s=200, proofs=frozenset({Sign.AGENT}))
    assert seen.outcome is Outcome.ALIVE, seen
    signs = {one.sign: one for one in seen.signs}
    assert signs[Sign.SERIAL].detail == "lab on /dev/sda login:"
    assert signs[Sign.DHCP].detail == f"{MAC} discover as 'lab'"
    assert signs[Sign.AGENT].detail == "Lab 1"
    assert 0 < signs[Sign.DHCP].after_s <= signs[Sign.SERIAL].after_s <= signs[Sign.AGENT].after_s <= seen.after_s
    assert seen.tail.endswith("login:")
    assert seen.picture is not None
    assert seen.picture.stat().st_mode & 0o777 == 0o600
    width, height, pixels = size_of_png(seen.picture.read_bytes())
    assert pixels == height * (width * 3 + 1)
    assert left_in(plan.folder) == [PICTURE]
    assert stage.domains() == []
    assert Path(plan.plan.disks[0].path).read_bytes() == MARK.ljust(MiB, b"\0")


@pytest.mark.slow
def test_a_guest_without_its_disk_is_given_up_early(stage: Stage, kernel: DirectKernel) -> None:
    plan = stage.make(bus=DiskBus.SATA, more={"kernel": kernel})
    seen = stage.target.rehearse(plan, deadline_s=280)
    assert seen.outcome is Outcome.FAILED
    assert seen.why.startswith("it finds no root disk: Gave up waiting for root")
    assert seen.after_s < 200
    assert Sign.SERIAL not in {one.sign for one in seen.signs}
    assert seen.picture is not None
    assert left_in(plan.folder) == [PICTURE]
    assert stage.domains() == []


@pytest.mark.slow
def test_a_disk_that_does_not_boot_is_heard_of_from_the_bios(stage: Stage) -> None:
    plan = stage.make()
    (plan.folder / SERIAL).write_text("web login: ")  # a killed run's, not this guest's
    seen = stage.target.rehearse(plan, deadline_s=120)
    assert seen.outcome is Outcome.FAILED
    assert seen.why == "the BIOS found nothing to boot: No bootable device."
    assert seen.signs == ()
    assert "login" not in seen.tail
    assert left_in(plan.folder) == [PICTURE]
    assert stage.domains() == []


@pytest.mark.parametrize(
    ("act", "why"), [("destroy", "it switched itself off"), ("suspend", "it was paused"), ("injectNMI", "nothing proved")]
)
@pytest.mark.slow
def test_a_domain_that_cannot_go_on_is_seen(
    stage: Stage, kernel: DirectKernel, monkeypatch: pytest.MonkeyPatch, act: str, why: str
) -> None:
    plan = stage.make(more={"kernel": kernel})

    def sleep(_seconds: float) -> None:
        getattr(stage.raw.lookupByName(rehearsal_name(plan.plan.vm.uuid)), act)(*([0] if act == "injectNMI" else []))

    monkeypatch.setattr(rehearsal, "time", SimpleNamespace(monotonic=time.monotonic, sleep=sleep))
    seen = stage.target.rehearse(plan, deadline_s=0 if act == "injectNMI" else 60)
    assert seen.outcome is (Outcome.SILENT if act == "injectNMI" else Outcome.FAILED)
    assert seen.why.startswith(why)
    assert (seen.picture is None) == (act == "destroy")
    assert stage.domains() == []


RUN = """
import sys
from pathlib import Path
from tokvm.core.machine import Disk, VirtualMachine
from tokvm.domain.base import Accel, DirectKernel, DomainPlan, TargetDisk
from tokvm.domain.host import LibvirtHost
from tokvm.domain.rehearsal import RehearsalPlan
uri, uuid, base, overlay, kernel, initrd = sys.argv[1:]
vm = VirtualMachine(uuid=uuid, name="web", vcpus=1, memory=160 << 20, disks=(Disk(0, "0", 1 << 20),))
plan = DomainPlan(vm, "web", (TargetDisk(base, False),), {}, kernel=DirectKernel(kernel, initrd, ""))
trial = RehearsalPlan(plan=plan, overlays=(overlay,), folder=Path(overlay).parent)
LibvirtHost(uri, accel=Accel.TCG).rehearse(trial, deadline_s=250)
"""


@pytest.mark.slow
def test_a_killed_tokvm_leaves_no_guest_behind(stage: Stage, kernel: DirectKernel) -> None:
    plan = stage.make()
    vm, disk = plan.plan.vm, plan.plan.disks[0].path
    argv = [sys.executable, "-c", RUN, stage.target.url, vm.uuid, disk, plan.overlays[0], kernel.image, kernel.initrd]
    with subprocess.Popen(argv) as running:
        wait_for(lambda: stage.domains() == [rehearsal_name(vm.uuid)])
        running.send_signal(signal.SIGKILL)
    wait_for(lambda: stage.domains() == [])


def wait_for(condition: Callable[[], bool], *, deadline_s: float = 60) -> None:
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.slow
def test_left_overs_are_found_by_their_metadata(stage: Stage, new_plan: NewPlan) -> None:
    plan = stage.make()
    staged = XmlStage(plan.plan.vm.uuid, str(plan.folder), str(plan.folder / SERIAL), (FrameSink(9),))
    stage.raw.createXML(domain_xml(rehearsed(plan), accel=Accel.TCG, stage=staged), 1)  # VIR_DOMAIN_START_PAUSED
    real = new_plan(name=f"{rehearsal_name(plan.plan.vm.uuid)}-not", memory=32 * MiB)
    stage.target.define(real)
    assert (plan.folder / SERIAL).exists()
    assert stage.target.clean_up_rehearsals(rehearsal_name(str(real.vm.uuid))) == 0
    assert stage.target.clean_up_rehearsals() == 1
    assert stage.domains() == [real.name]
    assert left_in(plan.folder) == []


def test_what_cannot_be_rehearsed_is_refused(stage: Stage) -> None:
    plan = stage.make(disks=2)
    with pytest.raises(DomainError, match="1 overlays for 2 disks"):
        rehearsed(replace(plan, overlays=plan.overlays[:1]))
    with pytest.raises(UsageError, match="no regular expression"):
        stage.target.rehearse(replace(plan, login="("), deadline_s=1)
    with pytest.raises(DomainError, match="on this host"):
        LibvirtHost("qemu+ssh://root@elsewhere/system", accel=Accel.TCG).rehearse(plan, deadline_s=1)
    Path(plan.overlays[0]).unlink()
    with pytest.raises(DomainError, match="does not start"):
        stage.target.rehearse(plan, deadline_s=1)
    assert left_in(plan.folder) == []


def test_the_domain_is_the_cutovers_but_for_what_must_differ(stage: Stage) -> None:
    plan = replace(stage.make(firmware=Firmware.UEFI, more={"boot_disk": 0}), memory=64 * MiB)
    tried, real = rehearsed(plan), plan.plan
    assert tried.vm.uuid != real.vm.uuid
    assert tried.vm.memory == 64 * MiB
    assert tried.nvram == str(plan.folder / VARIABLES)
    same = replace(
        tried,
        vm=replace(tried.vm, uuid=real.vm.uuid, memory=real.vm.memory),
        name=real.name,
        disks=real.disks,
        nvram=real.nvram,
    )
    assert same == real


@pytest.mark.slow
@pytest.mark.skipif(not DESCRIPTORS[0].is_dir(), reason="OVMF is not installed")
def test_prepared_variables_start_the_loader(stage: Stage, kernel: DirectKernel, tmp_path: Path) -> None:
    """OVMF alone would not look at \\EFI\\lab; "starting" is said once the file is loaded (a kernel is a loader)."""
    plan = stage.make(firmware=Firmware.UEFI)
    disk, vars_ = plan.plan.disks[0].path, tmp_path / "prepared.fd"
    make_esp(Path(disk), Path(kernel.image))
    grow = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", disk, plan.overlays[0]]
    assert run(grow, timeout_s=30, where="qemu-img").code == 0
    write_variables(vars_, find_template(machine="q35", secure_boot=False), loader="\\EFI\\lab\\loader.efi", description="lab")
    before = vars_.read_bytes()
    login = r'BdsDxe: starting Boot\w+ "lab" from \\EFI\\lab\\loader.efi'
    seen = stage.target.rehearse(replace(plan, plan=replace(plan.plan, nvram=str(vars_)), login=login), deadline_s=250)
    assert seen.outcome is Outcome.ALIVE, seen
    assert vars_.read_bytes() == before
    assert left_in(plan.folder) == [PICTURE]


def make_esp(disk: Path, loader: Path) -> None:
    """A GPT disk whose only partition is an ESP with `loader` at \\EFI\\lab\\loader.efi."""
    with disk.open("wb") as file:
        file.truncate(64 * MiB)
    inside = f"{disk}@@1M"
    for argv, text in (
        (["sfdisk", "-q", str(disk)], b"label: gpt\n2048,,U\n"),
        (["mformat", "-i", inside, "-F", "-T", str(62 * MiB // 512), "::"], b""),
        (["mmd", "-i", inside, "::/EFI", "::/EFI/lab"], b""),
        (["mcopy", "-i", inside, str(loader), "::/EFI/lab/loader.efi"], b""),
    ):
        done = run(argv, input=text, timeout_s=60, where=argv[0])
        assert done.code == 0, done.stderr
