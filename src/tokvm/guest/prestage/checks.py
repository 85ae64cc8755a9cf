"""May this guest be prepared, and was it? Pure: reports in, GuestError out."""

from __future__ import annotations

import posixpath

from tokvm.core.text import readable
from tokvm.core.units import format_bytes
from tokvm.guest.base import GuestError
from tokvm.guest.linux_micro import SPARE
from tokvm.guest.prestage.report import Kernel, Report, Seen
from tokvm.guest.prestage.talk import WINDOWS

OTHER_WAY = "leave the guest as it is and choose another --way (`tokvm rehearse` finds one)"
_REFUSED = {
    "no-root": (
        "the login is not root, and `sudo -n` does not make it root",
        "log in as root, or let this user run sudo without a password meanwhile",
    ),
    "no-room": ("the guest could not make a folder in its /run", "make room there"),
    "busy": ("an earlier rebuild is still at work in the guest", "run this again when it has ended; it looks first"),
    "no-folder": (
        "its generator reads no folder of configuration files",
        "add virtio_pci, virtio_blk and virtio_scsi to the generator's own configuration by hand, and rebuild",
    ),
    "unwritable": ("the generator's configuration could not be written; it is as it was", "is /etc read-only, or full?"),
}


def refuse_unfit(found: Report, *, where: str) -> None:
    """GuestError for a guest that cannot or must not be prepared; `found` is of a look. One that needs nothing passes."""
    _refuse_script(found, where)
    if not found.before:
        raise GuestError(_nothing_to_rebuild(found), where=where, fix=OTHER_WAY)
    if found.generator == "none":
        raise GuestError("none of initramfs-tools, dracut and mkinitcpio is there, with its lister", where=where, fix=OTHER_WAY)
    signed = [one.initrd for one in found.before if one.seen is Seen.SIGNED]
    if signed:
        raise GuestError(f"{signed[0]} is signed: a rebuilt one would not boot", where=where, fix=OTHER_WAY)
    hopeful = [one for one in found.before if not one.hopeless]
    if not hopeful or any(one.hopeless and one.version == found.running for one in found.before):
        raise GuestError("the guest's kernel has no virtio drivers", where=where, fix="install a kernel that has them")
    if any(one.lacks for one in hopeful):
        _refuse_full(found.before, where)


def refuse_undone(found: Report, *, where: str) -> None:
    """GuestError when the rebuild did not do what it was for; `found` is of PREPARE."""
    _refuse_script(found, where)
    stuck = [path for path, state in found.config if state == "stuck"]
    undone = f"{stuck[0]} could NOT be put back: do that by hand" if stuck else "its configuration is as it was"
    broken = [one.version for one in found.after if one.seen is Seen.UNREADABLE]
    danger = f"; the initramfs of {', '.join(broken)} CANNOT BE READ: rebuild it before the guest restarts" if broken else ""
    fix = "log in and mend its rebuild, then run this again; or choose another --way"
    if found.rebuilt is None:
        raise GuestError("the guest was not rebuilt, and did not say why", where=where, fix=fix)
    if found.rebuilt != 0:
        said = f": {readable(found.said[-1])}" if found.said else ""
        what = f"{found.generator} failed with exit code {found.rebuilt}{said}"
        raise GuestError(f"{what}; {undone}{danger}", where=where, fix=fix)
    lacking = [f"{one.version} ({', '.join(one.lacks)})" for one in found.after if one.lacks]
    if lacking or not found.after or broken:
        what = (
            f"{found.generator} said that it went well, but virtio is still missing for {', '.join(lacking) or 'every kernel'}"
        )
        raise GuestError(f"{what}; {undone}{danger}", where=where, fix=fix)


def _refuse_script(found: Report, where: str) -> None:
    """What the script itself would not do."""
    if found.refused == "no-linux":
        fix = WINDOWS if found.system.startswith(("MINGW", "MSYS", "CYGWIN")) else OTHER_WAY
        raise GuestError(f"the guest is no Linux: {found.system}", where=where, fix=fix)
    if found.refused:
        what, fix = _REFUSED[found.refused]
        raise GuestError(what, where=where, fix=fix)


def _nothing_to_rebuild(found: Report) -> str:
    if found.unified:
        return f"its kernels are unified images ({found.unified[0]}), measured or signed as a whole"
    return "no kernel with an initramfs was found in /boot"


def _refuse_full(kernels: tuple[Kernel, ...], where: str) -> None:
    """A generator writes the new initramfs beside the old one; each may grow by the drivers."""
    by_folder: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        by_folder.setdefault(posixpath.dirname(kernel.initrd), []).append(kernel)
    for folder, there in by_folder.items():
        needed = max(one.size for one in there) + SPARE * len(there)
        free = min(one.free for one in there)
        if free < needed:
            raise GuestError(
                f"{format_bytes(free)} free in {folder}, {format_bytes(needed)} needed to rebuild",
                where=where,
                fix="remove old kernels in the guest, then run this again",
            )
