"""What a verb prints at its end: a table or lines for people, or one JSON document."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tokvm.core.errors import TokvmError
from tokvm.core.text import printable
from tokvm.core.units import format_bytes


def say(line: str) -> None:
    """One line on standard output, whatever the text in it holds."""
    print(printable(line))


def print_json(document: object) -> None:
    json.dump(document, sys.stdout, indent=2, default=str)
    sys.stdout.write("\n")
    sys.stdout.flush()


def print_json_stream(rows: Iterable[object]) -> None:
    """A JSON array, one element a line, written as it comes: a map may have millions of rows."""
    separator = "["
    for row in rows:
        sys.stdout.write(f"{separator} {json.dumps(row, default=str)}")
        separator = ",\n"
    sys.stdout.write("[]\n" if separator == "[" else "]\n")
    sys.stdout.flush()


def print_lines(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Rows that are too many to be laid out first: columns of a fixed width on a terminal, tab-separated off it."""
    wide = sys.stdout.isatty()
    for row in chain([headers], rows):
        cells = [printable(str(cell)) for cell in row]
        print("  ".join(f"{cell:>15}" for cell in cells[:-1]) + "  " + cells[-1] if wide else "\t".join(cells))


def print_tree(fields: Mapping[str, object], *, sizes: Sequence[str] = (), indent: str = "") -> None:
    """`name: value` lines, nested ones indented. `sizes`: names of fields in bytes, shown in units for people as well."""
    known = [(name, value) for name, value in fields.items() if value not in (None, "", [], {})]
    width = max((len(name) for name, value in known if not _nested(value)), default=0)
    for name, value in known:
        if isinstance(value, Mapping):
            print(f"{indent}{printable(name)}")
            print_tree(value, sizes=sizes, indent=indent + "  ")
        elif _nested(value):
            print(f"{indent}{printable(name)}")
            _print_items(value, sizes, indent + "  ")
        else:
            shown = printable(str(value))
            if name in sizes and isinstance(value, int):
                shown += f" ({format_bytes(value)})"
            print(f"{indent}{printable(name):<{width}}  {shown}")


def _nested(value: object) -> bool:
    return isinstance(value, (Mapping, list, tuple))


def _print_items(items: object, sizes: Sequence[str], indent: str) -> None:
    for number, item in enumerate(items if isinstance(items, (list, tuple)) else ()):
        if isinstance(item, Mapping):
            if number:
                print()
            print_tree(item, sizes=sizes, indent=indent)
        else:
            print(f"{indent}{printable(str(item))}")


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
