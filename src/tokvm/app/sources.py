"""From a source's URL to a Source.

xenserver://[user@]host[:port]      dom0 over SSH (root when no user is given); XCP-ng too
hyperv://[user@]host[:port]         a Hyper-V host over Win32-OpenSSH (Administrator when no user is given)
files:BASE[,CHILD…]                 image files that are already here, base first
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from tokvm.app.plan import SshOptions
from tokvm.core.errors import UsageError
from tokvm.remote.ssh import SshConfig, SshHost
from tokvm.sources.base import Source
from tokvm.sources.files.source import FilesSource
from tokvm.sources.hyperv.source import DEFAULT_USER, HyperVSource
from tokvm.sources.xenserver.source import XenServerSource

if TYPE_CHECKING:  # loaded only when somebody records
    from tokvm.remote.recording import Recorder


def _xenserver(rest: str, ssh: SshOptions, recorder: Recorder | None) -> Source:
    return XenServerSource(_ssh_host(rest, ssh, recorder))


def _hyperv(rest: str, ssh: SshOptions, recorder: Recorder | None) -> Source:
    return HyperVSource(_ssh_host(rest, ssh, recorder, user=DEFAULT_USER))


def _files(rest: str, _ssh: SshOptions, _recorder: Recorder | None) -> Source:
    return FilesSource.from_paths(rest.split(","))


Opener = Callable[[str, SshOptions, "Recorder | None"], Source]
SOURCES: dict[str, Opener] = {"xenserver": _xenserver, "xcpng": _xenserver, "hyperv": _hyperv, "files": _files}


def open_source(url: str, ssh: SshOptions, recorder: Recorder | None = None) -> Source:
    """The source behind `url`. UsageError for a URL nobody here understands. recorder: writes down what is sent to a host."""
    scheme, sign, rest = url.partition(":")
    if not sign or scheme not in SOURCES:
        raise UsageError(
            f"{url!r} is no source tokvm knows",
            fix="write xenserver://root@HOST, hyperv://Administrator@HOST, or files:BASE.vhd,CHILD.vhd",
        )
    return SOURCES[scheme](rest, ssh, recorder)


def _ssh_host(rest: str, ssh: SshOptions, recorder: Recorder | None, *, user: str = "root") -> SshHost:
    config = ssh_config(rest.removeprefix("//").rstrip("/"), ssh, user=user)
    if recorder is None:
        return SshHost(config)
    from tokvm.remote.recorded import RecordedHost

    return RecordedHost(config, recorder)


def ssh_config(where: str, ssh: SshOptions, *, user: str = "root") -> SshConfig:
    """The connection to `[user@]host[:port]`; `user` when the URL names nobody."""
    if "@" not in where:
        where = f"{user}@{where}"
    return SshConfig.parse(
        where,
        identity=ssh.identity,
        config_file=ssh.config_file,
        known_hosts=ssh.known_hosts,
        accept_new_host_key=ssh.accept_new_host_key,
        progress_deadline_s=ssh.progress_deadline_s,
    )
