"""tokvm cutover: stop, last delta, define, start, prove it lives; else roll back."""

from __future__ import annotations

from typing import Annotated

import typer

from tokvm.app.probe import proof_of
from tokvm.app.workshop import Workshop
from tokvm.cli import options
from tokvm.cli.output import print_json
from tokvm.cli.summaries import print_cutover, print_lines


def cutover(
    name: options.Name,
    budget: options.Budget = None,
    force_off: options.ForceOff = False,
    deadline: options.Deadline = "5m",
    proof: options.Proof = "5m",
    probe: options.Probe = None,
    way: options.WayOption = None,
    virtio_win: options.VirtioWin = None,
    guest_root: options.GuestRoot = None,
    despite_rehearsal: Annotated[
        bool, typer.Option("--despite-rehearsal", help="Cut over though the last rehearsal failed.")
    ] = False,
    state_dir: options.StateDir = None,
    json: options.Json = False,
    events: options.Events = False,
    dry_run: options.DryRun = False,
    record: options.Record = None,
    verbose: options.Verbose = 0,
) -> None:
    """Stop the VM, copy the last delta, start it on KVM. Whatever fails before the start rolls back: the source runs again."""
    with (
        options.running(json=json, events=events, verbose=verbose) as reporter,
        options.recording(record, "cutover") as recorder,
        Workshop.open(state_dir, reporter, recorder) as shop,
        shop.resume(name) as job,
    ):
        budget_s, deadline_s, proof_s = options.duration(budget), options.seconds(deadline), options.seconds(proof)
        sign = proof_of(probe)
        if dry_run:
            print_lines(job.cutover_steps(options.way(way)), json=json)
            return
        job.choose_way(options.way(way), virtio_win, guest_root)
        report = job.cut_over(
            budget_s=budget_s,
            force_off=force_off,
            deadline_s=deadline_s,
            proof_s=proof_s,
            sign=sign,
            despite_rehearsal=despite_rehearsal,
        )
        if json:
            print_json(report.to_dict())
        else:
            print_cutover(report)
