"""What the operator decided once and every later command needs: kept as JSON in the journal, without secrets."""

from __future__ import annotations

import os
import re
import stat
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from tokvm.core.errors import UsageError
from tokvm.core.machine import DiskBus, Finding, Severity, VirtualMachine
from tokvm.domain.base import DomainPlan, TargetDisk
from tokvm.guest.base import Way

DEFAULT_LIBVIRT = "qemu:///system"


@dataclass(frozen=True, slots=True)
class SshOptions:
    """How the source is reached. Paths, never keys or passwords; for ssh, everything else is the user's own ssh_config.

    password_file, tls_ca, tls_fingerprint: for sources that are reached over TLS instead.
    clone_base: a base that ESXi keeps locked may be cloned on its datastore first.
    bytes_from, nbd: where vSphere's disks are read from: the ESXi host (`ssh://root@{host}`), or an NBD server.
    enable_cbt: vSphere tracks changed blocks for the time of the migration.
    """

    identity: str | None = None
    config_file: str | None = None
    known_hosts: str | None = None
    accept_new_host_key: bool = False
    progress_deadline_s: float = 30.0
    password_file: str | None = None
    tls_ca: str | None = None
    tls_fingerprint: str | None = None
    clone_base: bool = False
    bytes_from: str | None = None
    nbd: str | None = None
    enable_cbt: bool = False


@dataclass(frozen=True, slots=True)
class TargetChoice:
    """Where one disk goes. `overwrite` repeats the size or serial of a device with content that may be lost."""

    path: str
    overwrite: str | None = None


@dataclass(frozen=True, slots=True)
class Modern:
    """The target of cutover number `attempt` was given virtio afterwards, by `way`. proved: it showed life on it."""

    way: Way
    attempt: int
    proved: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """One migration's decisions. `source` is the URL without secrets; `targets` are in the order of the VM's disks.

    way: how the guest is made to boot, None for what the newest rehearsal found; virtio_win: the operator's drivers for Windows
    (ISO or folder); guest_root: libguestfs' name of the system that is meant, where there are several. modern: what `tokvm
    modernise` did, or tries.
    """

    source: str
    targets: tuple[TargetChoice, ...]
    ssh: SshOptions = field(default_factory=SshOptions)
    networks: dict[str, str] = field(default_factory=dict)
    libvirt: str = DEFAULT_LIBVIRT
    machine: str = "q35"
    bus: DiskBus = DiskBus.VIRTIO_BLK
    domain: str = ""
    rate_limit: float | None = None
    way: Way | None = None
    virtio_win: str = ""
    guest_root: str = ""
    modern: Modern | None = None

    def kept(self) -> Plan:
        """As it is stored: a host key is believed anew only when the operator says so again."""
        return replace(self, ssh=replace(self.ssh, accept_new_host_key=False))

    def to_json(self) -> dict[str, object]:
        return asdict(self)

    @classmethod
    def from_json(cls, stored: dict[str, object]) -> Plan:
        known = dict(stored)
        ssh, targets = known.pop("ssh", {}), known.pop("targets", [])
        if not isinstance(ssh, dict) or not isinstance(targets, list):
            raise UsageError("the stored plan has another shape", fix="it was written by another version of tokvm")
        known["bus"] = DiskBus(str(known.get("bus", DiskBus.VIRTIO_BLK)))
        known["way"] = Way(str(known["way"])) if known.get("way") else None
        known["modern"] = _modern(known.get("modern"))
        return cls(ssh=SshOptions(**ssh), targets=tuple(TargetChoice(**t) for t in targets), **known)  # type: ignore[arg-type]


def _modern(stored: object) -> Modern | None:
    if not isinstance(stored, dict):
        return None
    return Modern(Way(str(stored["way"])), int(stored["attempt"]), bool(stored["proved"]))


@dataclass(frozen=True, slots=True)
class Request:
    """What `sync` and `migrate` were told. What is None or empty keeps what the migration began with."""

    ssh: SshOptions = field(default_factory=SshOptions)
    to: list[str] = field(default_factory=list)
    overwrite: dict[str, str] = field(default_factory=dict)
    networks: dict[str, str] = field(default_factory=dict)
    libvirt: str | None = None
    domain: str | None = None
    machine: str | None = None
    bus: DiskBus | None = None
    rate_limit: float | None = None


def merged(known: SshOptions, said: SshOptions) -> SshOptions:
    """What was said now, and for the rest what the migration began with. A CA replaces a pin, and the other way round."""
    tls = said if said.tls_ca or said.tls_fingerprint else known
    return SshOptions(
        identity=said.identity or known.identity,
        config_file=said.config_file or known.config_file,
        known_hosts=said.known_hosts or known.known_hosts,
        accept_new_host_key=said.accept_new_host_key,
        progress_deadline_s=said.progress_deadline_s,
        password_file=said.password_file or known.password_file,
        tls_ca=tls.tls_ca,
        tls_fingerprint=tls.tls_fingerprint,
        clone_base=said.clone_base or known.clone_base,
        bytes_from=said.bytes_from or known.bytes_from,
        nbd=said.nbd or known.nbd,
        enable_cbt=said.enable_cbt or known.enable_cbt,
    )


def unmapped(vm: VirtualMachine, networks: dict[str, str]) -> list[Finding]:
    """NICs that nobody said where to plug in, and places that are none: asked before the copy, not before the start."""
    known = sorted({nic.network for nic in vm.nics})
    findings = [
        Finding(
            Severity.BLOCKER,
            f"nothing says where the source's network {name!r} goes",
            f"give --network '{name}=network:NAME' (or bridge:NAME, user, none), or --network '*=…' for all",
        )
        for name in known
        if name not in networks and "*" not in networks
    ]
    for name, place in networks.items():
        if name != "*" and name not in known:
            findings.append(
                Finding(Severity.BLOCKER, f"the VM has no network {name!r}", f"it has {', '.join(known) or 'none'}")
            )
        if not re.fullmatch(r"user|none|(network|bridge):.+", place, re.DOTALL):
            what = f"{place!r} is no place to plug a NIC in"
            findings.append(Finding(Severity.BLOCKER, what, "write network:NAME, bridge:NAME, user or none"))
    return findings


def new_plan(source_url: str, vm: VirtualMachine, request: Request) -> Plan:
    """A migration's first plan, with the defaults for what was not said."""
    return Plan(
        source=source_url,
        targets=choose_targets(vm, request.to, request.overwrite),
        ssh=request.ssh,
        networks=request.networks,
        libvirt=request.libvirt or DEFAULT_LIBVIRT,
        machine=request.machine or "q35",
        bus=request.bus or DiskBus.VIRTIO_BLK,
        domain=request.domain or "",
        rate_limit=request.rate_limit,
    )


def domain_plan(vm: VirtualMachine, plan: Plan) -> DomainPlan:
    """What libvirt is told. A target that is not there yet counts as the file it will be."""
    disks = tuple(TargetDisk(choice.path, block=Path(choice.path).is_block_device(), bus=plan.bus) for choice in plan.targets)
    return DomainPlan(vm, plan.domain or vm.name, disks, plan.networks, plan.machine)


def safe_name(name: str) -> str:
    """A file name's worth of a VM's name, which is any text: letters, digits, `.`, `_`, `-`; never a leading dot or dash."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._-")[:60] or "vm"


def choose_targets(vm: VirtualMachine, to: list[str], overwrite: dict[str, str]) -> tuple[TargetChoice, ...]:
    """Paths for the VM's disks, from `--to`: one directory for all, or one file or device for each disk, in order."""
    if not to:
        raise UsageError("no target given", fix="give --to DIRECTORY, or --to PATH once for each disk")
    if len(to) == 1 and (to[0].endswith("/") or Path(to[0]).is_dir()):
        folder = Path(to[0]).absolute()
        paths = [str(folder / f"{safe_name(vm.name)}-{vm.uuid[:8]}-disk{disk.index}.raw") for disk in vm.disks]
    elif len(to) == len(vm.disks):
        paths = [str(Path(path).absolute()) for path in to]
    else:
        raise UsageError(
            f"{vm.name!r} has {len(vm.disks)} disks, but {len(to)} targets were given",
            fix="give one --to DIRECTORY, or --to PATH once for each disk in the order of `tokvm check`",
        )
    for path in paths:
        refuse_odd_path(path)
    places = [_place(path) for path in paths]
    if len(set(places)) != len(places):
        raise UsageError("two disks were given the same target", fix="give each disk a path of its own")
    overwrite = {str(Path(path).absolute()): given for path, given in overwrite.items()}
    unknown = set(overwrite) - set(paths)
    if unknown:
        raise UsageError(
            f"--overwrite names {sorted(unknown)[0]!r}, which is no target here", fix="repeat the path given to --to"
        )
    return tuple(TargetChoice(path, overwrite.get(path)) for path in paths)


def _place(path: str) -> str:
    """What a path leads to, whatever its name: a device by its number, anything else by where its links end."""
    real = Path(os.path.realpath(path))
    try:
        status = real.stat()
    except OSError:
        return str(real)
    if stat.S_ISBLK(status.st_mode):
        return f"device {status.st_rdev}"
    return f"file {status.st_dev}:{status.st_ino}"


def refuse_odd_path(path: str) -> None:
    """Paths go into the journal and into libvirt's XML, which hold text."""
    if not path.isprintable() or any(0xD800 <= ord(c) < 0xE000 for c in path):
        raise UsageError(f"{path!r} holds characters that no XML can", fix="give the target a plain path")


def pairs(texts: list[str], option: str) -> dict[str, str]:
    """`A=B` options as a dict. The right-most `=` divides, because a network's name may hold one."""
    found: dict[str, str] = {}
    for text in texts:
        left, sign, right = text.rpartition("=")
        if not sign or not left or not right:
            raise UsageError(f"{option} {text!r} is not of the form NAME=VALUE", fix=f"write {option} NAME=VALUE")
        found[left] = right
    return found
