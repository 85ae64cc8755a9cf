"""What virt-v2v-in-place says when it fails, and what then helps."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tokvm.core.text import readable
from tokvm.guest.appliance import FIX_APPLIANCE
from tokvm.guest.base import GuestError

_FIXES = (
    (
        r"rhsrvany|pvvxsvc|pnp_wait",
        "put rhsrvany.exe and pnp_wait.exe into /usr/share/virt-tools, or name their folder by VIRT_TOOLS_DATA_DIR (Fedora and "
        "RHEL: package mingw32-srvany or virtio-win; Debian and Ubuntu have none: take the two files from Fedora's package)",
    ),
    (r"multi-?boot|--root option", "say which operating system: --root /dev/sdXN (`tokvm morph --dry-run` lists them)"),
    (
        r"hibernat|fast (startup|restart)|unclean file system|refusing to mount",
        "start the VM on its source once more and shut it down for good: `shutdown /s /f /t 0`, with Fast Startup off",
    ),
    (
        r"no root device|inspection could not detect",
        "there is no operating system that libguestfs knows on these disks: give all disks of the VM, the boot disk first",
    ),
    (
        r"not enough free (disk )?space|no space left",
        "make room inside the guest (/boot, / and C: want 100 MiB), then try again",
    ),
    (r"virtio drivers|virtio-win|no matching drivers?", "give the Windows drivers: --virtio-win DIRECTORY-OR-ISO"),
    (
        r"encrypt|bitlocker|luks|passphrase",
        "open it on the source (suspend BitLocker), or use a way that leaves the disk alone",
    ),
    (r"supermin|guestfs_launch|appliance closed|libguestfs-test-tool", FIX_APPLIANCE),
)
_BORING = re.compile(r"^(if reporting bugs|\s*virt-v2v-in-place -v -x|$)", re.IGNORECASE)


def failure(said: Sequence[str], code: int, *, log: str) -> GuestError:
    """The error for what it said last. `log`: where all of it is kept."""
    lines = [line.strip() for line in said if not _BORING.match(line)]
    line = next((one for one in lines if "error:" in one), lines[-1] if lines else f"it ended with exit code {code}")
    line = line.removeprefix("virt-v2v-in-place:").strip().removeprefix("error:").strip()
    fix = next((fix for pattern, fix in _FIXES if re.search(pattern, " ".join(lines), re.IGNORECASE)), "")
    return GuestError(
        f"virt-v2v-in-place failed: {readable(line, limit=500)}",
        where=log,
        fix=fix or "read the log; the disks hold what they held",
    )
