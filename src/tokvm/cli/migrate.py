"""tokvm migrate: sync, then cutover."""

from __future__ import annotations

from tokvm.app.probe import proof_of
from tokvm.app.workshop import Workshop
from tokvm.cli import options
from tokvm.cli.output import print_json
from tokvm.cli.requests import SshArguments, TargetArguments
from tokvm.cli.summaries import migrate_document, print_cutover, print_dry_run, print_sync


def migrate(
    source: options.SourceUrl,
    name: options.VmName,
    to: options.To = None,
    passes: options.Passes = None,
    budget: options.Budget = None,
    force_off: options.ForceOff = False,
    deadline: options.Deadline = "5m",
    proof: options.Proof = "5m",
    probe: options.Probe = None,
    overwrite: options.Overwrite = None,
    network: options.Network = None,
    libvirt: options.Libvirt = None,
    domain: options.Domain = None,
    machine: options.Machine = None,
    bus: options.Bus = None,
    rate_limit: options.RateLimit = None,
    state_dir: options.StateDir = None,
    json: options.Json = False,
    events: options.Events = False,
    dry_run: options.DryRun = False,
    record: options.Record = None,
    identity: options.Identity = None,
    ssh_config: options.SshFile = None,
    known_hosts: options.KnownHosts = None,
    accept_new_host_key: options.AcceptKey = False,
    silence: options.Silence = "30s",
    password_file: options.PasswordFile = None,
    tls_ca: options.TlsCa = None,
    tls_fingerprint: options.TlsFingerprint = None,
    clone_base: options.CloneBase = False,
    bytes_from: options.BytesFrom = None,
    nbd: options.Nbd = None,
    enable_cbt: options.EnableCbt = False,
    verbose: options.Verbose = 0,
) -> None:
    """Sync, then cut over: the whole migration in one command. Interrupted, the same command goes on."""
    ssh = SshArguments(
        identity,
        ssh_config,
        known_hosts,
        accept_new_host_key,
        silence,
        password_file,
        tls_ca,
        tls_fingerprint,
        clone_base,
        bytes_from,
        nbd,
        enable_cbt,
    )
    target = TargetArguments(to or [], overwrite or [], network or [], libvirt, domain, machine, bus, rate_limit)
    with (
        options.running(json=json, events=events, verbose=verbose) as reporter,
        options.recording(record, "migrate") as recorder,
        Workshop.open(state_dir, reporter, recorder) as shop,
    ):
        request, budget_s = target.request(ssh), options.duration(budget)
        deadline_s, proof_s, sign = options.seconds(deadline), options.seconds(proof), proof_of(probe)
        if dry_run:
            print_dry_run(shop.outline(source, name, request), json=json)
            return
        with shop.begin(source, name, request) as job:
            synced = job.sync_unless_cutting(passes=passes, budget_s=budget_s)
            report = job.cut_over(
                budget_s=budget_s,
                force_off=force_off,
                deadline_s=deadline_s,
                proof_s=proof_s,
                sign=sign,
            )
            status = job.migration.status()
        if json:
            print_json(migrate_document(status, report))
            return
        if synced is not None:
            print_sync(synced)
        print_cutover(report)
