"""From what was typed to what app/ takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tokvm.app.plan import Request, SshOptions, pairs
from tokvm.cli import options
from tokvm.core.errors import UsageError
from tokvm.core.machine import DiskBus


def _absolute(path: str | None) -> str | None:
    """It is stored, and used again from wherever the next command is run."""
    return None if path is None else str(Path(path).expanduser().absolute())


@dataclass(frozen=True, slots=True)
class SshArguments:
    identity: str | None = None
    ssh_config: str | None = None
    known_hosts: str | None = None
    accept_new_host_key: bool = False
    silence: str = "30s"
    password_file: str | None = None
    tls_ca: str | None = None
    tls_fingerprint: str | None = None
    clone_base: bool = False
    bytes_from: str | None = None
    nbd: str | None = None
    enable_cbt: bool = False

    def options(self) -> SshOptions:
        return SshOptions(
            identity=_absolute(self.identity),
            config_file=_absolute(self.ssh_config),
            known_hosts=_absolute(self.known_hosts),
            accept_new_host_key=self.accept_new_host_key,
            progress_deadline_s=max(1.0, options.seconds(self.silence)),
            password_file=_absolute(self.password_file),
            tls_ca=_absolute(self.tls_ca),
            tls_fingerprint=self.tls_fingerprint,
            clone_base=self.clone_base,
            bytes_from=self.bytes_from,
            nbd=self.nbd,
            enable_cbt=self.enable_cbt,
        )


@dataclass(frozen=True, slots=True)
class TargetArguments:
    to: list[str] = field(default_factory=list)
    overwrite: list[str] = field(default_factory=list)
    network: list[str] = field(default_factory=list)
    libvirt: str | None = None
    domain: str | None = None
    machine: str | None = None
    bus: str | None = None
    rate_limit: str | None = None

    def request(self, ssh: SshArguments) -> Request:
        if self.machine not in (None, "q35", "pc"):
            raise UsageError(f"--machine {self.machine!r} is neither q35 nor pc", fix="write --machine q35 or --machine pc")
        if self.bus is not None and self.bus not in list(DiskBus):
            raise UsageError(f"--bus {self.bus!r} is not known", fix=f"write one of {', '.join(DiskBus)}")
        return Request(
            ssh=ssh.options(),
            to=self.to,
            overwrite=pairs(self.overwrite, "--overwrite"),
            networks=pairs(self.network, "--network"),
            libvirt=self.libvirt,
            domain=self.domain,
            machine=self.machine,
            bus=DiskBus(self.bus) if self.bus else None,
            rate_limit=options.size(self.rate_limit),
        )
