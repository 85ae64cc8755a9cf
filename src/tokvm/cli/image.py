"""tokvm image: what does an image file hold, and copy a chain of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tokvm.cli import options
from tokvm.cli.output import print_fields, print_json, print_table, say
from tokvm.cli.reporters import Reporter
from tokvm.core.units import format_bytes

image = typer.Typer(help="Look at disk images and convert them.", no_args_is_help=True, rich_markup_mode=None)

Images = Annotated[list[str], typer.Argument(help="Image files, base first, then each child.", metavar="BASE [CHILD]…")]
OneImage = Annotated[str, typer.Argument(help="An image file.", metavar="IMAGE")]
ForceLinkage = Annotated[bool, typer.Option("--force-linkage", help="Chain files whose ids do not match (both are named).")]


@image.command()
def info(file: OneImage, json: options.Json = False, verbose: options.Verbose = 0) -> None:
    """Everything a person wants to know about one image file."""
    from tokvm.app import images

    with options.running(json=json, verbose=verbose):
        found = images.describe(file)
        if json:
            print_json(found)
        else:
            print_fields(found.items())


@image.command("map")
def map_command(
    files: Images, json: options.Json = False, force_linkage: ForceLinkage = False, verbose: options.Verbose = 0
) -> None:
    """What is where: DATA, ZERO and ABSENT ranges of a chain, like `qemu-img map`."""
    from tokvm.app import images

    with options.running(json=json, verbose=verbose), images.open_chain(files, force_linkage=force_linkage) as chain:
        rows = [images.extent_row(extent) for extent in images.map_extents(chain)]
        if json:
            print_json(rows)
        else:
            header = ("offset", "length", "kind", "file_offset", "layer")
            print_table(header, ([row.get(name, "") for name in header] for row in rows))


@image.command()
def convert(
    files: Images,
    to: Annotated[str, typer.Option("--to", help="A raw file or a block device.")],
    overwrite: Annotated[
        str | None,
        typer.Option("--overwrite", help="The target's size or serial: its content may be lost.", show_default=False),
    ] = None,
    json: options.Json = False,
    events: options.Events = False,
    force_linkage: ForceLinkage = False,
    verbose: options.Verbose = 0,
) -> None:
    """Copy a chain, all of it, to a raw file or block device."""
    from tokvm.app import images
    from tokvm.app.targets import target_spec

    with (
        options.running(json=json, events=events, verbose=verbose) as reporter,
        images.open_chain(files, force_linkage=force_linkage) as chain,
    ):
        result = images.convert(
            chain, target_spec(str(Path(to).absolute()), _consent(overwrite, to)), _ConvertProgress(reporter)
        )
        reporter.pass_end(0, "convert", result.data_bytes, result.seconds)
        if json:
            print_json(
                {
                    "target": to,
                    "size": chain.size,
                    "data_bytes": result.data_bytes,
                    "zero_bytes": result.zero_bytes,
                    "seconds": round(result.seconds, 3),
                }
            )
        else:
            say(f"{to}: {format_bytes(chain.size)}, of which {format_bytes(result.data_bytes)} are data")


def _consent(overwrite: str | None, to: str) -> str | None:
    """SIZE or SERIAL, also in the form PATH=SIZE that `sync` takes."""
    if overwrite is None:
        return None
    path, _, given = overwrite.rpartition("=")
    return given if path in (to, str(Path(to).absolute())) else overwrite


class _ConvertProgress:
    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter

    def begin(self, total: int) -> None:
        self._reporter.pass_begin(0, "convert", 0, total)

    def advance(self, count: int) -> None:
        self._reporter.advance(0, count)
