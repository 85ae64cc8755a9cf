"""What was typed becomes a plan, and a plan survives the journal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokvm.app.plan import Plan, SshOptions, TargetChoice, choose_targets, pairs, safe_name
from tokvm.core.errors import UsageError
from tokvm.core.machine import Disk, DiskBus, VirtualMachine


def machine(disks: int, name: str = "web1") -> VirtualMachine:
    found = tuple(Disk(index=n, key=f"vdi-{n}", size=1 << 30) for n in range(disks))
    return VirtualMachine(uuid="0b5f2f5e-0000-0000-0000-000000000001", name=name, vcpus=1, memory=1 << 28, disks=found)


@given(st.text())
def test_any_vm_name_gives_a_plain_file_name(name: str) -> None:
    plain = safe_name(name)
    assert 1 <= len(plain) <= 60
    assert set(plain) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")
    assert plain[0] not in ".-"


def test_a_directory_takes_all_disks(tmp_path: Path) -> None:
    chosen = choose_targets(machine(2, "$(reboot)/../x"), [str(tmp_path)], {})
    assert [Path(choice.path).parent for choice in chosen] == [tmp_path, tmp_path]
    assert len({choice.path for choice in chosen}) == 2


def test_paths_are_taken_in_the_order_of_the_disks() -> None:
    chosen = choose_targets(machine(2), ["/dev/a", "/dev/b"], {"/dev/b": "1073741824"})
    assert chosen == (TargetChoice("/dev/a"), TargetChoice("/dev/b", "1073741824"))


@pytest.mark.parametrize(
    ("to", "overwrite"),
    [([], {}), (["/dev/a"], {}), (["/dev/a"] * 3, {}), (["/dev/a", "/dev/a"], {}), (["/dev/a", "/dev/b"], {"/dev/c": "1"})],
)
def test_targets_that_do_not_fit_are_refused(to: list[str], overwrite: dict[str, str]) -> None:
    with pytest.raises(UsageError):
        choose_targets(machine(2), to, overwrite)


def test_a_plan_survives_json() -> None:
    plan = Plan(
        source="xenserver://root@xen1",
        targets=(TargetChoice("/dev/a", "17"), TargetChoice("/x")),
        ssh=SshOptions(identity="/k", accept_new_host_key=True),
        networks={"*": "user"},
        bus=DiskBus.SATA,
        rate_limit=1.5,
    )
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_pairs_divide_at_the_last_sign() -> None:
    assert pairs(["a=b=bridge:br0", "*=user"], "--network") == {"a=b": "bridge:br0", "*": "user"}
    with pytest.raises(UsageError, match="NAME=VALUE"):
        pairs(["nothing"], "--network")
