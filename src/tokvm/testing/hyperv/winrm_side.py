"""The other way to a played Hyper-V host: its WinRM service, and a Samba over its drives.

    with WinrmSide(host, folder) as side:
        run_tokvm("ls", *side.arguments, side.url)

Samba knows nothing of the host's VMs: what a VM writes it would let us read, and a merge does not wait for its handles.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from tokvm.remote.recording import Recorder
from tokvm.remote.tls import TlsTrust
from tokvm.sources.hyperv.over_winrm import open_hyperv
from tokvm.sources.hyperv.source import HyperVSource
from tokvm.testing.certificates import Authority
from tokvm.testing.hyperv.host import HyperVHost
from tokvm.testing.hyperv.paths import UNC
from tokvm.testing.hyperv.samba import PASSWORD, USER, Samba
from tokvm.testing.hyperv.winrm_server import WinrmServer


class WinrmSide:
    """Both servers, running from the start. Needs what `samba.unavailable` asks for."""

    def __init__(self, host: HyperVHost, folder: Path) -> None:
        self.authority = Authority(folder / "ca")
        self.certificate = self.authority.server("hv1")
        self.smb = Samba(folder / "samba", _shares(host.folder / "drives")).start()
        self.winrm = WinrmServer(host, folder / "winrm", certificate=self.certificate).start()
        self._password = folder / "password"
        self._password.touch(mode=0o600)
        self._password.write_text(f"{PASSWORD}\n", encoding="utf-8")

    @property
    def url(self) -> str:
        return f"hyperv+winrm://{self.place}"

    @property
    def place(self) -> str:
        return f"{USER}@{self.winrm.address}:{self.winrm.port}?smb={self.smb.port}"

    @property
    def arguments(self) -> list[str]:
        """Of the command line."""
        return ["--tls-ca", str(self.authority.certificate), "--password-file", str(self._password)]

    def connect(self, *, silence_s: float = 10.0, recorder: Recorder | None = None) -> HyperVSource:
        trust = TlsTrust.of(ca_file=str(self.authority.certificate))
        return open_hyperv(self.place, password=lambda _: PASSWORD, trust=trust, silence_s=silence_s, recorder=recorder)

    def close(self) -> None:
        self.winrm.stop()
        self.smb.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _shares(drives: Path) -> Mapping[str, Path]:
    """`C$` for a drive, and each share of a file server by its own name."""
    local = {f"{drive.name}$": drive for drive in drives.iterdir() if drive.name != UNC}
    far = {share.name: share for server in (drives / UNC).glob("*") for share in server.iterdir()}
    return {**local, **far}
