"""tokvm image: what do image files hold, and copy, apply, compare and check them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tokvm.cli import options
from tokvm.cli.output import print_json, print_json_stream, print_lines, print_tree, say
from tokvm.cli.reporters import Reporter
from tokvm.core.errors import UsageError, VerifyError
from tokvm.core.units import format_bytes

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from tokvm.app.compare import Comparison
    from tokvm.app.convert import Target
    from tokvm.app.image_files import Formats
    from tokvm.images.chain import Chain
    from tokvm.transfer.checkpoint import PassResult

image = typer.Typer(
    help="Look at disk images, copy chains of them, and apply single layers. VHD, VHDX and VMDK of every kind.",
    epilog="A VMDK descriptor's extent files are found beside it by its own name (disk.vmdk: disk-flat.vmdk); list others too.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Images = Annotated[list[str], typer.Argument(help="Image files, base first, then each child.", metavar="BASE [CHILD]…")]
Layers = Annotated[
    list[str], typer.Argument(help="The layer to apply; several are laid over one another first.", metavar="LAYER [LAYER]…")
]
AnyImages = Annotated[list[str], typer.Argument(help="Image files.", metavar="IMAGE…")]
ForceLinkage = Annotated[bool, typer.Option("--force-linkage", help="Go on where ids do not match (both are named).")]
Format = Annotated[
    list[str] | None,
    typer.Option(
        "--format",
        help="vhd, vhdx, vmdk or raw, for all files; FILE=FORMAT for one (repeatable) [asked of each file's bytes].",
        show_default=False,
    ),
]
Overwrite = Annotated[
    str | None,
    typer.Option("--overwrite", help="The target's size or serial: its content may be lost.", show_default=False),
]
TargetFormat = Annotated[
    str | None,
    typer.Option("--target-format", help="raw or qcow2 [qcow2 for a name that ends in .qcow2, else raw].", show_default=False),
]


@image.command()
def info(files: AnyImages, formats: Format = None, json: options.Json = False, verbose: options.Verbose = 0) -> None:
    """Everything a person wants to know about image files."""
    from tokvm.app import images

    with options.running(json=json, verbose=verbose):
        found = images.describe(files, _formats(formats))
        if json:
            print_json(found[0] if len(found) == 1 else found)
            return
        for number, described in enumerate(found):
            if number:
                say("")
            print_tree(
                described, sizes=("file_size", "virtual_size", "block_size", "grain_size", "size", "chs_size", "original_size")
            )


@image.command("map")
def map_command(
    files: Images,
    formats: Format = None,
    json: options.Json = False,
    force_linkage: ForceLinkage = False,
    verbose: options.Verbose = 0,
) -> None:
    """What is where: DATA, ZERO and ABSENT ranges of a chain, with the keys of `qemu-img map --output=json`."""
    from tokvm.app import images

    with options.running(json=json, verbose=verbose), _open_chain(files, formats, force_linkage=force_linkage) as chain:
        if json:
            print_json_stream(images.map_rows(chain))
        else:
            header = ("start", "length", "kind", "depth", "offset", "file")
            print_lines(header, ([row.get(name, "") for name in header] for row in images.map_rows(chain)))


@image.command()
def convert(
    files: Images,
    to: Annotated[str, typer.Option("--to", help="A raw or qcow2 file, or a block device.")],
    overwrite: Overwrite = None,
    target_format: TargetFormat = None,
    formats: Format = None,
    json: options.Json = False,
    events: options.Events = False,
    force_linkage: ForceLinkage = False,
    verbose: options.Verbose = 0,
) -> None:
    """Copy a chain, all of it, to a raw file, a qcow2 file or a block device. Broken off, the same command goes on."""
    from tokvm.app.convert import convert as act

    with (
        options.running(json=json, events=events, verbose=verbose) as reporter,
        _open_chain(files, formats, force_linkage=force_linkage) as chain,
    ):
        target = _target(to, overwrite, target_format)
        result = act(chain, target, _Progress(reporter), force_linkage=force_linkage)
        _told(reporter, result, "convert", to, chain.size, json=json)


@image.command()
def apply(
    files: Layers,
    to: Annotated[str, typer.Option("--to", help="A target that holds the disk below the layer.")],
    overwrite: Overwrite = None,
    target_format: TargetFormat = None,
    formats: Format = None,
    json: options.Json = False,
    events: options.Events = False,
    force_linkage: ForceLinkage = False,
    verbose: options.Verbose = 0,
) -> None:
    """Write what a layer says onto a target that holds what it was made over; a skipped, repeated or swapped one is refused."""
    from tokvm.app.convert import apply as act

    with (
        options.running(json=json, events=events, verbose=verbose) as reporter,
        _open_chain(files, formats, force_linkage=force_linkage) as chain,
    ):
        target = _target(to, overwrite, target_format)
        result = act(chain, target, _Progress(reporter), force_linkage=force_linkage)
        _told(reporter, result, "apply", to, chain.size, json=json)


@image.command()
def compare(
    files: Images,
    to: Annotated[
        str | None, typer.Option("--to", help="A target: does it hold the chain's content?", show_default=False)
    ] = None,
    target_format: TargetFormat = None,
    other: Annotated[
        list[str] | None,
        typer.Option("--with", help="An image to compare with; repeat it for its children.", show_default=False),
    ] = None,
    formats: Format = None,
    json: options.Json = False,
    events: options.Events = False,
    force_linkage: ForceLinkage = False,
    verbose: options.Verbose = 0,
) -> None:
    """Does a target (--to, read past the page cache) or another chain (--with) hold the same bytes? Exit code 14 if not."""
    from contextlib import closing

    from tokvm.app import compare as comparing
    from tokvm.images.random_access import ChainBytes

    with (
        options.running(json=json, events=events, verbose=verbose) as reporter,
        _open_chain(files, formats, force_linkage=force_linkage) as chain,
    ):
        if to is not None and not other:
            with closing(_target(to, None, target_format).open_to_read()) as target:
                found = comparing.compare(chain, target, _Progress(reporter))
        elif other and to is None:
            with _open_chain(other, formats, force_linkage=force_linkage) as others:
                found = comparing.compare(chain, ChainBytes(others), _Progress(reporter))
        else:
            raise UsageError("say what to compare with", fix="--to TARGET for a target, or --with IMAGE for images")
        _compared(found, to or (other or [""])[-1], json=json)


@image.command()
def verify(
    files: Images,
    sha256: Annotated[bool, typer.Option("--sha256", help="Also hash the raw content, absent ranges as zeros.")] = False,
    formats: Format = None,
    json: options.Json = False,
    events: options.Events = False,
    force_linkage: ForceLinkage = False,
    verbose: options.Verbose = 0,
) -> None:
    """Is a chain whole? Checks every table and reads every byte; nothing is written."""
    from tokvm.app import compare as comparing

    with (
        options.running(json=json, events=events, verbose=verbose) as reporter,
        _open_chain(files, formats, force_linkage=force_linkage) as chain,
    ):
        found = comparing.verify(chain, _Progress(reporter), hashed=sha256)
        if json:
            print_json(found.to_dict() | {"partial": chain.partial})
            return
        parts = f"{format_bytes(found.data_bytes)} data, {format_bytes(found.zero_bytes)} zeros"
        parent = f"; a layer over {chain.parent_identity}" if chain.partial else ""
        say(f"{chain.name}: whole; {format_bytes(found.size)}: {parts}, {format_bytes(found.absent_bytes)} absent{parent}")
        if found.sha256 is not None:
            say(f"sha256 {found.sha256}")


def _open_chain(files: list[str], formats: list[str] | None, *, force_linkage: bool) -> AbstractContextManager[Chain]:
    from tokvm.app import image_files

    return image_files.open_chain(files, force_linkage=force_linkage, formats=_formats(formats))


def _formats(texts: list[str] | None) -> Formats:
    from tokvm.app.image_files import Formats

    return Formats.parse(texts or [])


def _target(to: str, overwrite: str | None, format_: str | None) -> Target:
    from tokvm.app.convert import Target

    if format_ not in (None, "raw", "qcow2"):
        raise UsageError(f"{format_!r} is no target format", fix="--target-format raw, or qcow2")
    chosen = format_ or ("qcow2" if to.endswith(".qcow2") else "raw")
    return Target(str(Path(to).absolute()), chosen, _consent(overwrite, to))


def _consent(overwrite: str | None, to: str) -> str | None:
    """SIZE or SERIAL, also in the form PATH=SIZE that `sync` takes."""
    if overwrite is None:
        return None
    path, _, given = overwrite.rpartition("=")
    return given if path in (to, str(Path(to).absolute())) else overwrite


def _told(reporter: Reporter, result: PassResult, what: str, to: str, size: int, *, json: bool) -> None:
    reporter.pass_end(0, what, result.run_bytes, result.seconds)
    if json:
        said = {"data_bytes": result.data_bytes, "zero_bytes": result.zero_bytes, "seconds": round(result.seconds, 3)}
        print_json({"target": to, "size": size} | said)
    else:
        say(f"{to}: {format_bytes(size)}, of which {format_bytes(result.data_bytes)} data were written")


def _compared(found: Comparison, other: str, *, json: bool) -> None:
    if json:
        print_json(found.to_dict())
    if not found.same:
        first = found.ranges[0]
        raise VerifyError(
            f"{found.differing_bytes} bytes differ; the first {first[1]} of them at {first[0]:#x}",
            where=other,
            fix="see all ranges with --json; if it should hold the same, convert again",
        )
    if not json:
        say(f"{other}: the same, {format_bytes(found.compared_bytes)} compared")


class _Progress:
    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter

    def begin(self, what: str, total: int, done: int) -> None:
        self._reporter.pass_begin(0, what, 0, total)
        if done:
            self._reporter.note(f"{what} goes on behind {format_bytes(done)} that were done before")
            self._reporter.advance(0, done)

    def advance(self, count: int) -> None:
        self._reporter.advance(0, count)
