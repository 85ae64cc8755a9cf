"""The way `prestage`: what was prepared in the running guest is rehearsed and cut over as it is."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.app.test_rehearsals import Setting, setting  # noqa: F401 - a fixture
from tests.domain.conftest import make_plan

from tokvm.app.ways import Replay, by_way, rehearsed
from tokvm.guest.base import TOUCHES_DISK, Way

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


def test_it_is_the_same_domain_as_by_the_way_none() -> None:
    replay = Replay(Way.NONE, family="linux", boot_disk=1, loader="\\EFI\\debian\\grubx64.efi")
    assert by_way(make_plan(), replace(replay, way=Way.PRESTAGE)) == by_way(make_plan(), replay)
    assert Way.PRESTAGE not in TOUCHES_DISK


def test_its_rehearsal_boots_the_synced_bytes_and_the_cutover_replays_it(setting: Setting) -> None:  # noqa: F811
    document = setting.rehearse(way=Way.PRESTAGE)
    assert (document["works"], document["way"], document["timings"]["morph"]) == (True, Way.PRESTAGE, 0.0)
    ((_, first_bytes),) = setting.booted
    assert first_bytes == b"QFI\xfb"
    replay = rehearsed(setting.book.rehearsals(), Way.PRESTAGE)
    assert replay is not None
    assert (replay.way, replay.micro, replay.kernel) == (Way.PRESTAGE, None, None)
    assert rehearsed(setting.book.rehearsals(), None) == replay


def test_a_guest_that_was_not_prestaged_after_all_does_not_live(setting: Setting) -> None:  # noqa: F811
    setting.lives_by.discard(Way.PRESTAGE)
    document = setting.rehearse(way=Way.PRESTAGE)
    assert (document["works"], len(setting.booted)) == (False, 1)
