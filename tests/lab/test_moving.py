"""Which commands move a guest, and what is kept of their answers. `tokvm` itself is played: its command lines and documents."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tokvm.guest.base import Way
from tokvm.lab import moving
from tokvm.lab.clock import OutsideClock, parse_line
from tokvm.lab.command import Finished
from tokvm.lab.errors import LabError
from tokvm.lab.home import LabRecord
from tokvm.lab.moving import Move, Moved, move, predicted
from tokvm.lab.settings import LabSettings

RECORD = LabRecord(source="x", url="x://h", ssh_config="/c", libvirt="test:///default", owner="lab", machines={})
REHEARSED: dict[str, object] = {
    "verdict": "micro-morph",
    "works": True,
    "why": "virtio is missing",
    "way": "micro",
    "predicted_downtime_s": 12.5,
    "timings": {"morph": 0.4},
    "unknown": 1,
}


class Played:
    """Answers each verb with its document and code, and notes the command lines."""

    def __init__(self, clock: OutsideClock) -> None:
        self.clock = clock
        self.said: list[list[str]] = []
        self.answers: dict[str, Finished] = {
            "rehearse": Finished(0, dict(REHEARSED)),
            "cutover": Finished(
                0, {"predicted_downtime_s": 9, "predicted_parts": {"stop": {"seconds": 2, "basis": "assumed"}}}
            ),
        }
        self.leaks = False

    def __call__(self, argv: list[str], _folder: Path, **_more: object) -> Finished:
        self.said.append(argv)
        if argv[0] == "rehearse" and self.leaks:
            message = parse_line(b"HEARTBEAT boot=b2 guest=web up=1 last=0", at=1.0, wall=1.0)
            assert message is not None
            self.clock._keep(message)
        return self.answers.get(argv[0], Finished(0, {}))

    @property
    def verbs(self) -> list[str]:
        return [argv[0] for argv in self.said]


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Iterator[Played]:
    with OutsideClock() as clock:
        tokvm = Played(clock)
        monkeypatch.setattr(moving, "run_tokvm", tokvm)
        yield tokvm


def moved(tokvm: Played, folder: Path, settings: LabSettings) -> Moved:
    return move(Move(folder, RECORD, tokvm.clock, settings, "web", say=lambda _: None, tell=lambda _: None))


def test_without_a_wish_it_is_one_migrate(played: Played, tmp_path: Path) -> None:
    done = moved(played, tmp_path, LabSettings())
    assert played.verbs == ["migrate"]
    assert (done.rehearsal, predicted(done)) == ({}, {})


def test_a_rehearsal_comes_between_sync_and_cutover_and_is_told_of(played: Played, tmp_path: Path) -> None:
    done = moved(played, tmp_path, LabSettings(rehearse=True))
    assert played.verbs == ["sync", "rehearse", "cutover"]
    assert "--sign-serial" in played.said[1]
    assert done.rehearsal == {key: value for key, value in REHEARSED.items() if key != "unknown"}
    assert predicted(done) == {"total": 9.0, "stop": 2.0}
    assert not any("--way" in argv for argv in played.said)


def test_a_way_and_the_number_of_boots_are_handed_on(played: Played, tmp_path: Path) -> None:
    moved(played, tmp_path, LabSettings(rehearse=True, way=Way.KERNEL, rehearsal_boots=3))
    assert played.said[1][played.said[1].index("--boots") + 1] == "3"
    assert [argv[argv.index("--way") + 1] for argv in played.said[1:]] == ["kernel", "kernel"]
    played.said.clear()
    moved(played, tmp_path, LabSettings(way=Way.COMPATIBLE))
    assert played.verbs == ["sync", "cutover"]


def test_a_failed_rehearsal_is_the_end_and_kept(played: Played, tmp_path: Path) -> None:
    played.answers["rehearse"] = Finished(17, {**REHEARSED, "works": False})
    done = moved(played, tmp_path, LabSettings(rehearse=True))
    assert played.verbs == ["sync", "rehearse"]
    assert (done.done.code, done.rehearsal["works"]) == (17, False)


def test_a_failed_sync_is_the_end(played: Played, tmp_path: Path) -> None:
    played.answers["sync"] = Finished(4, {})
    assert moved(played, tmp_path, LabSettings(rehearse=True)).done.code == 4
    assert played.verbs == ["sync"]


def test_a_rehearsal_that_is_heard_outside_is_refused(played: Played, tmp_path: Path) -> None:
    played.leaks = True
    with pytest.raises(LabError, match="not isolated"):
        moved(played, tmp_path, LabSettings(rehearse=True))
    assert played.verbs == ["sync", "rehearse"]


def test_the_picture_outlives_the_lab(played: Played, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKVM_LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("tokvm.lab.moving.KEPT", 3)
    picture = tmp_path / "seen.png"
    picture.write_bytes(b"png")
    played.answers["rehearse"] = Finished(0, {**REHEARSED, "screenshot": str(picture)})
    cached = tmp_path / "cache/pictures"
    assert moved(played, tmp_path, LabSettings(rehearse=True)).rehearsal["screenshot"] == str(cached / "web.png")
    for number in range(5):
        (cached / f"lab-{number}.png").touch()
    assert moved(played, tmp_path, LabSettings(rehearse=True)).rehearsal["screenshot"] == str(cached / "web.png")
    assert len(list(cached.iterdir())) == 4
    done = moved(played, tmp_path, LabSettings(rehearse=True, pictures=tmp_path / "kept"))
    assert done.rehearsal["screenshot"] == str(tmp_path / "kept/web.png")
    assert (tmp_path / "kept/web.png").read_bytes() == b"png"
