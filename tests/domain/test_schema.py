from __future__ import annotations

from pathlib import Path

import pytest

from tokvm.core.errors import DomainError
from tokvm.domain.schema import SCHEMA, XMLLINT, Validation, validate

needs_schema = pytest.mark.skipif(not (SCHEMA.exists() and XMLLINT.exists()), reason="libvirt's schemas or xmllint are missing")


@needs_schema
@pytest.mark.parametrize("xml", ["<domain/>", "<domain type='kvm'><name>x</name><memroy>1</memroy></domain>", "no XML", ""])
def test_what_the_schema_does_not_know_is_refused_by_name(xml: str) -> None:
    with pytest.raises(DomainError, match="schema refuses") as caught:
        validate(xml, where="'web'")
    assert caught.value.where == "'web'"
    assert caught.value.fix


def test_without_the_schema_nothing_is_claimed(tmp_path: Path) -> None:
    assert validate("<domain/>", where="x", schema=tmp_path / "none.rng") is Validation.SKIPPED
