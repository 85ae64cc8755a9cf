"""Does the guest come up on KVM? Tried on overlays, in a domain that is thrown away and that no network hears of.

    as in the cutover      kernel, firmware, buses, controllers, MAC addresses, slots
    different              uuid and name of its own; disks are qcow2 overlays (base untouched); each NIC ends in a UDP socket of
                           ours on 127.0.0.1 that answers nothing; the serial port is a file, and a BIOS writes there too;
                           UEFI variables are a copy; perhaps less memory; a panic leaves the domain standing

The first proof of life ends it (base.Sign); so does what a guest says when it will not come up (serial.FAILURES), its domain
crashing, pausing or going away, and the deadline. A picture of the screen is taken last; it proves nothing by itself.

The domain is transient and dies with our connection to libvirt (AUTODESTROY), so that a killed tokvm leaves no guest behind;
`clean_up` finds what a libvirtd that was killed too has left, by the metadata.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokvm.core.errors import DomainError, UsageError
from tokvm.core.machine import Firmware
from tokvm.core.text import readable
from tokvm.domain.agent import agent_answers, agent_is_there, system_name
from tokvm.domain.base import PROOFS, Accel, DiskFormat, DomainPlan, LifeSign, LifeSigns, Outcome, Sign
from tokvm.domain.connection import Connection
from tokvm.domain.frames import Frame, FrameKind, Listener
from tokvm.domain.nvram import find_template, write_variables
from tokvm.domain.picture import keep_picture, take_picture
from tokvm.domain.schema import validate
from tokvm.domain.serial import LOGIN, SerialLog, find_failure
from tokvm.domain.xml import Stage, domain_xml, rehearsal_folder

log = logging.getLogger(__name__)

PREFIX = "tokvm-rehearsal-"
LOOK_EVERY_S = 0.2
# The domain's own variables may lie in the same folder, under their own name (nvram.fd).
SERIAL, VARIABLES, PICTURE = "serial.log", "trial-nvram.fd", "screen.png"

_SIGNS = {FrameKind.DHCP: Sign.DHCP, FrameKind.ARP: Sign.ARP, FrameKind.ROUTER_SOLICITATION: Sign.IPV6}


@dataclass(frozen=True, slots=True, kw_only=True)
class RehearsalPlan:
    """`plan` is the domain as the cutover will make it, `overlays` the absolute paths of qcow2 files over its disks, in their
    order. `folder` is ours alone and reachable for QEMU's user; the picture stays in it. `memory`: bytes, None for the VM's.
    `login` matches a serial line that a guest writes when it is up."""

    plan: DomainPlan
    overlays: tuple[str, ...]
    folder: Path
    memory: int | None = None
    login: str = LOGIN


def rehearsal_name(vm_uuid: str) -> str:
    """The name of a VM's rehearsal domain: there is one at a time."""
    return f"{PREFIX}{vm_uuid}"


def rehearsed(plan: RehearsalPlan) -> DomainPlan:
    """The plan of the domain that is thrown away."""
    real = plan.plan
    if len(plan.overlays) != len(real.disks):
        raise DomainError(f"{len(plan.overlays)} overlays for {len(real.disks)} disks", where=repr(real.vm.name))
    disks = tuple(
        replace(disk, path=path, block=False, format=DiskFormat.QCOW2)
        for disk, path in zip(real.disks, plan.overlays, strict=True)
    )
    vm = replace(real.vm, uuid=str(uuid.uuid5(uuid.UUID(real.vm.uuid), "rehearsal")), memory=plan.memory or real.vm.memory)
    nvram = str(plan.folder / VARIABLES) if vm.firmware is Firmware.UEFI else ""
    return replace(real, vm=vm, name=rehearsal_name(real.vm.uuid), disks=disks, nvram=nvram)


def clean_up(connection: Connection, prefix: str = PREFIX) -> int:
    """Destroy and forget every rehearsal whose name starts so, and remove its files. The caller sees to it that none of them is
    still being watched (a VM's migration is locked). How many there were."""
    with connection.translated("cannot look for rehearsals", where=connection.uri):
        found = [one for one in connection.handle().listAllDomains(0) if one.name().startswith(prefix)]
        left = [(one, folder) for one in found if (folder := rehearsal_folder(one.XMLDesc(0))) is not None]
    for domain, folder in left:
        log.info("%s: removing the rehearsal %s", connection.uri, domain.name())
        _remove(connection, domain)
        if connection.is_local:
            _forget_files(Path(folder))
    return len(left)


class Rehearsal:
    """One try. DomainError of `run`: it could not be tried, which says nothing about the guest."""

    def __init__(self, connection: Connection, plan: RehearsalPlan, *, accel: Accel) -> None:
        self._connection = connection
        self._plan = plan
        self._accel = accel
        self._where = f"rehearsal of {plan.plan.vm.name!r}"
        try:
            self._login = re.compile(plan.login)
        except re.error as failed:
            raise UsageError(f"{plan.login!r} is no regular expression: {failed}", where=self._where) from failed

    def run(self, *, deadline_s: float, proofs: frozenset[Sign] = PROOFS) -> LifeSigns:
        """Start, watch until a proof, a failure or `deadline_s` after the start, photograph, remove."""
        if not self._connection.is_local:
            raise DomainError(
                "a rehearsal needs libvirt on this host: its overlays, serial port and network are here",
                where=self._connection.uri,
                fix="run tokvm on the target, with --libvirt qemu:///system",
            )
        clean_up(self._connection, rehearsal_name(self._plan.plan.vm.uuid))
        with ExitStack() as stack:
            # What a killed run wrote must not be taken for this guest's.
            _forget_files(self._plan.folder)
            (self._plan.folder / PICTURE).unlink(missing_ok=True)
            stack.callback(_forget_files, self._plan.folder)
            listeners = [stack.enter_context(Listener(nic.mac)) for nic in self._plan.plan.vm.nics]
            self._prepare_variables()
            xml = self._xml(listeners)
            watch = _Watch(self._connection, SerialLog(self._plan.folder / SERIAL), listeners, self._login, proofs)
            domain = stack.enter_context(self._running(xml))
            seen = watch.until(domain, deadline_s)
            return replace(seen, picture=self._photograph(domain))

    def _prepare_variables(self) -> None:
        real = self._plan.plan
        if real.vm.firmware is Firmware.UEFI:
            template = Path(real.nvram) if real.nvram and Path(real.nvram).exists() else None
            template = template or find_template(machine=real.machine, secure_boot=real.vm.secure_boot)
            write_variables(self._plan.folder / VARIABLES, template)

    def _xml(self, listeners: list[Listener]) -> str:
        folder = self._plan.folder
        sinks = tuple(listener.sink for listener in listeners)
        stage = Stage(self._plan.plan.vm.uuid, str(folder), str(folder / SERIAL), sinks)
        xml = domain_xml(rehearsed(self._plan), accel=self._accel, stage=stage)
        validate(xml, where=self._where)
        return xml

    @contextmanager
    def _running(self, xml: str) -> Iterator[Any]:
        libvirt = self._connection.libvirt
        handle = self._connection.handle()
        flags = libvirt.VIR_DOMAIN_START_AUTODESTROY | libvirt.VIR_DOMAIN_START_VALIDATE
        fix = "look at the plan's disks and networks; QEMU's own words are in /var/log/libvirt/qemu/"
        try:
            with self._connection.translated("the rehearsal does not start", where=self._where, fix=fix):
                domain = handle.createXML(xml, flags)
            log.info("%s: started as %s", self._where, domain.name())
            yield domain
        finally:
            # By name: the start may have failed for us and not for libvirt.
            clean_up(self._connection, rehearsal_name(self._plan.plan.vm.uuid))

    def _photograph(self, domain: Any) -> Path | None:
        """A picture is worth having, not worth failing for."""
        path = self._plan.folder / PICTURE
        try:
            keep_picture(path, take_picture(self._connection.handle(), domain))
        except (self._connection.libvirt.libvirtError, DomainError, OSError) as failed:
            log.debug("%s: no picture: %s", self._where, failed)
            return None
        return path


class _Watch:
    """Looks at everything that a guest could show life by, again and again. Its clock counts from when it is made."""

    def __init__(
        self,
        connection: Connection,
        serial: SerialLog,
        listeners: list[Listener],
        login: re.Pattern[str],
        proofs: frozenset[Sign],
    ) -> None:
        self._connection, self._serial, self._listeners = connection, serial, listeners
        self._login, self._proofs = login, proofs
        self._began = time.monotonic()
        self._signs: dict[Sign, LifeSign] = {}

    def until(self, domain: Any, deadline_s: float) -> LifeSigns:
        """A proof, a failure, or the deadline."""
        while True:
            ended = self._ended(domain)  # asked first: what the guest said before its end is then there to be read
            verdict = self._look(domain, alive=ended is None)
            if verdict is None and ended is not None:
                verdict = self._verdict(Outcome.FAILED, ended)
            if verdict is None and self._elapsed() > deadline_s:
                verdict = self._verdict(Outcome.SILENT, f"nothing proved that it lives within {deadline_s:g} s")
            if verdict is not None:
                return verdict
            time.sleep(LOOK_EVERY_S)

    def _look(self, domain: Any, *, alive: bool) -> LifeSigns | None:
        for line in self._serial.new_lines():
            # A panic may share the line of a prompt.
            if not self._proof() and (failure := find_failure(line)):
                return self._verdict(Outcome.FAILED, str(failure))
            if self._login.search(line):
                self._note(Sign.SERIAL, readable(line.strip()))
        for frame in self._frames():
            self._note(_SIGNS[frame.kind], " ".join(filter(None, (frame.mac, frame.detail))))
        if alive and not self._proof() and self._agent(domain):
            self._note(Sign.AGENT, system_name(self._connection, domain))
        proof = self._proof()
        return self._verdict(Outcome.ALIVE, f"{proof.sign} after {proof.after_s:.1f} s: {proof.detail}") if proof else None

    def _proof(self) -> LifeSign | None:
        return next((self._signs[sign] for sign in Sign if sign in self._proofs and sign in self._signs), None)

    def _frames(self) -> list[Frame]:
        return [frame for listener in self._listeners for frame in listener.frames()]

    def _agent(self, domain: Any) -> bool:
        try:
            there = agent_is_there(domain.XMLDesc(0))
        except self._connection.libvirt.libvirtError:
            return False
        return there and agent_answers(self._connection, domain)

    def _ended(self, domain: Any) -> str | None:
        """Why the domain cannot go on by itself; None while it can."""
        libvirt = self._connection.libvirt
        try:
            state, reason = domain.state()
        except libvirt.libvirtError as failed:
            if failed.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
                raise DomainError(
                    f"libvirt went away: {failed}", where=domain.name(), fix="run the same command again"
                ) from failed
            return "it switched itself off, or its QEMU died"
        if state == libvirt.VIR_DOMAIN_PAUSED and reason == libvirt.VIR_DOMAIN_PAUSED_IOERROR:
            return "it was paused by an error of its disks: perhaps the overlays' file system is full"
        ends = {
            libvirt.VIR_DOMAIN_PAUSED: "it was paused",
            libvirt.VIR_DOMAIN_PMSUSPENDED: "it put itself to sleep",
            libvirt.VIR_DOMAIN_CRASHED: "it crashed",
            libvirt.VIR_DOMAIN_SHUTOFF: "it switched itself off, or its QEMU died",
        }
        return ends.get(state)

    def _note(self, sign: Sign, detail: str) -> None:
        if sign not in self._signs:
            log.debug("%s after %.1f s: %s", sign, self._elapsed(), detail)
            self._signs[sign] = LifeSign(sign, self._elapsed(), detail)

    def _verdict(self, outcome: Outcome, why: str) -> LifeSigns:
        return LifeSigns(outcome, self._elapsed(), why, tuple(self._signs.values()), self._serial.tail)

    def _elapsed(self) -> float:
        return time.monotonic() - self._began


def _remove(connection: Connection, domain: Any) -> None:
    """Gone afterwards, whatever it was; a transient domain ends by itself at any moment."""
    libvirt = connection.libvirt
    with connection.translated("a rehearsal cannot be removed", where=connection.uri, fix="destroy it with virsh"):
        for act in (domain.destroy, lambda: domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_NVRAM)):
            try:
                act()
            except libvirt.libvirtError as failed:
                if failed.get_error_code() not in (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_OPERATION_INVALID):
                    raise


def _forget_files(folder: Path) -> None:
    """The files of a rehearsal but for its picture. virtlogd numbers what it has put aside: serial.log.0 …"""
    for file in (*folder.glob(f"{SERIAL}*"), folder / VARIABLES):
        with suppress(OSError):
            file.unlink()
