"""The libvirt that migrated VMs are defined and started on.

tokvm acts only on domains that carry its own <metadata>. A stranger's domain may hold our VM's uuid or name (a copy made by
hand, an earlier tool): it is reported as it is, and never redefined, stopped or forgotten.
"""

from __future__ import annotations

import errno
import logging
import os
import time
import xml.etree.ElementTree as ET
from types import ModuleType
from typing import Any

from tokvm.core.errors import DomainError
from tokvm.core.machine import Finding
from tokvm.domain.accel import Kvm, probe_kvm
from tokvm.domain.agent import agent_answers
from tokvm.domain.base import PROOFS, Accel, DomainPlan, DomainState, LifeSigns, Sign, StartUnknown
from tokvm.domain.check import find_obstacles
from tokvm.domain.connection import Connection
from tokvm.domain.names import legal_name
from tokvm.domain.nics import with_link_down
from tokvm.domain.rehearsal import PREFIX, Rehearsal, RehearsalPlan, clean_up
from tokvm.domain.schema import validate
from tokvm.domain.xml import domain_xml, source_name

log = logging.getLogger(__name__)

SHUTDOWN_POLL_S = 0.5


class LibvirtHost:
    """A DomainHost on libvirt. `accel` overrules what was found by trying."""

    def __init__(self, uri: str = "qemu:///system", *, accel: Accel | None = None) -> None:
        self._connection = Connection(uri)
        self._accel = accel

    @property
    def url(self) -> str:
        return self._connection.uri

    def reach(self) -> None:
        """DomainError when libvirt does not answer. (Everything else connects when it is first needed.)"""
        self._connection.handle()

    def accel(self) -> Accel:
        """KVM where a guest came up under it; TCG, which is much slower, where not."""
        if self._accel is None:
            self._accel = self._find_accel()
            if self._accel is Accel.TCG:
                log.warning("%s: KVM does not work here; domains run under TCG, which is much slower", self.url)
        return self._accel

    def check(self, plan: DomainPlan) -> list[Finding]:
        """What would keep this plan from being defined and started here, found without changing anything."""
        return find_obstacles(self._connection, plan, accel=self.accel())

    def domain_xml(self, plan: DomainPlan) -> str:
        buffered = frozenset(self._without_direct_io(plan)) if self._connection.is_local else frozenset()
        xml = domain_xml(plan, accel=self.accel(), buffered=buffered)
        validate(xml, where=repr(plan.vm.name))
        return xml

    def define(self, plan: DomainPlan) -> None:
        xml = self.domain_xml(plan)
        name, uuid = legal_name(plan.name, plan.vm.uuid), plan.vm.uuid
        self._make_room(name, uuid)
        with self._connection.translated(
            "libvirt does not take the domain",
            where=self._where(uuid),
            fix="look at `tokvm cutover --dry-run`, which prints its XML",
        ):
            self._connection.handle().defineXMLFlags(xml, self._libvirt.VIR_DOMAIN_DEFINE_VALIDATE)
        log.info("%s: defined %s (%s)", self.url, name, uuid)

    def definition(self, uuid: str) -> str:
        """libvirt's own XML of how the domain starts next, whoever edited it. A console's password is in it: only for
        `redefine`."""
        domain = self._own(uuid)
        if domain is None:
            raise DomainError("the domain is not defined", where=self._where(uuid))
        with self._connection.translated("cannot read the domain", where=self._where(uuid)):
            xml: str = domain.XMLDesc(self._libvirt.VIR_DOMAIN_XML_INACTIVE | self._libvirt.VIR_DOMAIN_XML_SECURE)
        return xml

    def redefine(self, xml: str) -> None:
        """Define to the letter what `definition` gave. Nothing is validated: libvirt had taken it so."""
        root = ET.fromstring(xml)
        name, uuid = root.findtext("name", ""), root.findtext("uuid", "")
        self._make_room(name, uuid)
        with self._connection.translated("libvirt does not take the domain back", where=self._where(uuid)):
            self._connection.handle().defineXML(xml)
        log.info("%s: defined %s (%s) as it was", self.url, name, uuid)

    def state(self, uuid: str) -> DomainState:
        domain = self._connection.look_up(uuid)
        if domain is None:
            return DomainState.ABSENT
        return DomainState.RUNNING if self._is_active(domain) else DomainState.OFF

    def start(self, uuid: str) -> None:
        domain = self._own(uuid)
        if domain is None:
            raise DomainError("the domain is not defined", where=self._where(uuid), fix="run the same command again")
        if self._is_active(domain):
            return
        fix = (
            f"`virsh -c {self.url} start {uuid}` shows the same; QEMU's own words are in /var/log/libvirt/qemu/. "
            "QEMU runs as a user of its own, which must be able to reach each disk's folder"
        )
        with self._connection.translated("the domain does not start", where=self._where(uuid), fix=fix):
            try:
                domain.create()
            except self._libvirt.libvirtError as failed:
                if self._connection.broke(failed):
                    raise StartUnknown(
                        f"libvirt went away while it started the domain: {failed.get_error_message() or failed}",
                        where=self._where(uuid),
                        fix=fix,
                    ) from failed
                if not domain.isActive():
                    raise
        log.info("%s: started %s", self.url, uuid)

    def stop(self, uuid: str) -> None:
        domain = self._connection.look_up(uuid)
        if domain is None or not self._is_active(domain):
            return
        self._refuse_stranger(domain, "stopped")
        with self._connection.translated("the domain does not stop", where=self._where(uuid), fix="look at it with virsh"):
            try:
                domain.destroy()
            except self._libvirt.libvirtError:
                if self._connection.look_up(uuid) is not None and domain.isActive():
                    raise
        log.info("%s: stopped %s", self.url, uuid)

    def shut_down(self, uuid: str, deadline_s: float) -> bool:
        """Ask the guest to shut down, by its agent or its power button, and wait. False: it still runs at the deadline."""
        domain = self._own(uuid)
        until = time.monotonic() + deadline_s
        if domain is not None and self._is_active(domain):
            with self._connection.translated("the guest cannot be asked", where=self._where(uuid), fix="shut it down inside"):
                domain.shutdown()
        while self.state(uuid) is DomainState.RUNNING:
            if time.monotonic() > until:
                return False
            time.sleep(SHUTDOWN_POLL_S)
        return True

    def undefine(self, uuid: str) -> None:
        domain = self._connection.look_up(uuid)
        if domain is None:
            return
        self._refuse_stranger(domain, "forgotten")
        if self._is_active(domain):
            raise DomainError("the domain runs, so it was not forgotten", where=self._where(uuid), fix="stop it first")
        libvirt = self._libvirt
        self._undefine(
            domain,
            libvirt.VIR_DOMAIN_UNDEFINE_NVRAM
            | libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
            | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
            | libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA,
        )
        log.info("%s: forgot %s", self.url, uuid)

    def cut_network(self, uuid: str) -> None:
        domain = self._own(uuid)
        if domain is None:
            return
        libvirt = self._libvirt
        with self._connection.translated("a link does not go down", where=self._where(uuid), fix="unplug its bridge by hand"):
            if domain.isActive():
                _pull_cables(domain, domain.XMLDesc(0), libvirt.VIR_DOMAIN_AFFECT_LIVE)
            if domain.isPersistent():
                _pull_cables(domain, domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE), libvirt.VIR_DOMAIN_AFFECT_CONFIG)

    def alive(self, uuid: str) -> bool:
        domain = self._connection.look_up(uuid)
        if domain is None:
            return False
        return agent_answers(self._connection, domain)

    def rehearse(self, plan: RehearsalPlan, *, deadline_s: float, proofs: frozenset[Sign] = PROOFS) -> LifeSigns:
        """Boot overlays of the plan's disks in a domain that nobody else hears of, until one of `proofs`, a failure or the
        deadline. Nothing is left but the picture. DomainError when it cannot be tried at all."""
        return Rehearsal(self._connection, plan, accel=self.accel()).run(deadline_s=deadline_s, proofs=proofs)

    def clean_up_rehearsals(self, prefix: str = PREFIX) -> int:
        """Remove rehearsals that outlived their tokvm; `rehearsal_name(uuid)` is the one of a VM. How many there were."""
        return clean_up(self._connection, prefix)

    def close(self) -> None:
        self._connection.close()

    @property
    def _libvirt(self) -> ModuleType:
        return self._connection.libvirt

    def _where(self, uuid: str) -> str:
        return f"domain {uuid} on {self.url}"

    def _is_active(self, domain: Any) -> bool:
        with self._connection.translated("cannot ask for the domain's state", where=self.url):
            return bool(domain.isActive())

    def _own(self, uuid: str) -> Any | None:
        domain = self._connection.look_up(uuid)
        if domain is not None:
            self._refuse_stranger(domain, "touched")
        return domain

    def _refuse_stranger(self, domain: Any, verb: str) -> None:
        with self._connection.translated("cannot read the domain", where=self.url):
            stranger = source_name(domain.XMLDesc(0)) is None
            name, uuid = domain.name(), domain.UUIDString()
        if stranger:
            raise DomainError(
                f"{name!r} has this uuid but was not made by tokvm, so it was not {verb}",
                where=self._where(uuid),
                fix=f"look at it: `virsh -c {self.url} dumpxml {uuid}`; undefine it if it is a left-over",
            )

    def _make_room(self, name: str, uuid: str) -> None:
        """Nobody else holds the name or the uuid; our own domain under an earlier name is forgotten, its NVRAM kept."""
        namesake = self._connection.look_up_name(name)
        if namesake is not None and namesake.UUIDString() != uuid:
            raise DomainError(
                f"another VM, {namesake.UUIDString()}, already has the name {name!r}", where=self.url, fix="give another --name"
            )
        before = self._own(uuid)
        if before is None or before.name() == name:
            return
        if self._is_active(before):
            raise DomainError(
                f"it runs under the name {before.name()!r}", where=self._where(uuid), fix="stop it, or keep that name"
            )
        self._undefine(before, self._libvirt.VIR_DOMAIN_UNDEFINE_KEEP_NVRAM)

    def _undefine(self, domain: Any, flags: int) -> None:
        where = self._where(domain.UUIDString())
        with self._connection.translated("the domain cannot be forgotten", where=where, fix="undefine it with virsh"):
            domain.undefineFlags(flags)

    def _find_accel(self) -> Accel:
        verdict = probe_kvm().verdict if self._connection.is_local else Kvm.FORBIDDEN
        if verdict is Kvm.FORBIDDEN:
            # Another host, or another user's QEMU: only libvirt can say.
            return Accel.KVM if self._libvirt_has_kvm() else Accel.TCG
        return Accel.KVM if verdict is Kvm.WORKS else Accel.TCG

    def _libvirt_has_kvm(self) -> bool:
        try:
            self._connection.handle().getDomainCapabilities(None, "x86_64", None, "kvm", 0)
        except self._libvirt.libvirtError as exc:
            log.debug("%s: no KVM: %s", self.url, exc)
            return False
        return True

    @staticmethod
    def _without_direct_io(plan: DomainPlan) -> list[int]:
        return [index for index, disk in enumerate(plan.disks) if not disk.block and not _takes_direct_io(disk.path)]


def _pull_cables(domain: Any, xml: str, flag: int) -> None:
    for interface in ET.fromstring(xml).findall("devices/interface"):
        domain.updateDeviceFlags(with_link_down(interface), flag)


def _takes_direct_io(path: str) -> bool:
    """False where O_DIRECT is refused (tmpfs before Linux 6.6, some FUSE). What cannot be opened is libvirt's to judge."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC | os.O_NONBLOCK))
    except OSError as exc:
        return exc.errno != errno.EINVAL
    return True
