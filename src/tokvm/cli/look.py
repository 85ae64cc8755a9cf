"""tokvm ls and tokvm check: look at a source without changing anything."""

from __future__ import annotations

from typing import Annotated

import typer

from tokvm.app import inventory
from tokvm.cli import options
from tokvm.cli.output import print_fields, print_json, print_table, say
from tokvm.cli.requests import SshArguments, TargetArguments
from tokvm.core.machine import Severity
from tokvm.core.units import format_bytes


def ls(
    source: options.SourceUrl,
    json: options.Json = False,
    identity: options.Identity = None,
    ssh_config: options.SshFile = None,
    known_hosts: options.KnownHosts = None,
    accept_new_host_key: options.AcceptKey = False,
    silence: options.Silence = "30s",
    password_file: options.PasswordFile = None,
    tls_ca: options.TlsCa = None,
    tls_fingerprint: options.TlsFingerprint = None,
    record: options.Record = None,
    verbose: options.Verbose = 0,
) -> None:
    """The VMs of a source."""
    with options.running(json=json, verbose=verbose) as reporter, options.recording(record, "ls") as recorder:
        ssh = SshArguments(
            identity, ssh_config, known_hosts, accept_new_host_key, silence, password_file, tls_ca, tls_fingerprint
        ).options()
        machines = inventory.list_machines(source, ssh, reporter.note, recorder)
        if json:
            print_json([{"uuid": m.uuid, "name": m.name, "power": m.power} for m in machines])
        else:
            print_table(("uuid", "power", "name"), ((m.uuid, m.power, m.name) for m in machines))


def check(
    source: options.SourceUrl,
    vm: Annotated[str, typer.Option("--vm", help="The VM's name or uuid.")],
    to: options.To = None,
    overwrite: options.Overwrite = None,
    network: options.Network = None,
    libvirt: options.Libvirt = None,
    domain: options.Domain = None,
    machine: options.Machine = None,
    bus: options.Bus = None,
    json: options.Json = False,
    identity: options.Identity = None,
    ssh_config: options.SshFile = None,
    known_hosts: options.KnownHosts = None,
    accept_new_host_key: options.AcceptKey = False,
    silence: options.Silence = "30s",
    password_file: options.PasswordFile = None,
    tls_ca: options.TlsCa = None,
    tls_fingerprint: options.TlsFingerprint = None,
    bytes_from: options.BytesFrom = None,
    nbd: options.Nbd = None,
    enable_cbt: options.EnableCbt = False,
    record: options.Record = None,
    verbose: options.Verbose = 0,
) -> None:
    """Can this VM be migrated? Every blocker before the first byte is copied (exit 10 when there is one)."""
    with options.running(json=json, verbose=verbose) as reporter, options.recording(record, "check") as recorder:
        ssh = SshArguments(
            identity,
            ssh_config,
            known_hosts,
            accept_new_host_key,
            silence,
            password_file,
            tls_ca,
            tls_fingerprint,
            bytes_from=bytes_from,
            nbd=nbd,
            enable_cbt=enable_cbt,
        )
        target = TargetArguments(to or [], overwrite or [], network or [], libvirt, domain, machine, bus)
        report = inventory.check(source, vm, target.request(ssh), reporter.note, recorder)
        if json:
            print_json(report.to_dict())
        else:
            _print_check(report)
        if report.blocked:
            raise typer.Exit(inventory.BLOCKED_EXIT)


def _print_check(report: inventory.CheckReport) -> None:
    vm = report.vm
    print_fields(
        (
            ("vm", vm.name),
            ("uuid", vm.uuid),
            ("power", vm.power),
            ("hardware", f"{vm.vcpus} vCPU, {format_bytes(vm.memory)} memory, {vm.firmware} firmware"),
        )
    )
    for index, disk in enumerate(vm.disks):
        target = f" → {report.targets[index].path}" if report.targets else ""
        print_fields([(f"disk {index}", f"{format_bytes(disk.size)} on {disk.storage or 'unknown storage'}{target}")])
    for nic in vm.nics:
        print_fields([(f"nic {nic.index}", f"{nic.mac} on {nic.network}")])
    for finding in report.findings:
        word = "BLOCKER" if finding.severity is Severity.BLOCKER else "warning"
        print_fields([(word, finding.what + (f" ({finding.where})" if finding.where else "")), ("   fix", finding.fix)])
    say("this VM cannot be migrated as it stands" if report.blocked else "nothing is in the way")
