"""tokvm report: the whole story of a migration, with what was predicted beside what came."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tokvm.app.report import report_of
from tokvm.app.report_svg import as_svg, save_svg
from tokvm.app.workshop import Workshop
from tokvm.cli import options
from tokvm.cli.output import print_json, say
from tokvm.cli.summaries import print_report


def report(
    name: options.Name,
    svg: Annotated[
        Path | None, typer.Option("--svg", help="Draw it into this file, with the rehearsals' pictures.", show_default=False)
    ] = None,
    outside_clock: Annotated[
        str | None,
        typer.Option(
            "--outside-clock",
            help="The downtime as measured from outside: seconds (28s), or a JSON file with downtime_s (the lab's document).",
            metavar="FILE|SECONDS",
            show_default=False,
        ),
    ] = None,
    state_dir: options.StateDir = None,
    json: options.Json = False,
    verbose: options.Verbose = 0,
) -> None:
    """Phases, passes, rehearsals and downtime of a migration, from the journal alone; also after tokvm finish."""
    with options.running(json=json, verbose=verbose) as reporter, Workshop.open(state_dir, reporter) as shop:
        found = report_of(shop.journal, shop.state_dir, name, outside=outside_clock)
        if svg is not None:
            save_svg(svg, as_svg(found))
        if json:
            print_json(found.to_dict())
            return
        print_report(found)
        if svg is not None:
            say(f"drawn: {svg}")
