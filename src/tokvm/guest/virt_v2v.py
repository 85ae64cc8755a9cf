"""virt-v2v-in-place: the whole conversion, on overlays only. It is not transactional: a failure leaves disks that are no use.

    conversion_xml ─► LOG.xml ─► virt-v2v-in-place -i libvirtxml --machine-readable=stream:stdout
                                     stdout: {"message": …, "type": "message" | "warning" | "error"} ─► on_step
                                     both    ─► LOG, bounded

What it can do is asked (`--machine-readable` alone lists it), never concluded from its version. Manual: virt-v2v-in-place(1),
virt-v2v(1) "MACHINE READABLE OUTPUT". Tried with 2.2.0.
"""

from __future__ import annotations

import json
import logging
import os
import select
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tokvm.core.machine import VirtualMachine
from tokvm.core.text import readable
from tokvm.core.units import MiB
from tokvm.guest import durable
from tokvm.guest.base import GuestDisk, GuestError
from tokvm.guest.libvirt_xml import conversion_xml
from tokvm.guest.v2v_failures import failure
from tokvm.remote import process
from tokvm.remote.process import ProgramError

log = logging.getLogger(__name__)

PROGRAM = "virt-v2v-in-place"
LOG_LIMIT = 16 * MiB
LINE_LIMIT = MiB
ROOM = 16 * MiB
_PROBE_S = 60.0
_LOOK_S = 0.5
FIX_INSTALL = "install virt-v2v (Debian, Ubuntu, Fedora: package virt-v2v); or use a way that does not need it: --way micro"


def _note(step: str) -> None:
    log.info("%s: %s", PROGRAM, step)


@dataclass(frozen=True, slots=True)
class Converted:
    """seconds: how long each step took, in order, by the program's own words. warnings: what it said of the guest."""

    seconds: dict[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class VirtV2v:
    """A conversion, ready to run. vm: what is said of the machine. log: a new file in a folder of ours.

    root: the root file system's device as libguestfs calls it; without it, or on a btrfs subvolume, there must be only one.
    tcg: KVM does not work here. virtio_win: directory or ISO of Windows drivers; virt_tools: directory with rhsrvany.exe
    (without them virt-v2v looks in its own places). block_driver: `virtio-blk` or `virtio-scsi`, for Windows, where the program
    has the option."""

    program: str
    vm: VirtualMachine
    log: Path
    tcg: bool = False
    root: str | None = None
    virtio_win: str | None = None
    virt_tools: str | None = None
    block_driver: str | None = None
    deadline_s: float = 3600.0
    on_step: Callable[[str], None] = _note

    def convert(self, disks: Sequence[GuestDisk]) -> Converted:
        """Convert the guest on these overlays. GuestError with the line that matters; the log stays."""
        argv = self._command(features(self.program))
        xml = Path(argv[-1])
        durable.write_file(xml, conversion_xml(self.vm, disks))
        try:
            child = process.start(argv, where=PROGRAM, env=self._environment())
        except ProgramError as exc:
            raise GuestError(exc.what, where=exc.where, fix=exc.fix or FIX_INSTALL) from exc
        with child, _Log(self.log) as kept:
            found = _Watch(child, kept, self.log, self.on_step).until_end(self.deadline_s)
        xml.unlink(missing_ok=True)
        return found

    def _command(self, able: frozenset[str]) -> list[str]:
        # 2.2 takes no name of a btrfs subvolume ("unknown --root option"). "single" refuses where there are several systems.
        root = self.root if self.root and self.root.startswith("/dev/") else "single"
        found = [self.program, "-i", "libvirtxml", "--machine-readable=stream:stdout", "--root", root]
        if self.block_driver and "block-driver-option" in able:
            found += ["--block-driver", self.block_driver]
        return [*found, "--", str(self.log.with_suffix(".xml"))]

    def _environment(self) -> dict[str, str]:
        """No secrets. What the caller's environment says about libguestfs must not decide how it runs."""
        found = {"LC_ALL": "C", "LIBGUESTFS_BACKEND": "direct", "LIBGUESTFS_DEBUG": "0", "LIBGUESTFS_TRACE": "0"}
        found["LIBGUESTFS_BACKEND_SETTINGS"] = "force_tcg" if self.tcg else ""
        if self.virtio_win:
            found["VIRTIO_WIN"] = self.virtio_win
        if self.virt_tools:
            found["VIRT_TOOLS_DATA_DIR"] = self.virt_tools
        return found


def find_virt_v2v() -> str | None:
    """The program's path; None when it is not installed."""
    try:
        return process.which(PROGRAM)
    except ProgramError:
        return None


def features(program: str) -> frozenset[str]:
    """What this program can do. GuestError: it does not say, or cannot do what is needed."""
    try:
        done = process.run([program, "--machine-readable"], timeout_s=_PROBE_S, where=PROGRAM)
    except ProgramError as exc:
        raise GuestError(exc.what, where=exc.where, fix=exc.fix or FIX_INSTALL) from exc
    found = frozenset(line.strip() for line in done.text.splitlines())
    if done.code != 0 or "input:libvirtxml" not in found:
        raise GuestError("it does not say that it can convert by libvirt's XML", where=PROGRAM, fix=FIX_INSTALL)
    return found


class _Log:
    """The program's words, up to LOG_LIMIT bytes; a full file system is no reason to end a conversion."""

    def __init__(self, path: Path) -> None:
        with durable.storing(path):
            path.unlink(missing_ok=True)
            self._fd = durable.create(path)
        self._left = LOG_LIMIT

    def add(self, data: bytes) -> None:
        piece = data[: self._left]
        self._left -= len(piece)
        try:
            durable.write_all(self._fd, piece)
        except OSError as exc:
            log.warning("the log of %s is cut: %s", PROGRAM, exc.strerror)
            self._left = 0

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


class _Watch:
    """One run of the program, from its start to its end or its deadline."""

    def __init__(self, child: process.Child, kept: _Log, path: Path, on_step: Callable[[str], None]) -> None:
        self._child = child
        self._kept = kept
        self._path = path
        self._on_step = on_step
        self._rest = b""
        self._step = ""
        self._since = time.monotonic()
        self._seconds: dict[str, float] = {}
        self._warnings: list[str] = []
        self._errors: list[str] = []
        self._stderr = b""

    def until_end(self, deadline_s: float) -> Converted:
        deadline = time.monotonic() + deadline_s
        while self._take():
            if time.monotonic() > deadline:
                self._child.kill()
                raise self._broken_off(
                    f"{PROGRAM} did not end within {deadline_s:g} s and was killed", "give a longer --deadline"
                )
            self._refuse_full()
        code = self._child.wait(max(1.0, deadline - time.monotonic()))
        self._keep_stderr()
        self._next_step("")
        if code != 0:
            said = self._errors or self._stderr.decode("utf-8", "replace").splitlines()
            raise failure(said, code, log=str(self._path))
        return Converted(self._seconds, tuple(self._warnings))

    def _take(self) -> bool:
        """Whatever it says now; False at the end of its output."""
        ready, _, _ = select.select([self._child.stdout], [], [], _LOOK_S)
        self._keep_stderr()
        if not ready:
            return True
        piece = os.read(self._child.stdout, 65536)
        self._kept.add(piece)
        *lines, self._rest = (self._rest + piece).split(b"\n")
        self._rest = self._rest[-LINE_LIMIT:]
        for line in lines:
            self._line(line)
        return bool(piece)

    def _line(self, line: bytes) -> None:
        if not line.startswith(b"{"):
            return
        try:
            said = json.loads(line)
            kind, text = str(said["type"]), readable(" ".join(str(said["message"]).split()), limit=1000)
        except (ValueError, KeyError, TypeError, RecursionError):
            return
        if kind == "message":
            self._next_step(text)
            self._on_step(text)
        elif kind in ("warning", "error"):
            into = self._warnings if kind == "warning" else self._errors
            del into[:-50]
            into.append(text)

    def _next_step(self, text: str) -> None:
        now = time.monotonic()
        if self._step and len(self._seconds) < 100:
            self._seconds[self._step] = round(now - self._since, 2)
        self._step, self._since = text, now

    def _keep_stderr(self) -> None:
        said = self._child.take_stderr()
        if said:
            self._kept.add(said)
            self._stderr = (self._stderr + said)[-LINE_LIMIT:]

    def _refuse_full(self) -> None:
        """QEMU stops its guest where an overlay cannot grow, and nothing more would happen until the deadline."""
        found = os.statvfs(self._path.parent)
        if found.f_bavail * found.f_frsize < ROOM:
            self._child.kill()
            raise self._broken_off("there is no room left for the overlays", "make room there, then run the command again")

    def _broken_off(self, what: str, fix: str) -> GuestError:
        return GuestError(f"{what} (in: {self._step or 'its start'})", where=str(self._path), fix=fix)
