"""The registry edit on a phony SYSTEM hive, by the host's hivex: each key is asked for once, and twice is the same as once."""

from __future__ import annotations

import struct
from contextlib import AbstractContextManager
from pathlib import Path
from typing import cast

import pytest
from tests.guest.host_hivex import HostHivex, keys_of

from tokvm.guest.appliance import Appliance
from tokvm.guest.windows import first_boot, hive_edit
from tokvm.guest.windows.registry import Hive, control_set
from tokvm.lab import windows_hives
from tokvm.lab.windows_hives import RELEASES

SERVICES = "\\ControlSet001\\Services"
MOST_CALLS = 100
"""Of one edit with two drivers on a new Windows; 188 when nothing was remembered. 40 set a value, 27 make a key, 26 look."""


@pytest.fixture(params=["win2k22", "win2k8r2"])
def system(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "SYSTEM"
    path.write_bytes(windows_hives.empty_hive())
    keys = windows_hives.system(RELEASES[request.param], tools="vmware", static_ip=True, fast_startup=False, uefi=False)
    with opened(path, HostHivex()) as hive:
        windows_hives.fill(hive, keys)
    return path


def opened(path: Path, host: HostHivex) -> AbstractContextManager[Hive]:
    return Hive.open(cast(Appliance, host), str(path), write=True)


def edit(path: Path) -> HostHivex:
    """As the micro-morph does it."""
    host = HostHivex()
    with opened(path, host) as hive:
        current = control_set(hive)
        hive_edit.make_boot_start(hive, current, ("viostor", "vioscsi"))
        hive_edit.enable_inbox(hive, current)
        first_boot.add_service(hive, current, with_runner=False)
        hive.commit()
    return host


def test_no_key_is_asked_for_twice_and_the_calls_are_few(system: Path) -> None:
    host = edit(system)
    assert sum(host.calls.values()) <= MOST_CALLS
    again = edit(system)
    assert len(set(again.asked)) == len(again.asked)


def test_twice_is_the_same_as_once_and_the_rest_stays(system: Path) -> None:
    before = keys_of(system)
    edit(system)
    once = keys_of(system)
    edit(system)
    assert keys_of(system) == once
    assert once[f"{SERVICES}\\viostor"]["Start"] == (4, struct.pack("<I", 0))
    assert f"{SERVICES}\\storahci\\StartOverride" not in once
    touched = {key for key, values in before.items() if once.get(key) != values}
    assert touched <= {f"{SERVICES}\\storahci\\StartOverride"}, "0 was their Start already"


def test_a_key_that_was_dropped_is_known_to_be_gone(system: Path) -> None:
    path = ("ControlSet001", "Services", "storahci", "StartOverride")
    with opened(system, HostHivex()) as hive:
        node = hive.find(path)
        assert hive.drop(path)
        assert not hive.find(path)
        assert not hive.drop(path)
        assert hive.put((*path, "below"), {"0": 1})
        assert hive.find(path) not in (0, node)
        assert hive.drop(path[:-1])
        assert not hive.find((*path, "below"))
        hive.put((*path, "below"))
        hive.commit()
    assert keys_of(system)["\\" + "\\".join(path)] == {}


def test_names_are_the_same_in_any_case(system: Path) -> None:
    host = HostHivex()
    with opened(system, host) as hive:
        made = hive.put(("ControlSet001", "Services", "VioStor"), {"Start": 3})
        assert hive.find(("controlset001", "SERVICES", "viostor")) == made
        assert len(host.asked) == 3
        assert hive.number(hive.find(("ControlSet001", "Services", "storahci")), "start") == 0
