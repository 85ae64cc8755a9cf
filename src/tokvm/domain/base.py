"""The door of the target hypervisor. Every answer is read from it when asked."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, runtime_checkable

from tokvm.core.errors import DomainError
from tokvm.core.machine import DiskBus, VirtualMachine


class DomainState(StrEnum):
    ABSENT = "absent"
    OFF = "off"
    RUNNING = "running"


class Accel(StrEnum):
    """What runs the guest's instructions; the value is libvirt's domain type."""

    KVM = "kvm"
    TCG = "qemu"


@dataclass(frozen=True, slots=True)
class TargetDisk:
    """A disk of the target: an absolute path to a raw file or block device, in the order of VirtualMachine.disks."""

    path: str
    block: bool
    bus: DiskBus = DiskBus.VIRTIO_BLK
    serial: str = ""


@dataclass(frozen=True, slots=True)
class DomainPlan:
    """What the domain is made from. `networks` maps a source network's name (or `*`) → the target's
    (`network:NAME`, `bridge:NAME`, `user`, `none`). `machine` is `q35` or `pc`."""

    vm: VirtualMachine
    name: str
    disks: tuple[TargetDisk, ...]
    networks: dict[str, str]
    machine: str = "q35"


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
