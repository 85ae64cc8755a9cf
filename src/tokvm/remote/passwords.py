"""A password, from where only its owner can read it: a file, the environment, or the keyboard. Never from a command line.

--password-file FILE   its first line; the file must be readable by its owner alone
TOKVM_PASSWORD         of our environment
a prompt               when we are at a terminal
"""

from __future__ import annotations

import getpass
import os
import stat
import sys
from pathlib import Path

from tokvm.core.errors import UsageError

VARIABLE = "TOKVM_PASSWORD"
_MOST = 4096
_KEPT = "cutover, rollback and finish use the file that `tokvm sync … --password-file FILE` named last"


def password_for(whom: str, file: str | None) -> str:
    """The password of `whom` (shown in the prompt). UsageError when there is none to be had."""
    if file is not None:
        return _from_file(Path(file))
    found = os.environ.get(VARIABLE)
    if found:
        return found
    if sys.stdin.isatty():
        return getpass.getpass(f"Password of {whom}: ", stream=sys.stderr)
    raise UsageError(
        f"no password for {whom}",
        fix=f"set {VARIABLE}, or run it at a terminal, which asks for it, or give --password-file FILE (mode 0600); {_KEPT}",
    )


def _from_file(path: Path) -> str:
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            raw = file.read(_MOST + 1)
    except OSError as exc:
        raise UsageError(
            f"the password's file cannot be read: {exc.strerror}",
            where=str(path),
            fix=f"put the password there (mode 0600) and run the same command again; {_KEPT}",
        ) from exc
    if stat.S_ISREG(mode) and mode & 0o077:
        raise UsageError("others can read the password's file", where=str(path), fix=f"chmod 600 {path}")
    line = raw.partition(b"\n")[0].removesuffix(b"\r")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise UsageError("the password is not UTF-8", where=str(path)) from exc
    if not text or len(raw) > _MOST or "\0" in text:
        raise UsageError("the file's first line is no password", where=str(path), fix="put the password on its first line")
    return text
