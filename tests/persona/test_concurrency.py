"""Many commands at once: the state is one state."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

from tokvm.testing.persona.store import new_uuid
from tokvm.testing.xenserver.host import Answer, XenHost


def test_of_many_claims_one_wins(host: XenHost) -> None:
    uuid = host.uuid("web")

    def claim(number: int) -> Answer:
        return host.run("xe", "vm-param-add", f"uuid={uuid}", "param-name=other-config", f"tokvm-owner={number}")

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(claim, range(16)))
    winners = [number for number, answer in enumerate(answers) if answer.code == 0]
    assert len(winners) == 1
    assert host.state()["vms"][uuid]["maps"]["other-config"]["tokvm-owner"] == str(winners[0])


def test_snapshots_at_the_same_time_are_all_there(host: XenHost) -> None:
    uuid = host.uuid("web")

    def freeze(number: int) -> str:
        return host.run("xe", "vm-snapshot", f"uuid={uuid}", f"new-name-label=tokvm-1-{number}").text

    with ThreadPoolExecutor(6) as pool:
        made = list(pool.map(freeze, range(6)))
    assert sorted(made) == sorted(vm["uuid"] for vm in host.snapshots("web"))
    assert len(host.commands()) == 6


def test_one_export_is_made_for_two_who_ask_at_once(host: XenHost) -> None:
    host.write_disk("web", offset=0, data=b"x" * 100_000)
    taken = host.run("xe", "vm-snapshot", f"uuid={host.uuid('web')}", "new-name-label=tokvm-1-1").text
    vdi = host.run("xe", "vbd-list", f"vm-uuid={taken}", "type=Disk", "params=vdi-uuid", "--minimal").text.split(",")[0]

    def export(_number: int) -> bytes:
        return host.run("xe", "vdi-export", f"uuid={vdi}", "format=vhd", "filename=").stdout

    with ThreadPoolExecutor(4) as pool:
        streams = set(pool.map(export, range(4)))
    assert len(streams) == 1
    assert host.state()["vdis"][vdi]["readers"] == []


def test_the_state_is_plain_json_and_a_uuid_is_a_version_4_one(host: XenHost) -> None:
    assert json.loads((host.folder / "state.json").read_text()) == host.state()
    made = new_uuid()
    assert len(made) == 36
    assert made[14] == "4"
    assert made[19] in "89ab"
