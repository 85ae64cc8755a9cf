"""tokvm status: what tokvm remembers of its migrations, and what comes next."""

from __future__ import annotations

from typing import Annotated

import typer

from tokvm.app.workshop import Workshop
from tokvm.cli import options
from tokvm.cli.output import print_json, print_table
from tokvm.cli.summaries import print_status


def status(
    name: Annotated[
        str | None, typer.Argument(help="One migration: the VM's name or uuid, or the id.", show_default=False)
    ] = None,
    state_dir: options.StateDir = None,
    json: options.Json = False,
    verbose: options.Verbose = 0,
) -> None:
    """Where each migration stands, from the journal alone: nothing is asked of any host."""
    with options.running(json=json, verbose=verbose) as reporter, Workshop.open(state_dir, reporter) as shop:
        found = shop.statuses() if name is None else [shop.status(name)]
        if json:
            print_json([one.to_dict() for one in found] if name is None else found[0].to_dict())
        elif name is not None:
            print_status(found[0])
        else:
            print_table(
                ("id", "phase", "passes", "vm", "source"), ((s.id, s.phase, s.passes_done, s.name, s.source) for s in found)
            )
