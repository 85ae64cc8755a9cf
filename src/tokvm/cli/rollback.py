"""tokvm rollback: the source runs again."""

from __future__ import annotations

from typing import Annotated

import typer

from tokvm.app.workshop import Workshop
from tokvm.cli import options
from tokvm.cli.output import print_json
from tokvm.cli.summaries import print_lines, print_status


def rollback(
    name: options.Name,
    accept_data_loss: Annotated[
        bool, typer.Option("--accept-data-loss", help="The target has run: what it wrote is given up.")
    ] = False,
    state_dir: options.StateDir = None,
    json: options.Json = False,
    events: options.Events = False,
    dry_run: options.DryRun = False,
    record: options.Record = None,
    verbose: options.Verbose = 0,
) -> None:
    """Take the target away and start the source again. The synced disks stay, so that another cutover needs one delta only."""
    with (
        options.running(json=json, events=events, verbose=verbose) as reporter,
        options.recording(record, "rollback") as recorder,
        Workshop.open(state_dir, reporter, recorder) as shop,
        shop.resume(name) as job,
    ):
        if dry_run:
            print_lines(job.rollback_steps(), json=json)
            return
        status = job.migration.rollback(accept_data_loss=accept_data_loss)
        if json:
            print_json(status.to_dict())
        else:
            print_status(status)
