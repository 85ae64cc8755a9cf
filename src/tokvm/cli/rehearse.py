"""tokvm rehearse: will it boot on KVM? A throw-away copy of the last pass is morphed and booted while the source runs."""

from __future__ import annotations

from typing import Annotated

import typer

from tokvm.app.rehearsals import RehearsalWishes
from tokvm.app.workshop import Workshop
from tokvm.cli import options
from tokvm.cli.output import print_json
from tokvm.cli.summaries import print_rehearsal
from tokvm.core.errors import GuestError


def rehearse(
    name: options.Name,
    way: options.WayOption = None,
    virtio_win: options.VirtioWin = None,
    guest_root: options.GuestRoot = None,
    sign_serial: options.SignSerial = None,
    deadline: Annotated[str, typer.Option("--deadline", help="How long it may take to show life.", metavar="DURATION")] = "5m",
    boots: Annotated[
        int, typer.Option("--boots", help="Boot it so often: the typical one is foretold, each has to live.", min=1, max=9)
    ] = 1,
    state_dir: options.StateDir = None,
    json: options.Json = False,
    events: options.Events = False,
    record: options.Record = None,
    verbose: options.Verbose = 0,
) -> None:
    """Will it boot on KVM? A throw-away copy of the last pass is morphed and booted, isolated; the source goes on."""
    with (
        options.running(json=json, events=events, verbose=verbose) as reporter,
        options.recording(record, "rehearse") as recorder,
        Workshop.open(state_dir, reporter, recorder) as shop,
        shop.resume(name) as job,
    ):
        document = job.rehearse(
            RehearsalWishes(options.way(way), guest_root, virtio_win, sign_serial, options.seconds(deadline), boots)
        )
    if json:
        print_json(document)
    else:
        print_rehearsal(document)
    if not document["works"]:
        raise typer.Exit(GuestError.exit_code)
