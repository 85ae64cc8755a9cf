"""A Hyper-V host over WinRM for its PowerShell and SMB for its files, from a URL. Imports what `tokvm[winrm]` installs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from tokvm.remote.tls import TlsTrust
from tokvm.sources.hyperv.psrp import WinrmHost
from tokvm.sources.hyperv.smb import SmbFiles
from tokvm.sources.hyperv.smb_link import SmbAccess
from tokvm.sources.hyperv.source import DEFAULT_USER, HyperVSource
from tokvm.sources.hyperv.winrm import WinrmPlace

if TYPE_CHECKING:
    from tokvm.remote.recording import Recorder


def open_hyperv(
    place: str, *, password: Callable[[str], str], trust: TlsTrust, silence_s: float, recorder: Recorder | None = None
) -> HyperVSource:
    """place: `[user@]host[:port][?smb=port]`. password: asked for once the place is known to be one; nothing is sent yet."""
    found = WinrmPlace.parse(place, user=DEFAULT_USER)
    config = found.config("", trust, silence_s=silence_s)
    config = found.config(password(f"{found.user} on {found.host}"), trust, silence_s=silence_s)
    access = SmbAccess(config.user, config.password, port=found.smb_port, silence_s=silence_s)
    return HyperVSource(WinrmHost(config, recorder), files=SmbFiles(config.host, access, recorder=recorder))
