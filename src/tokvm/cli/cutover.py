"""tokvm cutover: stop, last delta, define, start, prove it lives; else roll back."""

from __future__ import annotations

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
    state_dir: options.StateDir = None,
    json: options.Json = False,
    events: options.Events = False,
    dry_run: options.DryRun = False,
    verbose: options.Verbose = 0,
) -> None:
    """Stop the VM, copy the last delta, start it on KVM. Whatever fails before the start rolls back: the source runs again."""
    with (
        options.running(json=json, events=events, verbose=verbose) as reporter,
        Workshop.open(state_dir, reporter) as shop,
        shop.resume(name) as job,
    ):
        if dry_run:
            print_lines(job.cutover_steps(), json=json)
            return
        report = job.cut_over(
            budget_s=options.duration(budget),
            force_off=force_off,
            deadline_s=options.duration(deadline) or 300.0,
            proof_s=options.duration(proof) or 0.0,
            probe=probe,
        )
        if json:
            print_json(report.to_dict())
        else:
            print_cutover(report)
