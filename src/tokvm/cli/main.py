"""The tokvm command. The only place that catches what nobody expected."""

from __future__ import annotations

import sys
import traceback
from typing import Annotated

import typer

from tokvm import __version__
from tokvm.cli.cutover import cutover
from tokvm.cli.finish import finish
from tokvm.cli.image import image
from tokvm.cli.lab import lab
from tokvm.cli.look import check, ls
from tokvm.cli.migrate import migrate
from tokvm.cli.modernise import modernise
from tokvm.cli.morph import morph
from tokvm.cli.output import print_error
from tokvm.cli.prestage import prestage
from tokvm.cli.rehearse import rehearse
from tokvm.cli.report import report
from tokvm.cli.rollback import rollback
from tokvm.cli.status import status
from tokvm.cli.sync import sync
from tokvm.cli.unmorph import unmorph
from tokvm.cli.verify import verify
from tokvm.core.errors import TokvmError

UNEXPECTED = 70  # EX_SOFTWARE of sysexits.h

cli = typer.Typer(
    help="Move virtual machines to KVM while they keep running.",
    epilog="A first look: tokvm ls xenserver://root@HOST, then tokvm check, sync, cutover, finish. Exit codes: docs/errors.md.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"tokvm {__version__}")
        raise typer.Exit


@cli.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    """Move virtual machines to KVM while they keep running."""


VERBS = (
    *(check, ls, sync, prestage, rehearse, cutover, migrate, status, report, rollback, finish, modernise),
    *(verify, morph, unmorph),
)
for verb in VERBS:
    cli.command()(verb)
cli.add_typer(image, name="image")
cli.add_typer(lab, name="lab")


def main() -> None:
    try:
        cli(prog_name="tokvm")
    except TokvmError as error:
        print_error(error)
        sys.exit(error.exit_code)
    except Exception:
        traceback.print_exc()
        print("tokvm: this is a defect in tokvm; nothing above says what to do, so do nothing and report it", file=sys.stderr)
        sys.exit(UNEXPECTED)


if __name__ == "__main__":
    main()
