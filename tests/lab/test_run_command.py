"""The lab's own calls of tokvm."""

from __future__ import annotations

from pathlib import Path

import pytest

from tokvm.guest.base import Way
from tokvm.lab.command import Event, cutover_argv, finish_argv, migrate_argv, rehearse_argv, run_tokvm, sync_argv
from tokvm.lab.errors import LabError
from tokvm.lab.home import LabRecord, new_home
from tokvm.testing import pids


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return new_home(tmp_path / "lab")


RECORD = LabRecord(
    source="xenserver", url="xenserver://root@127.0.0.1:1", ssh_config="/c", libvirt="test:///default", owner="lab", machines={}
)


@pytest.mark.slow
def test_the_command_lines_are_understood_by_the_real_command(place: Path) -> None:
    """A refused connection, not a refused option."""
    for argv in (
        migrate_argv(RECORD, place, "web", passes=3),
        sync_argv(RECORD, place, "web", passes=3),
        rehearse_argv(place, "web", way=None, deadline_s=300.0),
        cutover_argv(place, "web", way=Way.MICRO),
        finish_argv(place, "web"),
    ):
        done = run_tokvm(argv, place, timeout_s=60)
        assert done.code not in (0, 1, 2, 70) or "No such option" not in "\n".join(done.messages)
        assert "No such option" not in "\n".join(done.messages)
        assert done.document.get("outcome") == "error", done.messages


@pytest.mark.slow
def test_an_error_document_and_messages_are_kept(place: Path) -> None:
    done = run_tokvm(finish_argv(place, "nobody"), place, timeout_s=60)
    assert done.code != 0
    assert isinstance(done.document["error"], dict)
    assert done.messages


def test_a_command_that_does_not_end_is_killed(place: Path) -> None:
    with pytest.raises(LabError, match="did not end within"):
        run_tokvm(["--help"], place, timeout_s=0.01)
    assert [file.name for file in (place / "run").glob("tokvm-*")] == []
    assert pids.noted(place / "run" / "lab.pid") is not None


def test_a_record_comes_back_as_it_was_written(place: Path) -> None:
    RECORD.save(place)
    assert LabRecord.load(place) == RECORD
    with pytest.raises(LabError, match="no lab here"):
        LabRecord.load(place / "run")


def test_an_event_knows_its_name() -> None:
    assert (Event(1.0, {"event": "phase"}).name, Event(1.0, {}).name) == ("phase", "")
