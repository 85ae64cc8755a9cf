"""Asking whether a target would be taken: the same answer as opening it, and nothing changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tokvm.core.errors import TargetError, UnsafeTarget
from tokvm.core.units import MiB
from tokvm.targets.open import TargetSpec
from tokvm.targets.probe import probe_target


def test_a_file_that_will_be_made_is_fine_and_is_not_made(tmp_path: Path) -> None:
    probe_target(TargetSpec(str(tmp_path / "new.raw")), size=MiB)
    assert list(tmp_path.iterdir()) == []


def test_what_opening_would_refuse_is_refused(tmp_path: Path) -> None:
    foreign, link = tmp_path / "foreign", tmp_path / "link"
    foreign.write_bytes(b"letters")
    link.symlink_to(tmp_path / "nothing")
    for path in (foreign, link, tmp_path, Path("/dev/full"), Path("/dev/sdqq9")):
        with pytest.raises(UnsafeTarget):
            probe_target(TargetSpec(str(path)), size=MiB)
    with pytest.raises(TargetError):
        probe_target(TargetSpec(str(tmp_path / "no" / "such" / "directory" / "disk.raw")), size=MiB)
    assert foreign.read_bytes() == b"letters"


@pytest.mark.root
def test_a_device_is_asked_and_given_back(loop: Callable[..., str], fingerprint: Callable[[str], str]) -> None:
    blank, full = loop(), loop(content={0: b"QFI\xfb"})
    before = fingerprint(blank), fingerprint(full)
    probe_target(TargetSpec(blank), size=8 * MiB)
    probe_target(TargetSpec(blank), size=8 * MiB)
    with pytest.raises(UnsafeTarget, match="qcow2"):
        probe_target(TargetSpec(full), size=8 * MiB)
    assert (fingerprint(blank), fingerprint(full)) == before
