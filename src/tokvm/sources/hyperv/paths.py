r"""Windows paths, and the same files over SFTP.

C:\VMs\a b\d.vhdx            /C:/VMs/a b/d.vhdx
\\?\C:\VMs\d.vhdx            /C:/VMs/d.vhdx
\\server\share\d.vhdx        refused: a session that logged in with a key cannot go on to a file server (Win32-OpenSSH 2170)
\\?\Volume{…}\d.vhdx         refused: the volume has no drive letter, and SFTP knows no other names
"""

from __future__ import annotations

import re

from tokvm.core.errors import SourceError
from tokvm.core.text import readable

_DRIVE = re.compile(r"(?:\\\\[?.]\\)?([A-Za-z]):[\\/]([^:\0]+)", re.DOTALL)
_AUTOMATIC = re.compile(r"\.avhdx?", re.IGNORECASE)


def same(path: str) -> str:
    """For comparing: Windows does not tell cases apart, nor the two slashes."""
    plain = path.replace("/", "\\").lower()
    return plain[4:] if re.match(r"\\\\[?.]\\[a-z]:", plain) else plain


def is_checkpoint_file(path: str) -> bool:
    """True for a file that Hyper-V makes at a checkpoint (.avhdx, .avhd) and takes away when it merges."""
    return _AUTOMATIC.fullmatch(path[path.rfind(".") :]) is not None


def problem(path: str) -> str:
    """Why the file cannot be reached over SFTP; "" when it can."""
    if _DRIVE.fullmatch(path):
        return ""
    if re.match(r"(?:\\\\|//)(?![?.][\\/])", path) or re.match(r"\\\\\?\\UNC\\", path, re.IGNORECASE):
        return "it lies on a file server (SMB), which a session that logged in with a key cannot reach"
    return "it has no drive letter, so SFTP cannot name it"


def sftp_path(path: str, *, where: str) -> str:
    match = _DRIVE.fullmatch(path)
    if match is None:
        raise SourceError(
            f"{readable(path)}: {problem(path)}",
            where=where,
            fix="move the VM's storage to a volume with a drive letter of this host (Move-VMStorage)",
        )
    return f"/{match[1]}:/" + match[2].replace("\\", "/")
