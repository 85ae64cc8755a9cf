"""The script, run in the guest over ssh.

    ssh GUEST sh -c '… sh -s look'     data/prestage.sh goes in by stdin, the report comes out

The command line is constant too. It becomes root by `sudo -n` where the login is not root and sudo asks no password.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from enum import StrEnum
from importlib import resources

from tokvm.core.text import readable
from tokvm.guest.base import GuestError
from tokvm.guest.prestage.report import Reader, Report
from tokvm.remote.errors import last_line
from tokvm.remote.ssh import SshHost, quote


class Task(StrEnum):
    """LOOK changes nothing. PREPARE changes the configuration and rebuilds."""

    LOOK = "look"
    PREPARE = "prepare"


TIMEOUT_S = {Task.LOOK: 300.0, Task.PREPARE: 3600.0}
"""Two minutes for each kernel of a slow guest, and many kernels."""

# sudo with use_pty may read on for its command: the first one must not eat the script.
_AS_ROOT = (
    'if [ "$(id -u)" != 0 ] && sudo -n sh -c : </dev/null >/dev/null 2>&1; then exec sudo -n sh -s {0}; fi; exec sh -s {0}'
)
WINDOWS = "Windows: `pnputil /add-driver DIR\\*.inf /install` in it, then `tokvm rehearse` with --virtio-win (docs/morph.md)"


def command(task: Task) -> str:
    return quote(["sh", "-c", _AS_ROOT.format(task)])


def script() -> bytes:
    return resources.files("tokvm.guest.prestage").joinpath("data", "prestage.sh").read_bytes()


def ask(host: SshHost, task: Task, *, on_said: Callable[[str], None]) -> Report:
    """GuestError: the guest has no POSIX shell, or its answer makes no sense. ConnectionLost: what was begun goes on there."""
    reader = Reader(host.where, on_said)
    with closing(host.converse(command(task))) as talk:
        reply = talk.request(script(), reader.feed, timeout_s=TIMEOUT_S[task])
    if not reader.begun:
        said = last_line(reply.stderr) or readable(reply.stdout[-300:].decode("utf-8", "replace").strip())
        raise GuestError(
            "no POSIX shell answered in the guest" + (f": {said}" if said else ""),
            where=host.where,
            fix=WINDOWS,
        )
    return reader.report()
