"""docs/vmware.md says which test shows what: each of them is there."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs/vmware.md"


def test_every_test_that_the_table_of_traps_names_is_there() -> None:
    named = re.findall(r"`(test_\w+)::(test_\w+)`", PAGE.read_text(encoding="utf-8"))
    assert len(named) > 50
    files = {path.stem: path.read_text(encoding="utf-8") for path in TESTS.rglob("test_*.py")}
    assert [f"{file}::{name}" for file, name in named if f"def {name}(" not in files.get(file, "")] == []
    rows = [line for line in PAGE.read_text(encoding="utf-8").rpartition("## Traps")[2].splitlines() if line.startswith("| ")]
    assert [row for row in rows[1:] if not row.startswith("| **") and "`test_" not in row] == []
