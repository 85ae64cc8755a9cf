"""From a source's URL to a Source.

xenserver://[user@]host[:port]      dom0 over SSH (root when no user is given); XCP-ng too
hyperv://[user@]host[:port]         a Hyper-V host over Win32-OpenSSH (Administrator when no user is given)
hyperv+winrm://[user@]host[:port]   over WinRM (5986, TLS) and SMB (?smb=PORT: not 445); DOMAIN%5Cuser for a domain's
esx://[user@]host[:port]            an ESXi host over SSH (root when no user is given); esxi:// is the same
vpx://[user@]host[:port][/dc]       vCenter, or one ESXi, by vSphere's API over HTTPS
files:BASE[,CHILD…]                 image files that are already here, base first
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from tokvm.app.plan import SshOptions
from tokvm.core.errors import UsageError
from tokvm.remote.passwords import password_for
from tokvm.remote.ssh import SshConfig, SshHost
from tokvm.remote.tls import TlsTrust
from tokvm.sources.base import Source
from tokvm.sources.files.source import FilesSource
from tokvm.sources.hyperv.source import DEFAULT_USER, HyperVSource
from tokvm.sources.vmware.source import EsxSource
from tokvm.sources.xenserver.source import XenServerSource

if TYPE_CHECKING:  # loaded only when somebody records
    from tokvm.remote.recording import Recorder

log = logging.getLogger(__name__)


def _xenserver(rest: str, ssh: SshOptions, recorder: Recorder | None) -> Source:
    return XenServerSource(_ssh_host(rest, ssh, recorder))


def _hyperv(rest: str, ssh: SshOptions, recorder: Recorder | None) -> Source:
    return HyperVSource(_ssh_host(rest, ssh, recorder, user=DEFAULT_USER))


def _esx(rest: str, ssh: SshOptions, recorder: Recorder | None) -> Source:
    return EsxSource(_ssh_host(rest, ssh, recorder), clone_base=ssh.clone_base)


def _vpx(rest: str, options: SshOptions, recorder: Recorder | None) -> Source:
    try:
        from tokvm.sources.vmware.api.client import Client
        from tokvm.sources.vmware.api.place import Place
        from tokvm.sources.vmware.api.source import Bytes, VsphereSource
    except ModuleNotFoundError as exc:
        raise UsageError(
            f"vSphere's API needs a package that is not there: {exc.name}", fix="pip install 'tokvm[vmware]'"
        ) from exc
    if recorder is not None:
        log.warning("what is sent over vSphere's API is not recorded")
    place = Place.parse(rest)
    client = Client(place, lambda: password_for(f"{place.user} at {place.netloc}", options.password_file), _trust(options))

    def connect(url: str) -> SshHost:
        return _ssh_host(url.removeprefix("ssh:"), options, recorder)

    return VsphereSource(client, Bytes(options.bytes_from or "", connect, nbd=options.nbd or "", cbt=options.enable_cbt))


def _hyperv_winrm(rest: str, options: SshOptions, recorder: Recorder | None) -> Source:
    try:
        from tokvm.sources.hyperv.over_winrm import open_hyperv
    except ModuleNotFoundError as missing:
        raise UsageError(
            f"hyperv+winrm needs a package that is not installed: {missing.name}", fix="pip install 'tokvm[winrm]'"
        ) from missing
    return open_hyperv(
        rest.removeprefix("//"),
        password=lambda whom: password_for(whom, options.password_file),
        trust=_trust(options),
        silence_s=options.progress_deadline_s,
        recorder=recorder,
    )


def _trust(options: SshOptions) -> TlsTrust:
    return TlsTrust.of(ca_file=options.tls_ca, fingerprints=(options.tls_fingerprint,) if options.tls_fingerprint else ())


def _files(rest: str, _ssh: SshOptions, _recorder: Recorder | None) -> Source:
    return FilesSource.from_paths(rest.split(","))


Opener = Callable[[str, SshOptions, "Recorder | None"], Source]
SOURCES: dict[str, Opener] = {
    "xenserver": _xenserver,
    "xcpng": _xenserver,
    "hyperv": _hyperv,
    "hyperv+winrm": _hyperv_winrm,
    "esx": _esx,
    "esxi": _esx,
    "vpx": _vpx,
    "files": _files,
}


def open_source(url: str, ssh: SshOptions, recorder: Recorder | None = None) -> Source:
    """The source behind `url`. UsageError for a URL nobody here understands. recorder: writes down what is sent to a host."""
    scheme, sign, rest = url.partition(":")
    if not sign or scheme not in SOURCES:
        raise UsageError(
            f"{url!r} is no source tokvm knows",
            fix="write xenserver://root@HOST, hyperv://Administrator@HOST, esx://root@HOST, vpx://USER@HOST, "
            "or files:BASE.vhd,CHILD.vhd",
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
