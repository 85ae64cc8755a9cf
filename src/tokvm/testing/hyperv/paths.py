r"""Windows paths in three forms, and where their files really are.

    C:\VMs and more\ü\x.vhdx          what Hyper-V says
    /C:/VMs and more/ü/x.vhdx         what Win32-OpenSSH's sftp-server takes
    STATE_DIR/drives/C/VMs and more/ü/x.vhdx

Windows compares names without case; whoever writes `c:` or `X.VHDX` means the same file.
"""

from __future__ import annotations

import os
from pathlib import Path

UNC = "UNC"


def local(folder: Path, windows: str) -> Path:
    """Where the bytes of a Windows path are. No name is resolved against the real file system."""
    if windows.startswith("\\\\"):
        return folder.joinpath("drives", UNC, *_parts(windows[2:], windows))
    drive, colon, rest = windows.partition(":")
    if not colon or len(drive) != 1 or not rest.startswith("\\"):
        raise ValueError(f"{windows!r} is no absolute Windows path")
    return folder.joinpath("drives", drive.upper(), *_parts(rest[1:], windows))


def _parts(text: str, whole: str) -> list[str]:
    parts = text.split("\\")
    if any(part in ("", ".", "..") or "/" in part or "\0" in part for part in parts):
        raise ValueError(f"{whole!r} is no plain Windows path")
    return parts


def from_sftp(raw: bytes) -> str:
    r"""`/C:/a b/x.vhdx` as `C:\a b\x.vhdx`; FileNotFoundError for what Windows cannot have."""
    text = raw.decode("utf-8", "surrogateescape")
    if not text.startswith("/") or text[2:3] != ":" or not text[1:2].isalpha():
        raise FileNotFoundError(text)
    parts = [part for part in text[3:].split("/") if part not in ("", ".")]
    if any(part == ".." or set(part) & set('<>:"|?*\\') or min(part) < " " for part in parts):
        raise FileNotFoundError(text)
    return f"{text[1].upper()}:\\" + "\\".join(parts)


def to_sftp(windows: str) -> str:
    return "/" + windows.replace("\\", "/")


def key(windows: str) -> str:
    """The same for all spellings of a path."""
    return windows.casefold()


def find(folder: Path, windows: str) -> Path:
    """The file that is there under this name in any case."""
    if windows.endswith(":\\"):
        return folder / "drives" / windows[0].upper()
    wanted = local(folder, windows)
    if wanted.exists():
        return wanted
    at = folder / "drives"
    for part in wanted.relative_to(at).parts:
        names = [name for name in (os.listdir(at) if at.is_dir() else []) if name.casefold() == part.casefold()]  # noqa: PTH208
        if not names:
            raise FileNotFoundError(windows)
        at /= names[0]
    return at


def name_of(windows: str) -> str:
    return windows.rpartition("\\")[2]


def folder_of(windows: str) -> str:
    return windows.rpartition("\\")[0]
