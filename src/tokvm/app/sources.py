"""From a source's URL to a Source.

xenserver://[user@]host[:port]      dom0 over SSH (root when no user is given); XCP-ng too
files:BASE[,CHILD…]                 image files that are already here, base first
"""

from __future__ import annotations

from collections.abc import Callable

from tokvm.app.plan import SshOptions
from tokvm.core.errors import UsageError
from tokvm.remote.ssh import SshConfig, SshHost
from tokvm.sources.base import Source
from tokvm.sources.files.source import FilesSource
from tokvm.sources.xenserver.source import XenServerSource


def _xenserver(rest: str, ssh: SshOptions) -> Source:
    where = rest.removeprefix("//").rstrip("/")
    return XenServerSource(SshHost(ssh_config(where, ssh)))


def _files(rest: str, _ssh: SshOptions) -> Source:
    return FilesSource.from_paths(rest.split(","))


SOURCES: dict[str, Callable[[str, SshOptions], Source]] = {"xenserver": _xenserver, "xcpng": _xenserver, "files": _files}


def open_source(url: str, ssh: SshOptions) -> Source:
    """The source behind `url`. UsageError for a URL nobody here understands."""
    scheme, sign, rest = url.partition(":")
    if not sign or scheme not in SOURCES:
        raise UsageError(
            f"{url!r} is no source tokvm knows",
            fix="write xenserver://root@HOST, or files:BASE.vhd,CHILD.vhd",
        )
    return SOURCES[scheme](rest, ssh)


def ssh_config(where: str, ssh: SshOptions) -> SshConfig:
    """The connection to `[user@]host[:port]`; root when the URL names nobody."""
    if "@" not in where:
        where = f"root@{where}"
    return SshConfig.parse(
        where,
        identity=ssh.identity,
        config_file=ssh.config_file,
        known_hosts=ssh.known_hosts,
        accept_new_host_key=ssh.accept_new_host_key,
        progress_deadline_s=ssh.progress_deadline_s,
    )
