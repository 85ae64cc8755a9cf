"""What was typed becomes a plan, and a plan survives the journal."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokvm.app.plan import Plan, SshOptions, TargetChoice, choose_targets, merged, pairs, safe_name, unmapped
from tokvm.app.probe import proof_of
from tokvm.app.state import prepare_state_dir
from tokvm.core.errors import UsageError
from tokvm.core.machine import Disk, DiskBus, Nic, VirtualMachine


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


def test_one_file_by_two_names_is_refused(tmp_path: Path) -> None:
    real = tmp_path / "disk.raw"
    (tmp_path / "folder").symlink_to(tmp_path)
    (tmp_path / "link").symlink_to(real)
    (tmp_path / "other.raw").touch()
    for another in ("folder/disk.raw", "link"):
        with pytest.raises(UsageError, match="same target"):
            choose_targets(machine(2), [str(real), str(tmp_path / another)], {})
    real.touch()
    (tmp_path / "hard").hardlink_to(real)
    with pytest.raises(UsageError, match="same target"):
        choose_targets(machine(2), [str(real), str(tmp_path / "hard")], {})
    assert len(choose_targets(machine(2), [str(real), str(tmp_path / "other.raw")], {})) == 2


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


@pytest.mark.parametrize(
    ("networks", "says"),
    [
        ({}, "nothing says where"),
        ({"LAN": "user", "DMZ": "user"}, "no network 'DMZ'"),
        ({"*": "bogus"}, "no place"),
        ({"LAN": "bridge:"}, "no place"),
    ],
)
def test_nics_are_mapped_before_anything_is_copied(networks: dict[str, str], says: str) -> None:
    vm = machine(1)
    wired = VirtualMachine(vm.uuid, vm.name, 1, vm.memory, vm.disks, nics=(Nic(0, "02:00:00:00:00:01", "LAN"),))
    assert any(says in finding.what for finding in unmapped(wired, networks))
    assert unmapped(wired, {"*": "network:default"}) == unmapped(wired, {"LAN": "none"}) == []
    assert unmapped(vm, {}) == []


def test_what_is_not_said_again_stays_and_a_new_key_is_believed_once() -> None:
    first = SshOptions(identity="/k", known_hosts="/h", accept_new_host_key=True)
    kept = Plan("xenserver://h", (), ssh=first).kept().ssh
    assert not kept.accept_new_host_key
    again = merged(kept, SshOptions(config_file="/c"))
    assert (again.identity, again.known_hosts, again.config_file) == ("/k", "/h", "/c")
    assert not again.accept_new_host_key


def test_a_ca_replaces_a_pin_and_the_password_stays_where_it_was() -> None:
    first = SshOptions(password_file="/p", tls_fingerprint="ab")
    kept = Plan("hyperv+winrm://h", (), ssh=first).kept().ssh
    assert merged(kept, SshOptions()) == kept == first
    again = merged(kept, SshOptions(tls_ca="/ca"))
    assert (again.password_file, again.tls_ca, again.tls_fingerprint) == ("/p", "/ca", None)


def test_odd_paths_are_refused_before_they_reach_the_journal() -> None:
    for path in ("/x\udcff", "/x\ny", "/x\x1b[31m"):
        with pytest.raises(UsageError, match="plain path"):
            choose_targets(machine(1), [path], {})


def test_overwrite_is_understood_for_relative_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (chosen,) = choose_targets(machine(1), ["disk.raw"], {"disk.raw": "17"})
    assert chosen == TargetChoice(str(tmp_path / "disk.raw"), "17")


@pytest.mark.parametrize("text", ["tcp:host", "tcp::80", "udp:host:80", "tcp:host:0", "tcp:host:99999", "x"])
def test_a_probe_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="tcp:HOST:PORT"):
        proof_of(text)


def test_a_port_that_answers_is_a_sign_of_life() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        sign = proof_of(f"tcp:127.0.0.1:{port}")
        assert sign is not None
        assert sign()
    assert not sign()
    assert proof_of(None) is None


def test_a_state_directory_that_others_could_change_is_refused(tmp_path: Path) -> None:
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    with pytest.raises(UsageError, match="changed by others"):
        prepare_state_dir(open_to_all)
    assert prepare_state_dir(tmp_path / "new").stat().st_mode & 0o777 == 0o700
