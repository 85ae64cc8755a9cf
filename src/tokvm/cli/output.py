"""What a verb prints at its end: a table or lines for people, or one JSON document."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tokvm.core.errors import TokvmError
from tokvm.core.text import printable


def say(line: str) -> None:
    """One line on standard output, whatever the text in it holds."""
    print(printable(line))


def print_json(document: object) -> None:
    json.dump(document, sys.stdout, indent=2, default=str)
    sys.stdout.write("\n")
    sys.stdout.flush()


def print_table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table on a terminal; tab-separated lines off it, for cut and awk."""
    texts = [[printable(str(cell)) for cell in row] for row in rows]
    if not sys.stdout.isatty():
        for row in [list(headers), *texts]:
            print("\t".join(row))
        return
    table = Table(*headers, box=None, pad_edge=False, header_style="bold")
    for row in texts:
        table.add_row(*(Text(cell) for cell in row))
    Console().print(table)


def print_fields(fields: Iterable[tuple[str, object]]) -> None:
    """Aligned `name: value` lines."""
    known = [(name, printable(str(value))) for name, value in fields if value not in (None, "")]
    width = max((len(name) for name, _ in known), default=0)
    for name, value in known:
        print(f"{name:<{width}}  {value}")


def error_document(error: TokvmError) -> dict[str, object]:
    return {
        "outcome": "error",
        "error": {
            "class": type(error).__name__,
            "exit_code": error.exit_code,
            "what": error.what,
            "where": error.where,
            "fix": error.fix,
        },
    }


def print_error(error: TokvmError) -> None:
    """What, where, fix on stderr."""
    where = f"{printable(error.where)}: " if error.where else ""
    lines = printable(error.what) if "\n" not in error.what else "\n".join(printable(line) for line in error.what.split("\n"))
    print(f"tokvm: {where}{lines}", file=sys.stderr)
    if error.fix:
        print(f"  next: {printable(error.fix)}", file=sys.stderr)
