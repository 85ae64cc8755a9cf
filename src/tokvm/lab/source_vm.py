"""A real guest in QEMU whose life is kept in files, so that processes which live for one command can steer it.

    <state>/vm.json                  what it is: name, uuid, MACs, memory, command line (written once)
            layers.json              frozen layers by snapshot name, in order (replaced by rename)
            lock                     held while one process changes something
            qemu.pid qmp.sock        the running QEMU, a daemon that outlives whoever started it
            serial.log qemu.log      what the guest printed, what QEMU complained of
            disk<d>-0.raw            the base of disk d
            disk<d>-<k>.qcow2        layer k over layer k-1; the highest is written to

A snapshot freezes layer k of every disk at one moment and puts an empty layer k+1 on top: in a running QEMU by one transaction
of `blockdev-snapshot-sync` (all disks are drained and flushed before the first is switched), else by `qemu-img create`. Layers
are never merged; `drop` only forgets the name. Frozen layers never change, so they can be read while the guest runs.

A guest starts from its kernel and initrd, kept as vmlinuz and initrd.img, or by its BIOS from disk 0 (a BiosGuest).

The disks are IDE with a write-back cache and true flushes: what the guest has synced is on the host's disk.
"""

from __future__ import annotations

import fcntl
import json
import logging
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import BinaryIO

from tokvm.core.units import MiB
from tokvm.lab.errors import LabError
from tokvm.lab.guest_image import BiosGuest, GuestImage
from tokvm.lab.programs import run_program
from tokvm.lab.qemu_process import Intent, QemuProcess, VmStatus
from tokvm.lab.qmp import QmpError
from tokvm.lab.source_export import LayerFile, write_base, write_delta, write_raw

log = logging.getLogger(__name__)

MAX_DISKS = 4  # two IDE channels of two
PRESS_AGAIN_S = 3.0
_NAMESPACE = uuid.UUID("8f0c2a0a-6a3e-4a53-8d0b-5e8c0f6b1b77")


@dataclass(frozen=True, slots=True, kw_only=True)
class VmConfig:
    """`command_line`: the kernel's; None when BIOS and boot loader start the guest."""

    name: str
    uuid: str
    macs: tuple[str, ...]
    memory: int
    vcpus: int
    accel: str
    command_line: str | None
    sizes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Layers:
    """`frozen[k]` is the snapshot that froze layer k; the active layer is `len(frozen)`. `pending`: a snapshot that was begun;
    whether it was taken is asked of QEMU or of the files."""

    frozen: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    pending: str | None = None

    @property
    def active(self) -> int:
        return len(self.frozen)


class SourceVm:
    """The VM that lives in `state_dir`; `create` makes one."""

    def __init__(self, state_dir: Path) -> None:
        self.dir = state_dir.absolute()
        try:
            kept = json.loads((self.dir / "vm.json").read_text())
        except (OSError, ValueError) as exc:
            raise LabError("there is no lab VM", where=str(self.dir), fix="create the lab first") from exc
        self.config = VmConfig(**(kept | {"macs": tuple(kept["macs"]), "sizes": tuple(kept["sizes"])}))
        self.qemu = QemuProcess(self.dir, mark=f"tokvm-lab-{self.config.uuid}")

    @classmethod
    def create(
        cls,
        state_dir: Path,
        *,
        name: str,
        guest: GuestImage | BiosGuest,
        data_disks: Sequence[Path] = (),
        extra_words: str = "",
        memory: int = 256 * MiB,
        vcpus: int = 1,
        accel: str = "tcg",
        vm_uuid: str | None = None,
        macs: Sequence[str] | None = None,
    ) -> SourceVm:
        """Copy the guest's disks into `state_dir` and note what the VM is. `extra_words` go to the kernel's command line (see
        GuestSettings.kernel_words) where there is one. uuid and MAC follow from the directory and name unless given."""
        if len(data_disks) + 1 > MAX_DISKS:
            raise LabError(f"{len(data_disks) + 1} disks", fix=f"a lab VM has at most {MAX_DISKS}")
        state_dir.mkdir(parents=True, exist_ok=True)
        disks = [guest.disk, *data_disks]
        for number, disk in enumerate(disks):
            run_program(
                ["cp", "--reflink=auto", "--sparse=always", str(disk), str(state_dir / f"disk{number}-0.raw")],
                package="coreutils",
                timeout_s=3600,
            )
        command_line = None
        if isinstance(guest, GuestImage):
            command_line = f"{guest.command_line} {extra_words}".strip()
            shutil.copyfile(guest.kernel, state_dir / "vmlinuz")
            shutil.copyfile(guest.initrd, state_dir / "initrd.img")
        identity = vm_uuid or str(uuid.uuid5(_NAMESPACE, f"{state_dir.absolute()} {name}"))
        config = VmConfig(
            name=name,
            uuid=identity,
            macs=tuple(macs if macs is not None else (mac_of(identity),)),
            memory=memory,
            vcpus=vcpus,
            accel=accel,
            command_line=command_line,
            sizes=tuple(disk.stat().st_size for disk in disks),
        )
        _replace_json(state_dir / "layers.json", asdict(Layers()))
        _replace_json(state_dir / "vm.json", asdict(config))
        return cls(state_dir)

    # --- power

    def power_on(self) -> None:
        """Start QEMU as a daemon; already running is success."""
        with self._locked() as layers:
            if self.qemu.pid() is None:
                self.qemu.intend(Intent.ON)
                self.qemu.start(self._options(layers))
                log.info("lab VM %s runs as pid %s", self.config.name, self.qemu.pid())

    def shutdown(self, *, deadline_s: float) -> bool:
        """Press the power button until the guest is off; False when it is not at the deadline. Off already is success."""
        deadline, pressed = time.monotonic() + deadline_s, 0.0
        while self.qemu.pid() is not None:
            if time.monotonic() >= deadline:
                return False
            if time.monotonic() - pressed >= PRESS_AGAIN_S:
                pressed = time.monotonic()
                self.press_power_button()
            time.sleep(0.05)
        return True

    def press_power_button(self) -> None:
        """Once, and come back. A guest that has not loaded its button driver yet misses it. Off already is success."""
        with self._locked():
            self.qemu.intend(Intent.OFF)
        if self.qemu.pid() is not None:
            self.qemu.command("system_powerdown")

    def power_off(self) -> None:
        """Cut the power: the guest gets no warning. Off already is success."""
        with self._locked():
            self.qemu.quit()

    def is_running(self) -> bool:
        return self.status() is VmStatus.RUNNING

    def status(self) -> VmStatus:
        return self.qemu.status()

    def destroy(self) -> None:
        """Kill QEMU and remove everything."""
        self.qemu.end()
        shutil.rmtree(self.dir, ignore_errors=True)

    # --- snapshots

    @property
    def disks(self) -> int:
        return len(self.config.sizes)

    def snapshots(self) -> list[str]:
        """Names of the snapshots that were not dropped, oldest first."""
        with self._locked() as layers:
            return [name for name in layers.frozen if name not in layers.dropped]

    def freeze(self, name: str) -> None:
        """Freeze all disks at one moment under `name`. The same name again is success and changes nothing."""
        with self._locked() as layers:
            if name in layers.frozen:
                return
            self._save(replace(layers, pending=name))
            try:
                if self.qemu.pid() is not None:
                    self._freeze_running(layers)
                else:
                    self._freeze_off(layers)
            except QmpError:
                self._save(layers)  # refused as a whole: no disk was switched
                raise
            self._save(replace(layers, frozen=(*layers.frozen, name)))
        log.info("lab VM %s: layer %d frozen as %s", self.config.name, layers.active, name)

    def drop(self, name: str) -> None:
        """Forget a snapshot; its files stay in the chain. An unknown name is success."""
        with self._locked() as layers:
            if name in layers.frozen and name not in layers.dropped:
                self._save(replace(layers, dropped=(*layers.dropped, name)))

    def layers(self, disk: int, frozen: str | None = None) -> list[LayerFile]:
        """The files of a disk, base first, up to the layer frozen as `frozen` (default: up to the active one)."""
        with self._locked() as layers:
            top = layers.active if frozen is None else self._index(layers, frozen)
            return [LayerFile(self._file(disk, index), _format(index), index) for index in range(top + 1)]

    # --- exports, of a frozen disk; they may run while the guest does

    def export_raw(self, disk: int, frozen: str, out: Path) -> None:
        """The disk as a sparse raw file."""
        write_raw(self.layers(disk, frozen), out)

    def export_base(self, disk: int, frozen: str, out: Path) -> None:
        """The disk as a dynamic VHD. Exported twice it is the same, byte for byte, but for the time stamp."""
        write_base(self.layers(disk, frozen), out, unique_id=self.export_id(disk, frozen))

    def export_delta(self, disk: int, since: str, frozen: str, out: BinaryIO) -> None:
        """What changed between two snapshots as a differencing VHD, streamed; the older one's export id is its parent."""
        chain, older = self.layers(disk, frozen), self.layers(disk, since)[-1].index
        if older > chain[-1].index:
            raise LabError(f"snapshot {since!r} is newer than {frozen!r}", where=self.config.name)
        write_delta(
            chain,
            out,
            since=older,
            size=self.config.sizes[disk],
            unique_id=self.export_id(disk, frozen),
            parent_id=self.export_id(disk, since),
        )

    def export_id(self, disk: int, frozen: str) -> uuid.UUID:
        """The id of a frozen disk, the same in every export of it."""
        return uuid.uuid5(uuid.UUID(self.config.uuid), f"{disk} {frozen}")

    # --- the inside

    def _index(self, layers: Layers, name: str) -> int:
        if name not in layers.frozen or name in layers.dropped:
            raise LabError(f"the lab VM has no snapshot {name!r}", where=str(self.dir))
        return layers.frozen.index(name)

    def _freeze_running(self, layers: Layers) -> None:
        top = layers.active
        for disk in range(self.disks):
            self._file(disk, top + 1).unlink(missing_ok=True)
        actions = [
            {
                "type": "blockdev-snapshot-sync",
                "data": {
                    "node-name": _node(disk, top),
                    "snapshot-node-name": _node(disk, top + 1),
                    "snapshot-file": str(self._file(disk, top + 1)),
                    "format": "qcow2",
                },
            }
            for disk in range(self.disks)
        ]
        with self.qemu.qmp() as qmp:
            qmp.execute("transaction", {"actions": actions})

    def _freeze_off(self, layers: Layers) -> None:
        top = layers.active
        for disk in range(self.disks):
            new = self._file(disk, top + 1)
            beside = new.with_suffix(".new")
            run_program(
                ["qemu-img", "create", "-q", "-f", "qcow2", "-F", _format(top), "-b", str(self._file(disk, top)), str(beside)],
                package="qemu-utils",
            )
            beside.rename(new)

    def _settle(self, layers: Layers) -> Layers:
        """A snapshot that was begun by a process that died: taken by all disks or by none; see which.

        An overlay that exists but holds nothing is as good as one the snapshot made: what is below it is complete."""
        if layers.pending is None:
            return layers
        if self.qemu.pid() is not None:
            with self.qemu.qmp() as qmp:
                names = {node.get("node-name") for node in qmp.execute("query-named-block-nodes", {"flat": True})}
            taken = _node(0, layers.active + 1) in names
        else:
            taken = all(self._file(disk, layers.active + 1).exists() for disk in range(self.disks))
        settled = replace(layers, frozen=(*layers.frozen, layers.pending) if taken else layers.frozen, pending=None)
        self._save(settled)
        return settled

    def _file(self, disk: int, layer: int) -> Path:
        if not 0 <= disk < self.disks:
            raise LabError(f"the lab VM has no disk {disk}", where=str(self.dir))
        return self.dir / f"disk{disk}-{layer}.{_format(layer)}"

    def _options(self, layers: Layers) -> list[str]:
        config = self.config
        argv = [
            *("-uuid", config.uuid, "-machine", f"pc,accel={config.accel}", "-cpu", "max"),
            *("-m", str(config.memory // MiB), "-smp", str(config.vcpus), "-nodefaults", "-no-user-config", "-no-reboot"),
            *("-display", "none", "-vga", "none"),
            *("-chardev", "file,id=serial,path=serial.log,append=on", "-serial", "chardev:serial"),
        ]
        if config.command_line is not None:
            argv += ["-kernel", str(self.dir / "vmlinuz"), "-initrd", str(self.dir / "initrd.img")]
            argv += ["-append", config.command_line]
        for disk in range(self.disks):
            node, top = _node(disk, layers.active), layers.active
            options = {
                "driver": _format(top),
                "node-name": node,
                "file": {"driver": "file", "filename": str(self._file(disk, top))},
            }
            argv += ["-blockdev", json.dumps(options)]
            argv += ["-device", f"ide-hd,drive={node},bus=ide.{disk // 2},unit={disk % 2},serial=LAB{disk}"]
        for number, mac in enumerate(config.macs):
            argv += ["-netdev", f"user,id=net{number}", "-device", f"virtio-net-pci,netdev=net{number},mac={mac},romfile="]
        return argv

    @contextmanager
    def _locked(self) -> Iterator[Layers]:
        with (self.dir / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            kept = json.loads((self.dir / "layers.json").read_text())
            yield self._settle(Layers(tuple(kept["frozen"]), tuple(kept["dropped"]), kept["pending"]))

    def _save(self, layers: Layers) -> None:
        _replace_json(self.dir / "layers.json", asdict(layers))


def mac_of(identity: str) -> str:
    """A MAC in QEMU's range, the same for the same text."""
    tail = uuid.uuid5(_NAMESPACE, identity).bytes[:3]
    return "52:54:00:" + ":".join(f"{byte:02x}" for byte in tail)


def _format(layer: int) -> str:
    return "qcow2" if layer else "raw"


def _node(disk: int, layer: int) -> str:
    return f"d{disk}l{layer}"


def _replace_json(path: Path, content: object) -> None:
    beside = path.with_name(f"{path.name}.new")
    beside.write_text(json.dumps(content))
    beside.replace(path)
