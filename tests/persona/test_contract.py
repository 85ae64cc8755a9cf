"""Only what the contract lists is answered, exactly as written there."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tokvm.testing.xenserver.grammar import RULES
from tokvm.testing.xenserver.host import DiskSpec, MachineSpec, NicSpec, XenHost

U = "00000000-0000-4000-8000-000000000001"
NOT_IN_THE_CONTRACT = [
    "xe vm-list",
    "xe vm-list params=uuid --minimal",
    "xe vm-list is-a-template=false is-control-domain=false is-a-snapshot=false params=uuid --minimal",
    "xe vm-list is-control-domain=false is-a-template=false is-a-snapshot=false params=uuid,name-label --minimal",
    f"xe vm-param-get param-name=power-state uuid={U}",
    f"xe vm-param-get uuid={U} param-name=user-version",
    f"xe vm-param-get uuid={U} param-name=other-config param-key=XenCenter.CustomFields",
    f"xe vm-snapshot uuid={U} new-name-label=mine",
    f"xe vm-checkpoint uuid={U} new-name-label=tokvm-1-1",
    f"xe snapshot-destroy uuid={U}",
    f"xe snapshot-uninstall uuid={U}",
    f"xe vdi-destroy uuid={U} force=true",
    f"xe vdi-export uuid={U} format=raw filename=",
    f"xe vdi-export uuid={U} format=vhd filename=/tmp/x",
    f"xe vdi-export uuid={U} filename= format=vhd",
    f"xe vm-param-set uuid={U} name-label=x",
    f"xe vm-param-remove uuid={U} param-name=other-config param-key=auto_poweron",
    f"xe vm-shutdown uuid={U} --force",
    f"xe vm-destroy uuid={U}",
    "cat /etc/passwd",
    "sftp",
    "",
    f"xe vm-start uuid={U}; reboot",
    f"xe vm-start uuid={U} && reboot",
    f"xe vm-start uuid=$(id) {U}",
    f"xe vm-start uuid={U}\nreboot",
    f'xe vm-start "uuid={U}"',
    f"xe vm-start 'uuid={U}",
    f"xe vdi-export uuid={U} format=vhd filename= | tail -c +5",
    f"set -o pipefail; xe vdi-export uuid={U} format=vhd filename= | tail -c +0",
    f"set -o pipefail; xe vdi-export uuid={U} format=vhd filename= | tail -c 5",
    f"set -o pipefail; xe vm-start uuid={U} | tail -c +5",
    f"set -o pipefail; xe vdi-export uuid={U} format=vhd filename= | gzip | tail -c +5",
    f"xe vm-start uuid={U}; printf '\\0%d\\0' $?",
    f"xe vif-list vm-uuid={U} params=MAC --minimal; printf '\\0%d\\0' $?; reboot",
    f"; xe vif-list vm-uuid={U} params=MAC --minimal; printf '\\0%d\\0' $?",
    f"reboot; printf '\\0%d\\0' $?; xe vif-list vm-uuid={U} params=MAC --minimal; printf '\\0%d\\0' $?",
    f"xe vif-list vm-uuid={U} params=MAC --minimal; printf '%d' $?",
]


@pytest.mark.parametrize("line", NOT_IN_THE_CONTRACT)
@pytest.mark.slow
def test_a_line_that_is_not_in_the_contract_fails_and_is_recorded(host: XenHost, line: str) -> None:
    answer = host.run(line=line)
    assert answer.code != 0
    assert answer.stderr
    assert [record["command"] for record in host.violations()] == [line]


def test_what_the_contract_lists_is_no_violation_even_when_it_is_refused(host: XenHost) -> None:
    answer = host.run("xe", "vm-start", f"uuid={U}")
    assert answer.code == 1
    assert answer.stderr.decode() == f"The uuid you supplied was invalid.\ntype: VM\nuuid: {U}\n"
    assert host.violations() == []


def test_the_contract_page_and_the_grammar_name_the_same_commands(request: pytest.FixtureRequest) -> None:
    page = (request.config.rootpath / "docs" / "xenserver-commands.md").read_text()
    named = {
        row.split("xe ")[1].split()[0].rstrip("`")
        for row in page.splitlines()
        if row.startswith("|") and "`" in row and "xe " in row
    }
    assert named == {rule.name for rule in RULES}


@pytest.mark.slow
def test_a_name_comes_back_byte_for_byte(build: Callable[..., XenHost]) -> None:
    names = ["-oProxyCommand=x", "$(id)", "a'b", "two\nlines", "a,b\\c", "ümläut", "bytes\udcff\udc80", '"', " ", "; rm"]
    host = build(*(MachineSpec(name) for name in names))
    for name in names:
        answer = host.run("xe", "vm-param-get", f"uuid={host.uuid(name)}", "param-name=name-label")
        assert answer.stdout == name.encode("utf-8", "surrogateescape") + b"\n"


def test_minimal_escapes_commas_and_backslashes(build: Callable[..., XenHost]) -> None:
    host = build(MachineSpec("a,b"), MachineSpec("c\\d"))
    line = "xe vm-list is-control-domain=false is-a-template=false is-a-snapshot=false params=name-label --minimal"
    listed = host.run(line=line)
    assert listed.text == "a\\,b,c\\\\d"


def test_several_reads_in_one_line_have_their_exit_codes_behind_them(host: XenHost) -> None:
    uuid = host.uuid("web")
    reads = [f"xe vm-param-get uuid={uuid} param-name={name}" for name in ("name-label", "power-state")]
    reads.insert(1, f"xe vm-param-get uuid={uuid} param-name=other-config param-key=tokvm-owner")
    answer = host.run(line="; ".join(f"{read}; printf '\\0%d\\0' $?" for read in reads))
    assert (answer.code, answer.stdout) == (0, b"web\n\x000\x00\x001\x00running\n\x000\x00")
    assert answer.stderr == b"Error: Key tokvm-owner not found in map\n"
    assert host.commands() == reads
    assert host.violations() == []


def test_an_empty_list_is_an_empty_line(host: XenHost) -> None:
    answer = host.run("xe", "snapshot-list", f"snapshot-of={host.uuid('web')}", "params=uuid", "--minimal")
    assert (answer.code, answer.stdout) == (0, b"\n")


@pytest.mark.slow
def test_hardware_is_described_as_xe_does(build: Callable[..., XenHost]) -> None:
    nics = [NicSpec("02:00:00:00:00:0A"), NicSpec("02:00:00:00:00:0b", network="backup, nightly")]
    disks = [DiskSpec(1 << 20, sr="nfs", label="system"), DiskSpec(2 << 20, sharable=True)]
    host = build(
        MachineSpec("web", disks=disks, nics=nics, vcpus=3, memory=1 << 30, firmware="uefi", secure_boot=True, vtpm=True)
    )
    uuid = host.uuid("web")

    def get(param: str) -> str:
        return host.run("xe", "vm-param-get", f"uuid={uuid}", f"param-name={param}").text

    assert (get("VCPUs-max"), get("memory-static-max"), get("dom-id")) == ("3", str(1 << 30), "1")
    assert get("HVM-boot-params") == "firmware: uefi; order: cd"
    assert "secureboot: true" in get("platform")
    assert host.run("xe", "vif-list", f"vm-uuid={uuid}", "params=network-name-label", "--minimal").text.endswith(
        "backup\\, nightly"
    )
    assert host.run("xe", "vbd-list", f"vm-uuid={uuid}", "type=Disk", "params=userdevice", "--minimal").text == "0,1"
    assert host.run("xe", "vtpm-list", f"vm-uuid={uuid}", "params=uuid", "--minimal").text != ""
    vdi = host.vdi("web", 1)
    assert host.run("xe", "vdi-param-get", f"uuid={vdi}", "param-name=virtual-size").text == str(2 << 20)
    assert host.run("xe", "vdi-param-get", f"uuid={vdi}", "param-name=sharable").text == "true"
    repository = host.run("xe", "vdi-param-get", f"uuid={host.vdi('web')}", "param-name=sr-uuid").text
    assert host.run("xe", "sr-param-get", f"uuid={repository}", "param-name=type").text == "nfs"
    assert host.violations() == []


def test_an_old_host_does_not_know_vtpms(build: Callable[..., XenHost]) -> None:
    host = build(vtpm_known=False)
    answer = host.run("xe", "vtpm-list", f"vm-uuid={host.uuid('web')}", "params=uuid", "--minimal")
    assert (answer.code, answer.stderr) == (1, b"Unknown command: vtpm-list\n")


def test_a_claim_is_taken_once(host: XenHost) -> None:
    add = ["xe", "vm-param-add", f"uuid={host.uuid('web')}", "param-name=other-config"]
    assert host.run(*add, "tokvm-owner=first").code == 0
    second = host.run(*add, "tokvm-owner=second")
    assert second.code == 1
    assert b"that key is already there" in second.stderr
    get = ["xe", "vm-param-get", f"uuid={host.uuid('web')}", "param-name=other-config", "param-key=tokvm-owner"]
    assert host.run(*get).text == "first"
    assert (
        host.run("xe", "vm-param-remove", f"uuid={host.uuid('web')}", "param-name=other-config", "param-key=tokvm-owner").code
        == 0
    )
    gone = host.run(*get)
    assert (gone.code, gone.stderr) == (1, b"Error: Key tokvm-owner not found in map\n")


def test_a_value_may_be_any_text(host: XenHost) -> None:
    value = '{"a": "b\'c", "n": [1, 2]}\n$(id) ; # = :'
    uuid = host.uuid("web")
    assert host.run("xe", "vm-param-set", f"uuid={uuid}", f"other-config:tokvm-fence={value}").code == 0
    assert host.run("xe", "vm-param-get", f"uuid={uuid}", "param-name=other-config", "param-key=tokvm-fence").text == value


def test_a_command_starts_fast(host: XenHost) -> None:
    """Well under the 120 ms that thousands of commands in a test run can bear; no numpy, no typing stack."""
    rows = host.run("xe", "vm-param-get", f"uuid={host.uuid('web')}", "param-name=uuid")
    assert rows.code == 0
    launcher = host.launcher.read_text()
    assert "-I -S" in launcher
