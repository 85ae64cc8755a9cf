"""What a source holds and what is in the way of one VM: reads only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from tokvm.app.plan import Plan, Request, SshOptions, TargetChoice, domain_plan, new_plan, unmapped
from tokvm.app.sources import open_source
from tokvm.app.targets import spec_of
from tokvm.core.errors import Blocked, DomainError, TargetError
from tokvm.core.machine import Finding, Severity, VirtualMachine
from tokvm.domain.host import LibvirtHost
from tokvm.sources.base import MachineSummary, Source
from tokvm.targets.probe import probe_target

if TYPE_CHECKING:
    from tokvm.remote.recording import Recorder

BLOCKED_EXIT = Blocked.exit_code
Note = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class CheckReport:
    """The answer of `tokvm check`: the VM as the source describes it, and every finding."""

    vm: VirtualMachine
    targets: tuple[TargetChoice, ...]
    findings: tuple[Finding, ...]

    @property
    def blocked(self) -> bool:
        return any(finding.severity is Severity.BLOCKER for finding in self.findings)

    def to_dict(self) -> dict[str, object]:
        return {
            "outcome": "blocked" if self.blocked else "clear",
            "vm": asdict(self.vm),
            "targets": [choice.path for choice in self.targets],
            "findings": [asdict(finding) for finding in self.findings],
        }


@contextmanager
def reached(url: str, ssh: SshOptions, note: Note, recorder: Recorder | None = None) -> Iterator[Source]:
    """An open source; the host key's fingerprint is told when a new key was learnt."""
    source = open_source(url, ssh, recorder)
    try:
        if ssh.accept_new_host_key:
            fingerprint = getattr(source, "fingerprint", None)
            if fingerprint is not None:
                note(f"host key of {source.url}: {fingerprint()}")
        yield source
    finally:
        source.close()


def list_machines(url: str, ssh: SshOptions, note: Note, recorder: Recorder | None = None) -> list[MachineSummary]:
    with reached(url, ssh, note, recorder) as source:
        return sorted(source.list_machines(), key=lambda machine: (machine.name, machine.uuid))


def check(url: str, name: str, request: Request, note: Note, recorder: Recorder | None = None) -> CheckReport:
    """Everything that can be known before the first byte: the VM's own blockers, the targets, the libvirt."""
    with reached(url, request.ssh, note, recorder) as source:
        vm = source.inspect(source.find(name))
        findings = list(source.check(vm))
        plan = new_plan(source.url, vm, request) if request.to else None
    if plan is not None:
        findings += [*check_targets(vm, plan.targets), *unmapped(vm, plan.networks), *check_libvirt(vm, plan)]
    return CheckReport(vm, () if plan is None else plan.targets, tuple(findings))


def check_libvirt(vm: VirtualMachine, plan: Plan) -> list[Finding]:
    """What would keep libvirt from running it. No libvirt at all is a warning: the disks can be copied without."""
    host = LibvirtHost(plan.libvirt)
    try:
        host.reach()
        return host.check(domain_plan(vm, plan))
    except DomainError as error:
        return [Finding(Severity.WARNING, f"{error.what} (a cutover needs it, a sync does not)", error.fix, error.where)]
    finally:
        host.close()


def check_targets(vm: VirtualMachine, targets: Sequence[TargetChoice]) -> list[Finding]:
    """What the interlocks would refuse, found without writing a byte."""
    findings = []
    for disk, choice in zip(vm.disks, targets, strict=False):
        try:
            probe_target(spec_of(choice), size=disk.size)
        except TargetError as error:
            findings.append(Finding(Severity.BLOCKER, error.what, error.fix, error.where or choice.path))
    return findings
