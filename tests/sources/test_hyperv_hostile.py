"""A host that answers anything at all: whatever stands in any place of an answer, what is raised is ours, and soon."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.sources.hyperv_double import KEY, VM, FakeShell, connect

from tokvm.core.errors import TokvmError
from tokvm.core.machine import Disk, Snapshot
from tokvm.sources.hyperv import disks, power, snapshots
from tokvm.sources.hyperv.source import HyperVSource

ODD: tuple[Any, ...] = (None, -1, 1 << 70, 1.5, True, "", "\ud800", "C:\\\0\n.avhdx", [], [[]], {}, [None], "x" * 5000)
MARK = "tokvm-ab12-1"

CALLS: dict[str, Callable[[HyperVSource], object]] = {
    "list": lambda source: source.find("web"),
    "inspect": lambda source: source.check(source.inspect(VM)),
    "power": lambda source: (source.is_fenced(VM), source.stop_pending(VM), source.power(VM)),
    "layers": lambda source: source.snapshots(VM, "tokvm-"),
    "evidence": lambda source: source.off_evidence(VM),
    "checkpoint": lambda source: source.snapshot(source.inspect(VM), MARK),
    "checkpoints": lambda source: source.release(VM, "me"),
    "record": lambda source: source.claim(VM, "me"),
    "settings": lambda source: source.fence(VM, "x"),
    "remove-checkpoint": lambda source: source.remove_snapshot(VM, source.snapshots(VM, "tokvm-")[0]),
    "shutdown": lambda source: source.shut_down(VM, deadline_s=0.02, force=False),
}


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value inside."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inside:
        yield (*path, key)
        yield from places(one, (*path, key))


def put(value: Any, path: tuple[Any, ...], odd: Any) -> Any:
    changed = copy.deepcopy(value)
    at = changed
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = odd
    return changed


def host() -> FakeShell:
    shell = FakeShell()
    shell.vm.cluster = {"group": "web", "owner": "HV1", "priority": 2000, "restartAction": 2}
    shell.vm.freeze(MARK)
    shell.vm.line = '{"owner":"me","v":1}'
    return shell


@pytest.mark.parametrize("script", CALLS)
def test_any_value_in_any_place(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((power, "POLL_S"), (snapshots, "POLL_S"), (snapshots, "BUSY_S"), (snapshots, "MERGE_S")):
        monkeypatch.setattr(module, name, 0.001)
    shell = host()
    if script == "record":
        shell.vm.line = None
    data = {"vm": VM, "mark": MARK, "types": ["Production"], "id": shell.vm.checks[0]["id"], "expect": None, "write": None}
    good = getattr(shell.vm, {"list": "list_"}.get(script, script.replace("-", "_")))({**data, "ask": True, "wait": 0})
    tried = refused = 0
    for path in places(good):
        for odd in ODD:
            shell = host()
            if script == "record":
                shell.vm.line = None
            shell.script[script] = [put(good, path, odd)]
            tried += 1
            try:
                CALLS[script](connect(shell))
            except TokvmError:
                refused += 1
    assert tried > 20
    assert refused > tried // 8


def test_any_value_in_the_layers_of_a_disk_that_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """No file is opened here: the fake host has none, and every answer must be refused before or lead to that one."""
    monkeypatch.setattr(disks, "SETTLE_S", 0.0)
    monkeypatch.setattr(snapshots, "POLL_S", 0.0)
    shell = host()
    at = Snapshot(f"{VM}/{shell.vm.checks[0]['id']}", MARK, {})
    good = shell.vm.layers({})
    for path in places(good):
        for odd in ODD:
            shell.script["layers"] = [put(good, path, odd)]
            with pytest.raises((TokvmError, AssertionError)):
                connect(shell).open_disk(Disk(0, KEY, 1), at, None)
