"""`tokvm morph` and `tokvm unmorph`, the real commands on a guest without virtio."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.guest.disks import change

from tokvm.app import morph as app
from tokvm.core.errors import Blocked, UsageError
from tokvm.core.units import MiB
from tokvm.guest.base import GuestDisk, GuestError, Way
from tokvm.guest.engines import MorphReport
from tokvm.guest.morph_store import MorphStore, Undone
from tokvm.lab.guest_image import build_guest

Run = Callable[..., tuple[int, dict[str, Any], str]]


@pytest.fixture
def tokvm(tmp_path: Path) -> Run:
    """The command with a state directory of its own: (exit code, its JSON document, stderr)."""

    def run(*argv: object) -> tuple[int, dict[str, Any], str]:
        environment = dict(os.environ) | {"TOKVM_STATE_DIR": str(tmp_path / "state")}
        command = [sys.executable, "-m", "tokvm", *map(str, argv), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment, check=False)
        return done.returncode, json.loads(done.stdout or "{}"), done.stderr

    return run


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.slow
@pytest.mark.timeout(900)  # an emulated appliance, on a busy machine
@pytest.mark.nightly
@pytest.mark.parametrize("options", [("--way", "micro"), ()])
def test_a_guest_without_virtio_is_morphed_and_put_back(options: tuple[str, ...], tokvm: Run, tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    build_guest(disk, size=128 * MiB, drivers="ide")
    before = sha(disk)
    code, said, stderr = tokvm("morph", disk, *options)
    assert code == 0, stderr
    assert (said["outcome"], said["way"]) == ("morphed", "micro")
    assert said.get("verdict", "micro-morph") == "micro-morph"
    assert {"launch", "inspect", "plan", "apply", "close", "commit"} <= set(said["seconds"])
    assert 0 < said["changed_bytes"] < 8 * MiB
    assert sha(disk) != before
    code, said, _ = tokvm("unmorph", disk)
    assert (code, said["outcome"]) == (0, "exact")
    assert sha(disk) == before
    assert list((tmp_path / "state" / "morphs").iterdir()) == []
    code, said, _ = tokvm("unmorph", disk)
    assert (code, said["outcome"]) == (0, "nothing to undo")


@pytest.mark.slow
def test_mistakes_are_named_before_anything_is_opened(tokvm: Run, tmp_path: Path) -> None:
    for options, words in [
        (("--way", "compatible"), "changes no disk"),
        (("--way", "magic"), "no way"),
        (("--format", "vmdk"), "no format"),
        (("--firmware", "openfirmware"), "no firmware"),
    ]:
        code, said, stderr = tokvm("morph", tmp_path / "nowhere.raw", *options)
        assert code == UsageError.exit_code, stderr
        assert words in said["error"]["what"]
    assert not (tmp_path / "state").exists()


class Fake:
    """An engine that takes no time."""

    def morph(self, disks: tuple[GuestDisk, ...]) -> MorphReport:
        change(disks[0], "write -P 9 4096 4096")
        return MorphReport(Way.MICRO)


@pytest.fixture
def disks(tmp_path: Path) -> tuple[str, str]:
    names = tmp_path / "a.raw", tmp_path / "b.raw"
    for name in names:
        name.write_bytes(os.urandom(MiB))
    return str(names[0]), str(names[1])


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(app, "_engine", lambda *_: Fake())
    return tmp_path / "state"


def morph(disks: tuple[str, ...], state: Path) -> app.Outcome:
    wishes = app.MorphWishes(Way.MICRO)
    return app.morph(app.look(app.disks_of(disks, "raw"), wishes), state, wishes, print)


def test_any_disk_of_a_morph_leads_to_all_of_it(disks: tuple[str, str], state: Path, tmp_path: Path) -> None:
    before = [sha(Path(disk)) for disk in disks]
    morph(disks, state)
    link = tmp_path / "link"
    link.symlink_to(disks[1])
    assert app.unmorph([str(link)], state, forget=False) == (Undone.EXACT, disks)
    assert [sha(Path(disk)) for disk in disks] == before


def test_disks_in_another_company_are_refused(disks: tuple[str, str], state: Path) -> None:
    morph(disks, state)
    for others in (disks[:1], disks[::-1]):
        with pytest.raises(GuestError, match="morphed before together"):
            morph(others, state)
    morph(disks, state)  # the same ones: what was is undone first


def test_a_morph_that_shall_stay_is_forgotten(disks: tuple[str, str], state: Path) -> None:
    morph(disks, state)
    after = sha(Path(disks[0]))
    assert app.unmorph(disks, state, forget=True) == (Undone.NOTHING, disks)
    assert app.unmorph(disks, state, forget=False) == (Undone.NOTHING, ())
    assert sha(Path(disks[0])) == after


def test_a_migration_still_knows_its_target(disks: tuple[str, str], state: Path) -> None:
    """Its token is not replaced, nor by the undo."""
    found = app.open_disk(GuestDisk(disks[0]), None)
    identity = found.identity
    found.close()
    morph(disks, state)
    app.unmorph(disks, state, forget=False)
    app.open_disk(GuestDisk(disks[0]), identity).close()


def test_without_virt_v2v_that_way_is_blocked(disks: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "find_virt_v2v", lambda: None)
    wishes = app.MorphWishes(Way.VIRT_V2V)
    with pytest.raises(Blocked, match="not installed"):
        app.morph(app.look(app.disks_of(disks, "raw"), wishes), tmp_path / "state", wishes, print)


def test_a_morph_by_itself_is_a_store_like_any_other(disks: tuple[str, str], state: Path) -> None:
    morph(disks, state)
    (folder,) = (state / "morphs").iterdir()
    with MorphStore(folder, app.disks_of(disks, "raw"), app.open_disk) as store:
        assert store.undo() is Undone.EXACT
