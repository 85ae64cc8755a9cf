"""On, off, settings, notes and checkpoints of the played Hyper-V host."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from tests.persona.conftest import BuildHyperV, MiB

from tokvm.testing.hyperv.host import ClusterSpec, DiskSpec, HyperVHost, MachineSpec, NicSpec
from tokvm.testing.hyperv.state import RECOVERY

Data = dict[str, Any]
TYPES = ["Production", "ProductionOnly"]


def ask(host: HyperVHost, script: str, **data: object) -> Data:
    answer = host.ask(script, {"vm": host.id("web"), **data})
    assert host.violations() == []
    return answer.value


def build(build_hyperv: BuildHyperV, **more: object) -> HyperVHost:
    return build_hyperv(MachineSpec("web", disks=[DiskSpec(MiB)], **more))  # type: ignore[arg-type]


def test_a_guest_that_obeys_is_off_in_its_own_time(build_hyperv: BuildHyperV) -> None:
    host = build(build_hyperv, shutdown_s=0.3)
    assert ask(host, "shutdown", ask=True, wait=0) == {"answer": 0, "state": 2}
    assert ask(host, "shutdown", ask=False, wait=5) == {"answer": None, "state": 3}
    assert ask(host, "shutdown", ask=True, wait=5) == {"answer": None, "state": 3}
    assert host.starts_and_stops("web") == [("on", "a person"), ("off", "the guest stopped")]


@pytest.mark.slow
def test_a_guest_that_ignores_us_runs_until_its_power_is_cut(build_hyperv: BuildHyperV) -> None:
    host = build(build_hyperv, ignores_shutdown=True)
    assert ask(host, "shutdown", ask=True, wait=0.2) == {"answer": 0, "state": 2}
    assert ask(host, "turn-off") == {"state": 3}
    assert ask(host, "turn-off") == {"state": 3}
    assert ask(host, "start") == {"state": 2}
    assert ask(host, "start") == {"state": 2}


@pytest.mark.slow
@pytest.mark.parametrize(("field", "answer"), [("ShutdownEnabled", -1), ("ShutdownContact", 32768)])
def test_a_guest_that_cannot_be_asked(build_hyperv: BuildHyperV, field: str, answer: int) -> None:
    host = build(build_hyperv, fields={field: False})
    assert ask(host, "shutdown", ask=True, wait=60) == {"answer": answer, "state": 2}


def test_the_witness_sees_who_holds_the_disk(build_hyperv: BuildHyperV) -> None:
    host = build(build_hyperv)
    (file,) = ask(host, "evidence")["files"]
    assert (file["free"], file["hresult"]) == (False, -2147024864)
    ask(host, "turn-off")
    (file,) = ask(host, "evidence")["files"]
    assert (file["free"], file["hresult"], file["message"]) == (True, 0, "")
    host.local(host.chain("web")[0]).unlink()
    (file,) = ask(host, "evidence")["files"]
    assert (file["free"], file["hresult"]) == (False, -2147024894)


@pytest.mark.parametrize(
    "notes",
    [
        "x#tokvm no\n #tokvm no",
        *(pytest.param(one, marks=pytest.mark.slow) for one in ("", "a person's\r\n\r\ntext ", "#tokvmx\n")),
    ],
)
def test_our_line_is_compared_and_set_and_the_rest_is_kept(build_hyperv: BuildHyperV, notes: str) -> None:
    host = build(build_hyperv, notes=notes)

    def record(expect: str | None, write: str | None) -> tuple[object, object]:
        said = ask(host, "record", expect=expect, write=write)
        return said["swapped"], said["record"]

    assert record(None, '{"a": 1}') == (True, '{"a": 1}')
    assert host.vm("web")["notes"] == '#tokvm {"a": 1}\n' + notes
    assert record(None, "{}") == (False, '{"a": 1}')
    assert record('{"a": 1}', "{}") == (True, "{}")
    assert ask(host, "power")["record"] == "{}"
    assert record("{}", None) == (True, None)
    assert host.vm("web")["notes"] == notes


@pytest.mark.slow
def test_our_line_is_found_wherever_a_person_moved_it(build_hyperv: BuildHyperV) -> None:
    host = build(build_hyperv, notes="first\r\n#tokvm old\r\nlast")
    assert ask(host, "record", expect="old", write="new")["record"] == "new"
    assert host.vm("web")["notes"] == "first\r\n#tokvm new\r\nlast"
    ask(host, "record", expect="new", write=None)
    assert host.vm("web")["notes"] == "first\r\nlast"


@pytest.mark.slow
def test_settings_are_set_and_read_back(build_hyperv: BuildHyperV) -> None:
    host = build(build_hyperv, cluster=ClusterSpec("the group"))
    said = ask(host, "settings", checkpointType="ProductionOnly", autoStart="Nothing", priority=0)
    assert (said["checkpointType"], said["autoStart"], said["automaticCheckpoints"]) == ("ProductionOnly", "Nothing", False)
    assert said["cluster"] == {"group": "the group", "owner": "HV1", "priority": 0, "restartAction": 2}
    answer = host.ask("settings", {"vm": host.id("web"), "autoStart": "Never"})
    assert answer.framed["ok"] is False
    assert ask(host, "power")["autoStart"] == "Nothing"


@pytest.mark.slow
@pytest.mark.parametrize(("action", "comes_back"), [("Nothing", False), ("StartIfRunning", True), ("Start", True)])
def test_a_host_that_restarts_starts_what_it_is_told_to(build_hyperv: BuildHyperV, action: str, *, comes_back: bool) -> None:
    host = build(build_hyperv, fields={"AutomaticStartAction": action})
    host.host_restarts()
    assert host.is_running("web") is comes_back


@pytest.mark.slow
def test_a_cluster_starts_what_has_a_priority(build_hyperv: BuildHyperV) -> None:
    host = build(build_hyperv, running=False, cluster=ClusterSpec("group"))
    ask(host, "settings", priority=0)
    assert host.cluster_acts("web") is False
    assert host.cluster_acts("web", failed="resource") is True
    assert host.is_running("web")


def test_a_mark_is_frozen_once_and_all_disks_with_it(build_hyperv: BuildHyperV) -> None:
    host = build_hyperv()
    made = ask(host, "checkpoint", mark="tokvm-1", types=TYPES)
    again = ask(host, "checkpoint", mark="tokvm-1", types=TYPES)
    assert made == again
    (one,) = made["checkpoints"]
    assert [disk["path"] for disk in one["disks"]] == [host.chain("web", disk)[1] for disk in (0, 1)]
    assert len(host.checkpoints("web")) == 1


def test_a_type_that_was_not_asked_for_is_not_made_of_a_running_vm(build_hyperv: BuildHyperV) -> None:
    host = build(build_hyperv, fields={"CheckpointType": "Standard"})
    assert ask(host, "checkpoint", mark="tokvm-1", types=TYPES)["checkpoints"] == []
    ask(host, "turn-off")
    assert len(ask(host, "checkpoint", mark="tokvm-1", types=TYPES)["checkpoints"]) == 1
    ask(host, "settings", checkpointType="Disabled")
    assert ask(host, "checkpoint", mark="tokvm-2", types=TYPES)["checkpoints"] == []


@pytest.mark.slow
def test_only_what_bears_the_name_is_removed(build_hyperv: BuildHyperV) -> None:
    host = build(build_hyperv)
    (made,) = ask(host, "checkpoint", mark="tokvm-1", types=TYPES)["checkpoints"]
    foreign = host.foreign_checkpoint("web", "nightly", kind=RECOVERY)
    assert ask(host, "remove-checkpoint", id=foreign["id"], mark="tokvm-1")["removed"] is False
    assert ask(host, "remove-checkpoint", id=made["id"], mark="tokvm-1")["removed"] is True
    assert ask(host, "remove-checkpoint", id=made["id"], mark="tokvm-1") == {"found": False, "name": None, "removed": False}
    (left,) = ask(host, "checkpoints")["checkpoints"]
    assert (left["name"], left["type"], left["parent"]) == ("nightly", "Recovery", None)


@pytest.mark.slow
def test_automatic_checkpoints_come_with_every_start(build_hyperv: BuildHyperV) -> None:
    host = build(build_hyperv, fields={"AutomaticCheckpointsEnabled": True})
    assert len(host.checkpoints("web")) == 1
    host.guest_stops("web")
    host.start("web")
    assert len(host.checkpoints("web")) == 2


@pytest.mark.slow
def test_while_disks_merge_no_checkpoint_is_made(build_hyperv: BuildHyperV) -> None:
    host = build_hyperv(MachineSpec("web", disks=[DiskSpec(MiB)]), merge_s=30)
    (made,) = ask(host, "checkpoint", mark="tokvm-1", types=TYPES)["checkpoints"]
    ask(host, "remove-checkpoint", id=made["id"], mark="tokvm-1")
    answer = host.ask("checkpoint", {"vm": host.id("web"), "mark": "tokvm-2", "types": TYPES}).framed
    assert (answer["ok"], str(answer["id"]).partition(",")[0]) == (False, "InvalidState")
    host.finish_merges()
    assert len(ask(host, "checkpoint", mark="tokvm-2", types=TYPES)["checkpoints"]) == 1


@pytest.mark.slow
def test_everything_is_told_of_an_unusual_vm(build_hyperv: BuildHyperV) -> None:
    disks = [
        DiskSpec(MiB, kind="fixed", path="\\\\nas\\share\\x.vhdx"),
        DiskSpec(0, pass_through=2),
        DiskSpec(MiB, logical=4096, shared=True),
    ]
    nics = [NicSpec("000000000000", vlan=12), NicSpec("00155D010102", switch="", dynamic_mac=False)]
    fields: Data = {"TpmEnabled": True, "Shielded": True, "ReplicationState": 2, "ShutdownEnabled": False}
    spec = MachineSpec("web", disks=disks, nics=nics, generation=1, running=False, fields=fields, notes="ü")
    host = build_hyperv(spec)
    said = ask(host, "inspect")
    found: list[Data] = said["disks"]
    assert [(one["controller"], one["number"], one["location"]) for one in found] == [
        ("IDE", 0, 0),
        ("IDE", 0, 1),
        ("IDE", 1, 0),
    ]
    assert [one["passThrough"] for one in found] == [None, 2, None]
    assert [one["shared"] for one in found] == [False, False, True]
    layers = [[(layer["type"], layer["logicalSector"]) for layer in one["layers"]] for one in found]
    assert layers == [[("Fixed", 512)], [], [("Dynamic", 4096)]]
    assert said["firmware"] is None
    assert said["security"] == {"tpm": True, "shielded": True, "encryptedState": False}
    assert [nic["mac"] for nic in said["nics"]] == ["000000000000", "00155D010102"]
    ask(host, "start")
    assert ask(host, "inspect")["nics"][0]["mac"].startswith("00155D")


@pytest.mark.slow
def test_many_at_once_make_one_checkpoint(build_hyperv: BuildHyperV) -> None:
    host = build(build_hyperv)
    with ThreadPoolExecutor(6) as threads:
        jobs = [threads.submit(ask, host, "checkpoint", mark="tokvm-1", types=TYPES) for _ in range(6)]
        answers = [job.result()["checkpoints"] for job in jobs]
    assert all(answer == answers[0] for answer in answers)
    assert len(host.checkpoints("web")) == 1
