"""The kept corpus of `fuzz/`: every input that once reached new code, and every one that was a finding, again."""

from __future__ import annotations

import importlib.util
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fuzz.targets import CORPUS, TARGETS, inputs

from tokvm.core.units import MiB
from tokvm.images.open import open_image

ROOT = Path(__file__).parents[2]
NIGHTLY_S = 120


@pytest.fixture(autouse=True)
def _no_logs() -> Iterator[None]:
    """The readers warn of most of these files."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.slow
def test_the_kept_inputs_are_read_or_refused(name: str) -> None:
    found = inputs(name)
    assert len(found) >= 10
    for path in found:
        try:
            TARGETS[name].run(path.read_bytes())
        except Exception as exc:
            raise AssertionError(f"{path.name} is a finding: {exc!r}; python -m fuzz {name} --replay --file {path}") from exc


@pytest.mark.parametrize("name", [name for name, target in TARGETS.items() if target.mutator is not None])
def test_seeds_come_through_the_windows(name: str) -> None:
    """Else the corpus is of files that mean nothing."""
    target = TARGETS[name]
    assert target.mutator is not None
    for image in target.images():
        file = target.mutator.windows.expand(target.compact(image))
        assert file.size == len(image)
        assert sum(len(window) for window in open_image(file).windows()) > 0


@pytest.mark.parametrize("name", [name for name, target in TARGETS.items() if target.mutator is not None])
@pytest.mark.slow
def test_the_mutator_repairs_what_it_changed(name: str) -> None:
    """Of changed seeds, some are read and some are refused: the changes get past the checksums, and they are changes."""
    target = TARGETS[name]
    assert target.mutator is not None
    seeds = [target.compact(image) for image in target.images()]
    windows, read = target.mutator.windows, 0
    for number in range(120):
        data = target.mutator.mutate(seeds[number % len(seeds)], number, lambda data, _size: data[::-1])
        assert len(data) == windows.length
        try:
            open_image(windows.expand(data))
        except Exception:  # noqa: BLE001 - what kind, the replay asks
            continue
        read += data not in seeds
    assert 5 <= read <= 115


def test_the_corpus_is_small() -> None:
    assert sum(path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()) <= MiB
    assert {path.name for path in CORPUS.iterdir()} == set(TARGETS)


@pytest.mark.nightly
@pytest.mark.timeout(NIGHTLY_S + 120)
@pytest.mark.parametrize("name", TARGETS)
def test_fuzzing_for_a_while(name: str, tmp_path: Path) -> None:
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is not installed (requirements/fuzz.txt)")
    done = subprocess.run(
        [sys.executable, "-m", "fuzz", name, "--seconds", str(NIGHTLY_S), "--work", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, errors="replace",
    )  # fmt: skip
    found = list((tmp_path / "findings").iterdir())
    assert done.returncode == 0, f"{done.stderr[-4000:]}\n{[path.read_bytes().hex() for path in found]}"
    assert not found
