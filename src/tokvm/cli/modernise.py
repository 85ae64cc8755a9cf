"""tokvm modernise: virtio, at a planned restart, for a VM that was cut over on compatible hardware or by its kernel alone."""

from __future__ import annotations

from typing import Annotated

import typer

from tokvm.app.guests import ModernWishes
from tokvm.app.probe import proof_of
from tokvm.app.workshop import Workshop
from tokvm.cli import options
from tokvm.cli.output import print_json, say
from tokvm.core.units import format_duration


def modernise(
    name: options.Name,
    way: Annotated[str | None, typer.Option("--way", help="How: micro or virt-v2v [micro].", show_default=False)] = None,
    virtio_win: options.VirtioWin = None,
    sign_serial: options.SignSerial = None,
    probe: options.Probe = None,
    deadline: options.Deadline = "5m",
    proof: options.Proof = "5m",
    state_dir: options.StateDir = None,
    json: options.Json = False,
    events: options.Events = False,
    verbose: options.Verbose = 0,
) -> None:
    """Shut the migrated VM down, give it virtio, boot a copy to see that it works, and start it. It is down meanwhile."""
    with (
        options.running(json=json, events=events, verbose=verbose) as reporter,
        Workshop.open(state_dir, reporter) as shop,
    ):
        wishes = ModernWishes(
            options.way(way),
            sign_serial,
            proof_of(probe),
            deadline_s=options.seconds(deadline),
            proof_s=options.seconds(proof),
            virtio_win=virtio_win,
        )
        document = shop.modernise(name, wishes)
    if json:
        print_json(document)
        return
    parts = document["downtime_s"]
    say(str(document["outcome"]))
    for part, seconds in parts.items() if isinstance(parts, dict) else ():
        say(f"downtime {part}: {format_duration(seconds)}")
