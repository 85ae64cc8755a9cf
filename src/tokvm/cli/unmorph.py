"""tokvm unmorph: every byte that tokvm morph changed, as it was."""

from __future__ import annotations

from typing import Annotated

import typer

from tokvm.cli import options
from tokvm.cli.morph import Disks
from tokvm.cli.output import print_json, say


def unmorph(
    disks: Disks,
    forget: Annotated[
        bool, typer.Option("--forget", help="Keep the morph, drop the undo log: it can never be undone then.")
    ] = False,
    state_dir: options.StateDir = None,
    json: options.Json = False,
    verbose: options.Verbose = 0,
) -> None:
    """Put back every byte that tokvm morph changed; after any interruption of it, too. Before the VM runs, that is exact."""
    from tokvm.app import morph as app
    from tokvm.app.state import default_state_dir
    from tokvm.guest.base import GuestError
    from tokvm.guest.morph_store import Undone

    with options.running(json=json, verbose=verbose):
        result, touched = app.unmorph(disks, state_dir or default_state_dir(), forget=forget)
        if result is Undone.TOUCHED:
            raise GuestError(
                "the morph's changes are gone, but somebody else wrote to the disks since",
                where=", ".join(touched),
                fix="compare them with their source (tokvm image compare), or copy them anew",
            )
        outcome = "forgotten" if forget and touched else str(result)
        if json:
            print_json({"outcome": outcome, "disks": list(touched)})
        else:
            say(f"{outcome}: {', '.join(touched)}" if touched else outcome)
