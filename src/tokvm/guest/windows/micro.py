"""The Windows micro-morph: virtio storage that starts at boot, and the rest left to the guest's first boot.

    plan    before the cutover, on any state of the disks: which drivers, what the first boot does
    ready   in a launched appliance that waits for the last delta
    check   would `apply` find what was planned?
    apply   inside the downtime: two driver files, the first boot's folder, a dozen keys in the SYSTEM hive

`apply` checks everything before it writes, and twice is the same as once. The hive is edited in its place, so that it keeps its
security descriptor; what undoes half an edit is the overlay below, which is also why no file is written beside and renamed.

Where the appliance is emulated, a call of hivex is a millisecond; what costs is that hivex writes the whole hive out (17 MiB:
8 to 10 s of CPU in ntfs-3g's 4 KiB steps, 5 s with big_writes) and the programs that calls start (mv, tar: 0.2 to 1 s each).
"""

from __future__ import annotations

import io
import logging
import os
import posixpath
import tarfile
import time
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path

from tokvm.core.machine import Finding, Severity
from tokvm.core.text import readable
from tokvm.core.units import MiB, seconds_since
from tokvm.guest import durable
from tokvm.guest.appliance import Appliance
from tokvm.guest.base import GuestError, GuestFacts, WindowsFacts
from tokvm.guest.linux_initrd import mounted
from tokvm.guest.micro_plan import sha256
from tokvm.guest.windows import first_boot, hive_edit
from tokvm.guest.windows.addresses import Adapter, static_adapters
from tokvm.guest.windows.driver_tree import Driver, DriverSet, find_drivers, target_of
from tokvm.guest.windows.micro_plan import MicroPlan, PlannedDriver, StoredFile
from tokvm.guest.windows.registry import Hive, control_set

log = logging.getLogger(__name__)

HIVE = "/System32/config/SYSTEM"
HIVE_LIMIT = 256 * MiB
DRIVER_LIMIT = 16 * MiB
READ_ONLY = 1
"""ST_RDONLY of statvfs(3)."""
WRITING = "big_writes,norecover"
"""ntfs-3g(8): up to 128 KiB in one step; and a journal in use is not cleared, as is its default for Windows before 8 (for later
ones it never does it): the volume is read-only then, which `_check_writable` sees."""
LOOKING = "ro"
FULL_STOP = "start the guest and shut it down for good: shutdown /s /f /t 0, with Fast Startup off (powercfg /h off)"
CHECK_DISK = "in the guest: chkdsk C: /f, restart it, then `tokvm sync` again"
TREES = ("/usr/share/virtio-win/virtio-win.iso", "/usr/share/virtio-win")


class Ground(Enum):
    """What the disks are. SHUT_DOWN: the guest's, after its last clean shutdown. THROW_AWAY: a rehearsal's copy of a running
    guest, whose NTFS journal may be reset and whose registry may be some seconds old, because nobody keeps it."""

    SHUT_DOWN = "shut down"
    THROW_AWAY = "throw-away copy"


def find_tree(given: str | None) -> Path:
    """The drivers: what the operator names, else $VIRTIO_WIN, else where Fedora's package puts them."""
    named = given or os.environ.get("VIRTIO_WIN")
    for path in [named] if named else TREES:
        if Path(path).exists():
            return Path(path)
    fix = "get the virtio-win ISO and name it by --virtio-win"
    raise GuestError("there are no virtio drivers for Windows on this host", where=named or ", ".join(TREES), fix=fix)


def plan(
    appliance: Appliance,
    facts: GuestFacts,
    store: Path,
    *,
    tree: Path | None = None,
    macs: Sequence[str] = (),
    remove_tools: bool = True,
) -> MicroPlan:
    """What makes this Windows boot from virtio; its files are put into `store` (a folder of ours), on the medium. Nothing may
    be mounted. macs: of the VM's NICs. remove_tools: the old hypervisor's. GuestError: no drivers for it, or it must not be
    written to."""
    started = time.monotonic()
    windows = _windows_of(facts)
    found = find_drivers(tree or find_tree(None), target_of(facts))
    _refuse_blockers(found.findings)
    mounts = {"/": facts.root}
    with mounted(appliance, mounts, LOOKING):
        hive_path = _hive(appliance, windows.systemroot)
        hive_sha256 = sha256(appliance.read(hive_path, HIVE_LIMIT))
        with Hive.open(appliance, hive_path) as hive:
            current, database = control_set(hive), hive_edit.has_database(hive)
            adapters, lost = static_adapters(hive, macs)
        places = {driver.name: _driver_path(appliance, windows.systemroot, driver.name) for driver in found.storage}
        old = {name: _old_driver(appliance, path) for name, path in places.items()}
    drivers = tuple(_planned(driver, old[driver.name], store) for driver in found.storage)
    runner = first_boot.find_runner()
    return MicroPlan(
        mounts=mounts,
        systemroot=windows.systemroot,
        control_set=current,
        build=windows.build,
        database=database,
        drivers=drivers,
        first_boot=_stored_first_boot(found, adapters, store, runner=runner, remove_tools=remove_tools),
        runner=runner is not None,
        hive_sha256=hive_sha256,
        left_out=tuple(readable(one.what) for one in (*found.findings, *lost)),
        seconds=seconds_since(started),
    )


def ready(appliance: Appliance, plan: MicroPlan) -> None:
    """What `apply` would otherwise wait for: the programs and modules of an NTFS mount. It mounts nothing of the guest's."""
    with appliance.translated("cannot make the appliance ready"):
        for device in plan.mounts.values():
            appliance.g.vfs_type(device)
        if not appliance.g.feature_available(["ntfs3g", "hivex"]):
            raise GuestError(
                "libguestfs' appliance has no NTFS driver or no hivex", where=appliance.where, fix="install libguestfs whole"
            )


def check(appliance: Appliance, plan: MicroPlan) -> None:
    """Is this still the guest that was planned for? GuestError when not. For a running guest's disks too; it writes nothing."""
    with mounted(appliance, plan.mounts, LOOKING):
        _check_drivers(appliance, plan)
        with Hive.open(appliance, _hive(appliance, plan.systemroot)) as hive:
            _check_hive(hive, plan)


def apply(appliance: Appliance, plan: MicroPlan, store: Path, ground: Ground = Ground.SHUT_DOWN) -> None:
    """Do what was planned; twice is the same as once. Nothing may be mounted. GuestError before anything is written when the
    guest is not as it was planned for or was not shut down for good; after that, the disks' overlay is what undoes it. Closing
    the appliance flushes it all."""
    drivers = {driver.service: driver.stored.read(store) for driver in plan.drivers}
    first = _unpacked(plan.first_boot.read(store))
    if ground is Ground.THROW_AWAY:
        _reset_journal(appliance, plan.mounts)
    with mounted(appliance, plan.mounts, WRITING):
        _check_writable(appliance)
        hive_path = _hive(appliance, plan.systemroot)
        if ground is Ground.SHUT_DOWN:
            with appliance.translated("cannot read the registry"):
                head = bytes(appliance.g.pread(hive_path, hive_edit.BASE_BLOCK, 0))
            hive_edit.check_base_block(head, hive_path)
        places = _check_drivers(appliance, plan)
        with Hive.open(appliance, hive_path, write=True) as hive:
            _check_hive(hive, plan)
            _write_first_boot(appliance, hive_path[: -len(HIVE)], first)
            for service, content in drivers.items():
                appliance.write(places[service], content)
            hive_edit.make_boot_start(hive, plan.control_set, drivers)
            inbox = hive_edit.enable_inbox(hive, plan.control_set)
            first_boot.add_service(hive, plan.control_set, with_runner=plan.runner)
            hive.commit()
    log.info("boot-start drivers: %s; of its own: %s", ", ".join(drivers), ", ".join(inbox))


def _windows_of(facts: GuestFacts) -> WindowsFacts:
    if facts.windows is None or not facts.windows.systemroot:
        raise GuestError("this guest is no Windows", fix="choose another way")
    if facts.windows.hibernated:
        raise GuestError("Windows is hibernated; its disk must not be written to", where="hiberfil.sys", fix=FULL_STOP)
    if facts.windows.dirty:  # on a rehearsal's copy nobody would notice: its journal is reset, whatever state it is in
        raise GuestError("the Windows volume is marked dirty; its disk must not be written to", where="C:", fix=CHECK_DISK)
    return facts.windows


def _refuse_blockers(findings: Sequence[Finding]) -> None:
    for one in findings:
        if one.severity is Severity.BLOCKER:
            raise GuestError(one.what, where=one.where, fix=one.fix)


def _planned(driver: Driver, old_sha256: str, store: Path) -> PlannedDriver:
    content = driver.file(".sys")
    if content is None:
        raise GuestError(f"the driver {driver.name} has no .sys file", fix="take the drivers from a virtio-win ISO as it is")
    return PlannedDriver(driver.name, _stored(content, driver.name, ".sys", store), old_sha256)


def _stored(content: bytes, stem: str, suffix: str, store: Path) -> StoredFile:
    digest = sha256(content)
    name = f"{stem}-{digest[:16]}{suffix}"
    durable.write_file(store / name, content)
    return StoredFile(name, len(content), digest)


def _stored_first_boot(
    found: DriverSet, adapters: Sequence[Adapter], store: Path, *, runner: bytes | None, remove_tools: bool
) -> StoredFile:
    made = first_boot.files(found, adapters, runner=runner, remove_tools=remove_tools)
    return _stored(_tar(made), "first-boot", ".tar", store)


def _tar(files: Mapping[str, bytes]) -> bytes:
    """Below first_boot.FOLDER; the same files give the same bytes."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in sorted(files.items()):
            member = tarfile.TarInfo(f"{first_boot.FOLDER}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return out.getvalue()


def _unpacked(packed: bytes) -> dict[str, bytes]:
    """What `_tar` packed."""
    with tarfile.open(fileobj=io.BytesIO(packed), mode="r:") as tar:
        return {member.name: file.read() for member in tar if (file := tar.extractfile(member)) is not None}


def _hive(appliance: Appliance, systemroot: str) -> str:
    return _path(appliance, systemroot + HIVE)


def _driver_path(appliance: Appliance, systemroot: str, service: str) -> str:
    return _path(appliance, f"{systemroot}/System32/drivers/{service}.sys")


def _path(appliance: Appliance, path: str) -> str:
    """As the file system spells it: ntfs-3g minds the case. The last name need not be there."""
    with appliance.translated(f"cannot find {path!r}"):
        return str(appliance.g.case_sensitive_path(path))


def _old_driver(appliance: Appliance, path: str) -> str:
    with appliance.translated(f"cannot look for {path!r}"):
        there = bool(appliance.g.is_file(path))
    return sha256(appliance.read(path, DRIVER_LIMIT)) if there else ""


def _check_drivers(appliance: Appliance, plan: MicroPlan) -> dict[str, str]:
    """Service → path of its driver, as the file system spells it."""
    places = {driver.service: _driver_path(appliance, plan.systemroot, driver.service) for driver in plan.drivers}
    for driver in plan.drivers:
        now = _old_driver(appliance, places[driver.service])
        if now not in (driver.old_sha256, driver.stored.sha256):
            raise _changed(f"{driver.service}.sys is another file now", appliance.where)
    return places


def _check_hive(hive: Hive, plan: MicroPlan) -> None:
    current = control_set(hive)
    if current != plan.control_set:
        raise _changed(f"its control set is {current}, not {plan.control_set}", hive.path)
    if hive_edit.has_database(hive) != plan.database:
        raise _changed("it keeps its drivers' database elsewhere", hive.path)


def _changed(what: str, where: str) -> GuestError:
    return GuestError(f"the guest changed since the rehearsal: {what}", where=where, fix="rehearse again")


def _reset_journal(appliance: Appliance, mounts: Mapping[str, str]) -> None:
    with appliance.translated("cannot reset the journal of the copy's NTFS"):
        for device in mounts.values():
            appliance.g.ntfsfix(device)


def _check_writable(appliance: Appliance) -> None:
    """ntfs-3g mounts a hibernated volume, and (by WRITING) one whose journal is in use, read-only, without an error."""
    with appliance.translated("cannot look at the mounted file system"):
        flags = int(appliance.g.statvfs("/")["flag"])
    if flags & READ_ONLY:
        raise GuestError(
            "Windows is hibernated, or was not shut down cleanly: its disk must not be written to",
            where=appliance.where,
            fix=FULL_STOP,
        )


def _write_first_boot(appliance: Appliance, systemroot: str, files: Mapping[str, bytes]) -> None:
    places = {f"{systemroot}/{name}": content for name, content in files.items()}
    with appliance.translated("cannot make the first boot's folder"):
        for folder in sorted({posixpath.dirname(path) for path in places}):
            appliance.g.mkdir_p(folder)
    for path, content in places.items():
        appliance.write(path, content)
