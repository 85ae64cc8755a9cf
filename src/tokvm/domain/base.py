"""The door of the target hypervisor. Every answer is read from it when asked."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol, runtime_checkable

from tokvm.core.errors import DomainError
from tokvm.core.machine import DiskBus, NicModel, VirtualMachine


class DomainState(StrEnum):
    ABSENT = "absent"
    OFF = "off"
    RUNNING = "running"


class Accel(StrEnum):
    """What runs the guest's instructions; the value is libvirt's domain type."""

    KVM = "kvm"
    TCG = "qemu"


class DiskFormat(StrEnum):
    """What QEMU is told that the file is; never found out by looking, because the guest writes the first sector."""

    RAW = "raw"
    QCOW2 = "qcow2"
    """An overlay of our own making, in a rehearsal only."""


@dataclass(frozen=True, slots=True)
class TargetDisk:
    """A disk of the target: an absolute path to a raw file or block device, in the order of VirtualMachine.disks."""

    path: str
    block: bool
    bus: DiskBus = DiskBus.VIRTIO_BLK
    serial: str = ""
    format: DiskFormat = DiskFormat.RAW


@dataclass(frozen=True, slots=True)
class DirectKernel:
    """Kernel and initrd beside the VM (absolute paths on the target) that are booted instead of what firmware would find."""

    image: str
    initrd: str
    cmdline: str


@dataclass(frozen=True, slots=True)
class DomainPlan:
    """What the domain is made from. `networks` maps a source network's name (or `*`) → the target's
    (`network:NAME`, `bridge:NAME`, `user`, `none`). `machine` is `q35` or `pc`.

    `kernel`: boot it directly. `nvram`: the file with the domain's UEFI variables, prepared or not there yet; "" leaves its
    place to libvirt. `boot_disk`: index of the disk that firmware boots first, None when only the source's word is known.
    `windows`: what inspection said; None asks `VirtualMachine.extra["guest_os"]`."""

    vm: VirtualMachine
    name: str
    disks: tuple[TargetDisk, ...]
    networks: dict[str, str]
    machine: str = "q35"
    nic_model: NicModel = NicModel.VIRTIO
    kernel: DirectKernel | None = None
    nvram: str = ""
    boot_disk: int | None = None
    windows: bool | None = None

    @property
    def is_windows(self) -> bool:
        return self.vm.extra.get("guest_os", "").lower().startswith("windows") if self.windows is None else self.windows


class Sign(StrEnum):
    """What shows that a guest lives, strongest first. The screen is none: it shows what it showed when the guest stopped."""

    AGENT = "agent"
    SERIAL = "serial"
    DHCP = "dhcp"
    ARP = "arp"
    IPV6 = "ipv6"


PROOFS = frozenset({Sign.AGENT, Sign.SERIAL, Sign.DHCP})
"""Signs that come from the guest's own user land; the others its kernel gives by itself."""


@dataclass(frozen=True, slots=True)
class LifeSign:
    """A sign and when it was seen: seconds after the start. `detail`: the agent's name of the system, the line, the message."""

    sign: Sign
    after_s: float
    detail: str = ""


class Outcome(StrEnum):
    ALIVE = "alive"
    FAILED = "failed"
    """It said, or its domain shows, that it will not come up."""
    SILENT = "silent"
    """Nothing proved either within the deadline."""


@dataclass(frozen=True, slots=True)
class LifeSigns:
    """What became of a guest that was tried. `after_s`: seconds from its start to the verdict. `why`: one sentence. `signs`:
    the first of each kind. `tail`: the end of its serial output, printable. `picture`: a PNG of its screen at the end."""

    outcome: Outcome
    after_s: float
    why: str
    signs: tuple[LifeSign, ...] = ()
    tail: str = ""
    picture: Path | None = None


class StartUnknown(DomainError):
    """A start was sent and its reply was lost: the domain may have run. Any other DomainError of `start` is a refusal."""


@runtime_checkable
class DomainHost(Protocol):
    """A libvirt that domains are started on."""

    @property
    def url(self) -> str: ...

    def domain_xml(self, plan: DomainPlan) -> str:
        """The XML that `define` would use, checked against libvirt's RELAX NG where its schemas are installed."""
        ...

    def define(self, plan: DomainPlan) -> None:
        """Define the domain (not started). Idempotent for the same uuid; DomainError when another VM holds the name or uuid."""
        ...

    def state(self, uuid: str) -> DomainState: ...

    def start(self, uuid: str) -> None:
        """Start a defined domain; already running is success. DomainError: it was refused; StartUnknown: it may have run."""
        ...

    def stop(self, uuid: str) -> None:
        """Cut its power; already off or absent is success."""
        ...

    def undefine(self, uuid: str) -> None:
        """Forget the domain, which also makes a late start impossible; disks stay. Absent is success."""
        ...

    def cut_network(self, uuid: str) -> None:
        """Set every NIC's link down (two copies run: keep the target off the network, stop nothing)."""
        ...

    def alive(self, uuid: str) -> bool:
        """True when the guest has shown life: the guest agent answers."""
        ...

    def close(self) -> None: ...
