"""tokvm finish: commit, remove our snapshots, done."""

from __future__ import annotations

from tokvm.app.workshop import Workshop
from tokvm.cli import options
from tokvm.cli.output import print_json
from tokvm.cli.summaries import print_finish, print_lines


def finish(
    name: options.Name,
    state_dir: options.StateDir = None,
    json: options.Json = False,
    events: options.Events = False,
    dry_run: options.DryRun = False,
    record: options.Record = None,
    verbose: options.Verbose = 0,
) -> None:
    """Remove our snapshots from the source. After a cutover the old copy stays off and fenced, so that nobody starts it."""
    with (
        options.running(json=json, events=events, verbose=verbose) as reporter,
        options.recording(record, "finish") as recorder,
        Workshop.open(state_dir, reporter, recorder) as shop,
        shop.resume(name) as job,
    ):
        if dry_run:
            print_lines(job.finish_steps(), json=json)
            return
        report = job.migration.finish()
        if json:
            print_json(report.to_dict())
        else:
            print_finish(report)
