"""tokvm sync: snapshot, base copy, delta passes; the VM runs; repeat at will."""

from __future__ import annotations

from tokvm.app.workshop import Workshop
from tokvm.cli import options
from tokvm.cli.output import print_json
from tokvm.cli.requests import SshArguments, TargetArguments
from tokvm.cli.summaries import print_dry_run, print_sync


def sync(
    source: options.SourceUrl,
    name: options.VmName,
    to: options.To = None,
    passes: options.Passes = None,
    budget: options.SyncBudget = None,
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
    """Copy a running VM's disks, then what changed since. Interrupted, the same command goes on; done, it syncs once more."""
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
        options.recording(record, "sync") as recorder,
        Workshop.open(state_dir, reporter, recorder) as shop,
    ):
        request, budget_s = target.request(ssh), options.duration(budget)
        if dry_run:
            print_dry_run(shop.outline(source, name, request), json=json)
            return
        with shop.begin(source, name, request) as job:
            report = job.migration.sync(passes=passes, budget_s=budget_s)
        if json:
            print_json(report.to_dict())
        else:
            print_sync(report)
