"""The played Hyper-V host takes what docs/hyperv-commands.md says, to the letter, and nothing else."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import pytest
from tests.persona.conftest import SSH, BuildHyperV

from tokvm.core.errors import ConnectionLost, SourceError
from tokvm.remote.ssh import SshConfig, SshHost
from tokvm.sources.hyperv import powershell
from tokvm.testing.hyperv import contract, scripts
from tokvm.testing.hyperv.host import HyperVHost, MachineSpec

PAGE = Path(__file__).parents[2] / "docs" / "hyperv-commands.md"
NAMES = ["Ünï [1] 'x' „y“", "two\nlines", "$(touch x); `y`", "-oProxyCommand=x", "\U0001f4a3 名前", '"', "%s%n"]
Data = dict[str, object]


def ask_over_ssh(host: HyperVHost, script: str, data: Data) -> Data:
    sshd = host.sshd
    connection = SshHost(SshConfig.parse(sshd.netloc, config_file=str(sshd.config_file), known_hosts=str(sshd.known_hosts)))
    try:
        return powershell.PowerShell(connection).act(script, data, timeout_s=20)
    finally:
        connection.close()


def reasons(host: HyperVHost) -> list[str]:
    return [str(row["why"]) for row in host.violations()]


def test_the_bootstrap_is_the_one_on_the_page() -> None:
    found = re.search(r"```powershell\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    assert found is not None
    assert found[1] == powershell.BOOTSTRAP


def test_every_script_of_the_package_is_played_and_on_the_page() -> None:
    shipped = {path.stem for path in Path(powershell.__file__).parent.joinpath("scripts").glob("*.ps1")}
    assert shipped == set(scripts.ACTS) == set(contract.FIELDS)
    assert {name for name in shipped if f"**{name}**" in PAGE.read_text("utf-8")} == shipped


@pytest.mark.slow
def test_every_script_that_is_about_a_vm_knows_when_there_is_none(build_hyperv: BuildHyperV) -> None:
    host = build_hyperv(MachineSpec("web"))
    for name in sorted(set(scripts.ACTS) - {"list", "leftovers", "ping"}):
        kinds = {field: contract.KINDS[field][0] for field in contract.FIELDS[name][0]}
        data = {field: "00000000-0000-4000-8000-000000000000" if field == "vm" else kind() for field, kind in kinds.items()}
        answer = host.ask(name, data)
        assert (answer.code, answer.framed["ok"]) == (0, False)
        assert str(answer.framed["id"]).endswith(".GetVM")
    assert reasons(host) == []


LINES = [
    "",
    "Get-VHD 'C:\\x.vhdx'",
    "powershell.exe -NoProfile -Command Get-VM",
    powershell.COMMAND + " ",
    powershell.COMMAND.replace("-NonInteractive ", ""),
    powershell.COMMAND[:-4],
    powershell.COMMAND.split(" -Enc")[0] + " -EncodedCommand " + base64.b64encode("Get-VM".encode("utf-16-le")).decode(),
]


@pytest.mark.parametrize(
    ("shell", "said"),
    [
        ("cmd", b"is not recognized as an internal or external command"),
        ("powershell", b"is not recognized as the name of a cmdlet"),
    ],
)
@pytest.mark.slow
def test_any_other_command_line_is_refused_and_recorded(build_hyperv: BuildHyperV, shell: str, said: bytes) -> None:
    host = build_hyperv(MachineSpec("web"), default_shell=shell)
    answers = [host.run(line) for line in LINES]
    assert {answer.code for answer in answers} == {1}
    assert all(said in answer.stderr for answer in answers)
    assert [row["command"] for row in host.violations()] == LINES


def test_a_script_that_is_changed_by_one_byte_is_refused(build_hyperv: BuildHyperV) -> None:
    host = build_hyperv(MachineSpec("web"))
    text = powershell.script_text("list")
    for other in (text + " ", text.replace("Get-VM", "Get-Vm", 1), "Get-VHD"):
        assert host.run(powershell.COMMAND, powershell.request(other, {})).code == 1
    assert len(reasons(host)) == 3
    assert all("no script of the contract" in reason for reason in reasons(host))


BAD_DATA: list[Data] = [
    {},
    {"vm": "x", "expect": None},
    {"vm": "x", "expect": None, "write": None, "more": 1},
    {"vm": None, "expect": None, "write": None},
    {"vm": "x", "expect": True, "write": None},
]


def test_data_that_the_contract_does_not_know_are_refused(build_hyperv: BuildHyperV) -> None:
    host = build_hyperv(MachineSpec("web"))
    assert {host.ask("record", data).code for data in BAD_DATA} == {1}
    assert len(reasons(host)) == len(BAD_DATA)


def test_a_request_that_was_cut_short_does_nothing(build_hyperv: BuildHyperV) -> None:
    host = build_hyperv(MachineSpec("web"))
    whole = powershell.request(powershell.script_text("turn-off"), {"vm": host.id("web")})
    assert host.run(powershell.COMMAND, b"").stdout == b""
    for length in (10, len(whole) // 2, len(whole) - 5, len(whole) - 1):
        answer = host.run(powershell.COMMAND, whole[:length])
        assert answer.framed["id"] == "TokvmCutShort"
    assert host.is_running("web")
    assert reasons(host) == []


@pytest.mark.parametrize(
    "options",
    [
        {"wrap": 120, "banner": True},
        *(pytest.param(one, marks=pytest.mark.slow) for one in ({}, {"wrap": 0}, {"banner": True, "code_page": "cp437"})),
    ],
)
def test_answers_come_through_whatever_is_around_them(build_hyperv: BuildHyperV, options: Data) -> None:
    host = build_hyperv(*[MachineSpec(name, running=False, notes=name) for name in NAMES], **options)
    found = ask_over_ssh(host, "list", {})["machines"]
    assert isinstance(found, list)
    assert [one["name"] for one in found] == NAMES
    assert reasons(host) == []


def test_banners_and_noise_are_in_the_code_page(build_hyperv: BuildHyperV) -> None:
    answer = build_hyperv(MachineSpec("web"), banner=True, code_page="cp850").ask("list", {})
    assert "für Prüfzwecke".encode("cp850") in answer.stdout
    assert answer.stderr.startswith(b"#< CLIXML")
    with pytest.raises(UnicodeDecodeError):
        answer.stdout.decode("utf-8")


@pytest.mark.slow
def test_a_planned_error_is_told_as_data(build_hyperv: BuildHyperV) -> None:
    host = build_hyperv(MachineSpec("web"))
    host.fault("power", "error", type="System.IO.IOException", hresult=-2147024864, id="IOException", message="Gesperrt „x“")
    with pytest.raises(SourceError, match=r"0x80070020"):
        ask_over_ssh(host, "power", {"vm": host.id("web")})
    assert ask_over_ssh(host, "power", {"vm": host.id("web")})["state"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cut_answer", "no_answer", "crash"])
def test_a_powershell_that_dies_gives_no_answer(build_hyperv: BuildHyperV, kind: str) -> None:
    host = build_hyperv(MachineSpec("web"))
    host.fault("list", kind)
    with pytest.raises(SourceError, match="did not run"):
        ask_over_ssh(host, "list", {})
    assert host.faults_left() == []


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "state"), [("lost_reply", 3), ("drop", 2), ("late", 2)])
def test_a_connection_that_breaks(build_hyperv: BuildHyperV, kind: str, state: int) -> None:
    """Done, not done, or done when nobody looks any more."""
    host = build_hyperv(MachineSpec("web"))
    host.fault("turn-off", kind, seconds=30)
    with pytest.raises(ConnectionLost):
        ask_over_ssh(host, "turn-off", {"vm": host.id("web")})
    assert host.vm("web")["state"] == state
    if kind == "late":
        with host.edit() as known:
            known["later"][0]["due"] = 0.0
        assert host.vm("web")["state"] == 3


@pytest.mark.slow
def test_a_host_that_hangs_is_given_up(build_hyperv: BuildHyperV) -> None:
    host = build_hyperv(MachineSpec("web"))
    host.fault("list", "hang")
    sshd = host.sshd
    connection = SshHost(SshConfig.parse(sshd.netloc, config_file=str(sshd.config_file), known_hosts=str(sshd.known_hosts)))
    try:
        with pytest.raises(ConnectionLost):
            powershell.PowerShell(connection).act("list", {}, timeout_s=1.0)
    finally:
        connection.close()


@pytest.mark.slow
def test_a_bare_command_over_ssh_looks_like_windows(build_hyperv: BuildHyperV, ssh: SSH) -> None:
    host = build_hyperv(MachineSpec("web"))
    done = ssh(host, "Get-VM")
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"'Get-VM' is not recognized" in done.stderr
