"""The Linux micro-morph: an initramfs that finds KVM's disks, without running anything of the guest.

    plan    before the cutover, on any state of the disks: which initramfs gets which segment, and what they look like now
    ready   in a launched appliance that waits for the last delta: whatever can be done before it
    apply   inside the downtime: look that all is as planned, append, write

`apply` checks everything before it writes anything, and finds out for itself what an earlier try has done. It writes in
place: to an overlay whose commit is all or nothing (morph_store.py), so a copy beside and a rename would guard nothing and
cost the reading and writing of each whole initramfs, its undo log and its commit, in the downtime.
"""

from __future__ import annotations

import logging
import posixpath
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from tokvm.core.text import readable
from tokvm.core.units import KiB, MiB, format_bytes, seconds_since
from tokvm.guest import durable
from tokvm.guest.appliance import Appliance
from tokvm.guest.base import GuestError, GuestFacts
from tokvm.guest.drives import VIRTIO, buses_of_kernel, drives_virtio
from tokvm.guest.initrd.modules import BUS, DISKS
from tokvm.guest.linux_initrd import Extended, extend, linux_of, mounted, mounts_that_matter, read_if_there, stamp
from tokvm.guest.micro_plan import MicroPlan, PlannedFile, PlannedInitrd, link_files, sha256

log = logging.getLogger(__name__)

SMALL_FILE = 256 * KiB
SPARE = 1 * MiB
MODULES_FILE = "/etc/initramfs-tools/modules"
_DRIVERS = (BUS, *DISKS)
_SNIPPETS = {
    "dracut": ("/etc/dracut.conf.d/tokvm.conf", f'add_drivers+=" {" ".join(_DRIVERS)} "\n'),
    "mkinitcpio": ("/etc/mkinitcpio.conf.d/tokvm.conf", f"MODULES+=({' '.join(_DRIVERS)})\n"),
}


def plan(appliance: Appliance, facts: GuestFacts, store: Path, *, names: Mapping[str, str] | None = None) -> MicroPlan:
    """What makes this guest boot from virtio, and keep its NICs' names; its segments are put into `store` (a folder of ours),
    on the medium. Nothing may be mounted. `names`: MAC address → name of the NIC, for those that shall keep one. GuestError
    when the default kernel's initramfs cannot be extended; other kernels that cannot are `left_out`."""
    started = time.monotonic()
    linux = linux_of(facts)
    mounts = mounts_that_matter(facts.mounts)
    if not linux.kernels:
        raise GuestError("no kernel was found in the guest", where=facts.root)
    initrds, left_out = [], []
    with mounted(appliance, mounts):
        for kernel in linux.kernels:
            if set(VIRTIO) <= set(buses_of_kernel(kernel)):
                continue
            try:
                extended = extend(appliance, kernel, facts.arch)
            except GuestError as refused:
                if drives_virtio(kernel):
                    continue
                if kernel == linux.default_kernel:
                    raise
                left_out.append(f"{kernel.version}: {readable(refused.what)}")
                continue
            if extended.segment is not None:
                initrds.append(_planned(extended, kernel.version, store))
        files = [*_for_next_time(appliance, linux.generator, needed=bool(initrds)), *_links(appliance, names or {})]
        folders = {folder: _names(appliance, folder) for folder in _folders(initrds)}
    return MicroPlan(
        mounts=_touched(mounts, [*(one.path for one in initrds), *(one.path for one in files)]),
        initrds=tuple(initrds),
        files=tuple(files),
        folders=folders,
        left_out=tuple(left_out),
        seconds=seconds_since(started),
    )


def ready(appliance: Appliance, plan: MicroPlan) -> None:
    """What `apply` would otherwise wait for: the drivers of the guest's file systems. Call it before `appliance.forget()`.

    It mounts nothing. A mount replays a journal, and what that wrote into an overlay would hide the last delta below it."""
    with appliance.translated("cannot make the appliance ready"):
        kinds = {appliance.g.vfs_type(device) for device in plan.mounts.values()}
        for kind in sorted(kinds):
            with suppress(RuntimeError):  # built in
                appliance.g.modprobe(kind)


def check(appliance: Appliance, plan: MicroPlan) -> None:
    """Would `apply` find everything as it was planned? GuestError when not. Nothing is written; nothing may be mounted."""
    with mounted(appliance, plan.mounts):
        _check_room(appliance, [one for one in plan.initrds if not _has_segment(appliance, one)])
        for file in plan.files:
            _has_content(appliance, file)
        _check_folders(appliance, plan.folders)


def apply(appliance: Appliance, plan: MicroPlan, store: Path) -> None:
    """Do what was planned; twice is the same as once. Nothing may be mounted. GuestError before anything is written when a file
    is not as it was, a kernel came or went, or there is no room; after that, the disks' overlay is what undoes it."""
    segments = plan.segments(store)
    with mounted(appliance, plan.mounts):
        initrds = [one for one in plan.initrds if not _has_segment(appliance, one)]
        files = [one for one in plan.files if not _has_content(appliance, one)]
        _check_folders(appliance, plan.folders)
        _check_room(appliance, initrds)
        for file in files:
            _write(appliance, file)
        for one in initrds:
            _append(appliance, one, segments[one.segment])
    log.info("%d initramfs files extended, %d files written", len(initrds), len(files))


def _planned(extended: Extended, version: str, store: Path) -> PlannedInitrd:
    assert extended.segment is not None
    content = extended.segment.content
    digest = sha256(content)
    name = f"segment-{digest[:16]}.cpio"
    durable.write_file(store / name, content)
    return PlannedInitrd(
        version=version,
        path=extended.path,
        size=len(extended.content),
        mtime_ns=extended.mtime_ns,
        sha256=sha256(extended.content),
        offset=extended.segment.offset,
        segment=name,
        segment_size=len(content),
        segment_sha256=digest,
        added=extended.segment.added,
    )


def _for_next_time(appliance: Appliance, generator: str, *, needed: bool) -> list[PlannedFile]:
    """What keeps virtio in the initramfs when the guest builds it anew."""
    if not needed:
        return []
    if generator == "initramfs-tools" and _has_folder(appliance, MODULES_FILE):
        old = read_if_there(appliance, MODULES_FILE, SMALL_FILE)
        text = (old or b"").decode("utf-8", "surrogateescape")
        there = {word for line in text.splitlines() for word in line.split("#")[0].split()[:1]}
        lines = [name for name in _DRIVERS if name not in there]
        if not lines:
            return []
        ended = text if text.endswith("\n") or not text else f"{text}\n"
        content = ended + "# added by tokvm: the disks of KVM\n" + "".join(f"{name}\n" for name in lines)
        return [PlannedFile(MODULES_FILE, content, sha256(old) if old is not None else "")]
    if generator in _SNIPPETS:
        return _if_folder(appliance, PlannedFile(*_SNIPPETS[generator]))
    return []


def _links(appliance: Appliance, names: Mapping[str, str]) -> list[PlannedFile]:
    return [file for one in link_files(names) for file in _if_folder(appliance, one)]


def _if_folder(appliance: Appliance, file: PlannedFile) -> list[PlannedFile]:
    """The file over what is there now; nothing where its folder is missing, for then nobody would read it."""
    if not _has_folder(appliance, file.path):
        return []
    old = read_if_there(appliance, file.path, SMALL_FILE)
    return [PlannedFile(file.path, file.content, sha256(old) if old is not None else "")]


def _has_folder(appliance: Appliance, path: str) -> bool:
    with appliance.translated("cannot look for a folder"):
        return bool(appliance.g.is_dir(posixpath.dirname(path), followsymlinks=True))


def _folders(initrds: Iterable[PlannedInitrd]) -> list[str]:
    return sorted({posixpath.dirname(one.path) for one in initrds})


def _names(appliance: Appliance, folder: str) -> tuple[str, ...]:
    with appliance.translated(f"cannot list {folder!r}"):
        return tuple(appliance.g.ls(folder))


def _touched(mounts: Mapping[str, str], paths: Iterable[str]) -> dict[str, str]:
    """The root, and the mount points that some of the paths lie on: each one less is time saved in the window."""
    found = {_mount_of(mounts, path) for path in paths}
    return {point: device for point, device in mounts.items() if point == "/" or any(_is_below(one, point) for one in found)}


def _mount_of(mounts: Mapping[str, str], path: str) -> str:
    return max((point for point in mounts if _is_below(path, point)), key=len, default="/")


def _is_below(path: str, point: str) -> bool:
    return path == point or path.startswith(point.rstrip("/") + "/")


def _changed(what: str, where: str) -> GuestError:
    return GuestError(f"the guest's boot files changed since the rehearsal: {what}", where=where, fix="rehearse again")


def _has_segment(appliance: Appliance, one: PlannedInitrd) -> bool:
    """False: it is as it was planned. True: an earlier try appended the segment."""
    size, mtime_ns = stamp(appliance, one.path)
    if (size, mtime_ns) == (one.size, one.mtime_ns):
        return False
    if size == one.new_size and sha256(appliance.read_between(one.path, one.offset, one.new_size)) == one.segment_sha256:
        return True
    raise _changed(f"{size} bytes of {mtime_ns} ns, not {one.size} of {one.mtime_ns}", one.path)


def _has_content(appliance: Appliance, file: PlannedFile) -> bool:
    found = read_if_there(appliance, file.path, SMALL_FILE)
    if found == _encoded(file):
        return True
    if (sha256(found) if found is not None else "") != file.old_sha256:
        raise _changed("this file has other content", file.path)
    return False


def _check_folders(appliance: Appliance, folders: Mapping[str, tuple[str, ...]]) -> None:
    for folder, names in folders.items():
        other = set(_names(appliance, folder)).symmetric_difference(names)
        if other:
            raise _changed(f"{readable(', '.join(sorted(other)))} came or went", folder)


def _check_room(appliance: Appliance, initrds: Iterable[PlannedInitrd]) -> None:
    needed: dict[str, int] = {}
    for one in initrds:
        folder = posixpath.dirname(one.path)
        needed[folder] = needed.get(folder, SPARE) + one.segment_size
    for folder, size in needed.items():
        with appliance.translated(f"cannot see how much room {folder!r} has"):
            found = appliance.g.statvfs(folder)
        free = int(found["bavail"]) * int(found["frsize"])
        if free < size:
            raise GuestError(
                f"{readable(folder)} has {format_bytes(free)} free, {format_bytes(size)} needed for the longer initramfs files",
                where=folder,
                fix="remove old kernels in the guest, or take another way than micro",
            )


def _append(appliance: Appliance, one: PlannedInitrd, segment: bytes) -> None:
    appliance.write_at(one.path, segment, one.offset)
    if stamp(appliance, one.path)[0] != one.new_size:
        raise _changed("it grew while it was written", one.path)


def _write(appliance: Appliance, file: PlannedFile) -> None:
    appliance.write(file.path, _encoded(file))
    if not file.old_sha256:
        # SELinux' label of new files is their folder's; the appliance has no policy that would say so.
        with appliance.translated(f"cannot write {file.path!r}"):
            appliance.g.copy_attributes(posixpath.dirname(file.path), file.path, xattributes=True)


def _encoded(file: PlannedFile) -> bytes:
    return file.content.encode("utf-8", "surrogateescape")
