"""Where tokvm remembers: the state directory, with the journal, the manifests and the locks."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from tokvm.core.errors import UsageError


def default_state_dir() -> Path:
    """$TOKVM_STATE_DIR, else /var/lib/tokvm for root, else $XDG_STATE_HOME/tokvm (the XDG base directory specification)."""
    given = os.environ.get("TOKVM_STATE_DIR")
    if given:
        return Path(given)
    if os.geteuid() == 0:
        return Path("/var/lib/tokvm")
    return Path(os.environ.get("XDG_STATE_HOME", "~/.local/state")).expanduser() / "tokvm"


def prepare_state_dir(path: Path) -> Path:
    """The directory, made with mode 0700 when missing; refused when somebody else could write into it."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.stat()
    except OSError as exc:
        raise UsageError(
            f"the state directory cannot be used: {exc.strerror}", where=str(path), fix="give another with --state-dir"
        ) from exc
    if not stat.S_ISDIR(found.st_mode):
        raise UsageError("the state directory is no directory", where=str(path), fix="give another with --state-dir")
    if found.st_uid not in (0, os.geteuid()) or found.st_mode & 0o022:
        raise UsageError(
            f"the state directory could be changed by others (owner {found.st_uid}, mode {found.st_mode & 0o7777:04o})",
            where=str(path),
            fix="chown it to yourself and chmod 0700 it, or give another with --state-dir",
        )
    return path


def manifest_path(state_dir: Path, migration: str, number: int, disk: int) -> Path:
    return state_dir / "manifests" / migration / f"pass-{number:04d}-disk-{disk}.manifest"
