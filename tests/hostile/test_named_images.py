"""Every named hostile image, by the real command, traced: what it opens, says, writes and costs."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from _pytest.mark.structures import ParameterSet
from tests.hostile.case import Hostile, Outcome
from tests.hostile.checks import check_cost, check_output, check_refused, check_trace
from tests.hostile.conftest import ROOT, Commands, Done
from tests.hostile.images import IMAGES
from tests.hostile.path_images import SECRET
from tests.hostile.traces import calls
from tests.hostile.vhd_images import SIZE, vhd

FROM_THE_START = (
    "path: extent named an absolute path",
    "path: its extent is a symbolic link",
    "probe: qcow2 with a backing file",
)
REFUSED_EARLY = (Outcome.OPEN, Outcome.WALK)


def named(test: str) -> list[ParameterSet]:
    """The table as parameters of a test."""
    made = []
    for name, case in IMAGES.items():
        fails = case.xfail and case.xfail_only in ("", test)
        marks = [pytest.mark.xfail(strict=True, reason=case.xfail)] if fails else []
        made.append(pytest.param(name, marks=[*marks, *([pytest.mark.root] if case.root else [])], id=name))
    return made


@dataclass(frozen=True)
class Held:
    """A target that holds a good disk, and its note. No hostile image may change either."""

    target: Path

    @property
    def note(self) -> Path:
        return Path(f"{self.target}.tokvm.json")

    def digest(self) -> str:
        return hashlib.sha256(self.target.read_bytes() + self.note.read_bytes()).hexdigest()


def outputs(done: Done) -> list[Path]:
    """Where the runner puts what it prints."""
    return [done.trace.parent / f"{done.job}.{stream}" for stream in ("stdout", "stderr")]


class Bench:
    """One hostile image in a folder of its own, and the command to try on it."""

    def __init__(self, commands: Commands, held: Held, case: Hostile, folder: Path, good: Done) -> None:
        self._commands = commands
        self._good = good
        self.held = held
        self.case = case
        self.folder = folder
        (folder.parent / SECRET).write_bytes(b"s" * (1 << 20))
        self.names = list(case.build(folder))
        self.target = folder / "new.raw"

    def run(self, verb: str, *more: str, target: Path | None = None) -> Done:
        """With everything checked that must hold whatever comes of it."""
        done = self._commands("image", verb, *more, *self.case.options, "--", *self.names, cwd=self.folder)
        written = [] if target is None else [target, Path(f"{target}.tokvm.json"), Path(f"{target}.tokvm.json.new")]
        folders = [] if target is None else [target.parent]
        own = [self.folder / name for name in (*self.names, *self.case.beside)]
        check_output(done)
        check_trace(done, read=[*own, *folders], written=[*written, *outputs(done)])
        check_cost(done, self._good)
        return done

    def onto(self, verb: str, held: Held, *more: str) -> Done:
        """Onto the target that holds something, which must be what it was."""
        before = held.digest()
        done = self.run(verb, "--to", str(held.target), *more, target=held.target)
        assert held.digest() == before, f"{verb} wrote"
        return done


@pytest.fixture(scope="session")
def held(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Held:
    folder = tmp_path_factory.mktemp("held")
    (folder / "good.vhd").write_bytes(vhd())
    done = commands("image", "convert", "--to", "held.raw", "good.vhd", cwd=folder)
    assert done.code == 0, done.stderr
    return Held(folder / "held.raw")


@pytest.fixture(scope="session")
def good(commands: Commands, held: Held) -> Done:
    """What a command costs on a good image."""
    return commands("image", "info", "good.vhd", cwd=held.target.parent)


@pytest.fixture
def bench(request: pytest.FixtureRequest, commands: Commands, held: Held, good: Done, tmp_path: Path) -> Iterator[Bench]:
    folder = tmp_path / "images"
    folder.mkdir()
    made = Bench(commands, held, IMAGES[request.param], folder, good)
    yield made
    for path in folder.rglob("*"):  # some are large, if full of holes
        if not path.is_dir():
            path.unlink()


@pytest.mark.parametrize("bench", named("image"), indirect=True)
@pytest.mark.slow
def test_a_named_image(bench: Bench) -> None:
    """Described where it can be, and converted onto a target that may be lost: not even that one is, if it is refused."""
    case = bench.case
    if case.outcome in (Outcome.READ, Outcome.CHILD, Outcome.HARMLESS):
        info = bench.run("info", "--json")
        assert info.code == 0, info.stderr
    if case.outcome is Outcome.WALK:
        check_refused(bench.run("map", "--json"), case.says)
    if case.outcome in (*REFUSED_EARLY, Outcome.CHILD):  # a layer alone is refused before its map is walked
        says = "" if case.outcome is Outcome.WALK else case.says
        check_refused(bench.onto("convert", bench.held, "--json", "--overwrite", str(SIZE)), says)
        return
    done = bench.run("convert", "--to", str(bench.target), target=bench.target)
    if case.outcome is Outcome.READ:
        check_refused(done, case.says)
        assert json.loads(Path(f"{bench.target}.tokvm.json").read_text())["holds"] is None
        return
    assert done.code == 0, done.stderr
    if case.content is not None:
        assert bench.target.read_bytes() == case.content(bench.folder)


@pytest.mark.slow
@pytest.mark.parametrize("bench", named("verbs"), indirect=True)
def test_every_verb_on_a_named_image(bench: Bench) -> None:
    case = bench.case
    for verb in ("info", "map", "verify"):
        for more in ((), ("--json",)):
            done = bench.run(verb, *more)
            if verb == "info" and case.outcome is not Outcome.OPEN:
                assert done.code in ((0, 3) if case.outcome is Outcome.WALK else (0,)), done.stderr
                continue
            if case.outcome in REFUSED_EARLY or (case.outcome is Outcome.READ and verb == "verify"):
                check_refused(done, case.says)
            elif not (case.outcome is Outcome.CHILD and len(bench.names) > 1):
                assert done.code == 0, done.stderr
    bench.onto("apply", bench.held, "--json")
    bench.onto("compare", bench.held)
    if case.outcome in (*REFUSED_EARLY, Outcome.CHILD):
        bench.run("convert", "--json", "--to", str(bench.target), target=bench.target)
        assert not bench.target.exists()
        assert not Path(f"{bench.target}.tokvm.json").exists()


SHRINKING = """
import os, sys
from tokvm.images.files import LocalFile
whole, shrink_at = LocalFile._read, {offset}
def read(self, fd, offset, buffer):
    if offset >= shrink_at:
        os.truncate(self.name, shrink_at)
    return whole(self, fd, offset, buffer)
LocalFile._read = read
from tokvm.cli.main import main
sys.argv = ["tokvm", *sys.argv[1:]]
main()
"""


@pytest.mark.slow
def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    """Truncated when the first byte of guest data is read: refused, and never noted as held."""
    size = 1 << 20
    image, target = tmp_path / "disk.vhd", tmp_path / "target.raw"
    image.write_bytes(os.urandom(size) + vhd("fixed", size=size)[-512:])
    script = SHRINKING.format(offset=0)
    done = subprocess.run(
        [sys.executable, "-c", script, "image", "convert", str(image), "--to", str(target), "--format", "vhd"],
        capture_output=True, text=True, timeout=60, env={**os.environ, "TOKVM_STATE_DIR": str(tmp_path / "state")},
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert "ended" in done.stderr or "shrank" in done.stderr
    note = Path(f"{target}.tokvm.json")
    assert not note.exists() or json.loads(note.read_text())["holds"] is None


@pytest.mark.parametrize(
    "name", ["path: extent named an absolute path", "path: its extent is a symbolic link", "probe: qcow2 with a backing file"]
)
@pytest.mark.slow
def test_the_command_from_its_start(name: str, tmp_path: Path) -> None:
    """Started as a user does: from its first instruction to its last, it goes nowhere near what the image names."""
    folder = tmp_path / "images"
    folder.mkdir()
    (tmp_path / SECRET).write_bytes(b"s" * (1 << 20))
    case = IMAGES[name]
    names = case.build(folder)
    before = {path.name for path in folder.iterdir()}
    trace = tmp_path / "trace"
    strace = ["strace", "-ff", "-qq", "-y", "-s", "4096", "-e", "trace=%file,connect", "-o", str(trace)]
    done = subprocess.run(
        [*strace, sys.executable, "-m", "tokvm", "image", "convert", "--to", "new.raw", "--", *names],
        cwd=folder, capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": f"{ROOT}/src"},
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    seen = [call for file in tmp_path.glob("trace.*") for call in calls(file)]
    assert [call.name for call in seen].count("execve") == 1
    touched = {path for call in seen if call.name != "execve" for path in call.paths}
    assert not [path for path in touched if path == "/etc/shadow" or path.endswith(SECRET)]
    assert not [call.text for call in seen if call.name == "connect"]
    assert {path.name for path in folder.iterdir()} == before


@pytest.mark.slow
def test_a_guests_qcow2_header_stays_data_in_a_qcow2_target(commands: Commands, tmp_path: Path) -> None:
    """CVE-2008-2004: the programs that are run are told every format, and never the name that the guest wrote."""
    (tmp_path / "images").mkdir()
    names = IMAGES["probe: a guest's qcow2 header in a fixed VHD"].build(tmp_path / "images")
    done = commands("image", "convert", "--to", "new.qcow2", "--", *names, cwd=tmp_path / "images")
    assert done.code == 0, done.stderr
    found = [
        call.text
        for file in done.trace.parent.glob("trace.*")
        for call in calls(file)
        if call.name == "execve" and "qemu" in call.text
    ]
    assert found
    for text in found:
        assert '"-f", "qcow2"' in text or '"--format=qcow2"' in text, text
        assert "shadow" not in text
    raw = subprocess.run(
        ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", "new.qcow2", "out.raw"],
        cwd=tmp_path / "images",
        capture_output=True,
    )
    assert raw.returncode == 0, raw.stderr
    assert (tmp_path / "images" / "out.raw").read_bytes() == (tmp_path / "images" / names[0]).read_bytes()[:-512]


def test_the_table_is_as_long_as_it_should_be() -> None:
    assert len(IMAGES) >= 45
    for name, case in IMAGES.items():
        assert case.attack, name
        assert case.outcome is Outcome.HARMLESS or case.says, f"{name} does not say which field a refusal names"


def test_the_checks_can_fail(commands: Commands, held: Held, good: Done) -> None:
    """On a good image: its own file is one too many where none may be opened, and so is a target where none may be written."""
    folder = held.target.parent
    with pytest.raises(AssertionError, match=r"good\.vhd' was touched"):
        check_trace(good, read=[], written=outputs(good))
    done = commands("image", "convert", "--to", "other.raw", "good.vhd", cwd=folder)
    with pytest.raises(AssertionError, match=r"other\.raw.* was touched"):
        check_trace(done, read=[folder / "good.vhd", folder], written=outputs(done))
    with pytest.raises(AssertionError, match="exit code 0"):
        check_refused(done, "")
    with pytest.raises(AssertionError, match="x1b"):
        check_output(replace(done, stderr=b"\x1b[2J"))
    with pytest.raises(AssertionError, match="of CPU"):
        check_cost(replace(done, cpu_s=9.0), good)
