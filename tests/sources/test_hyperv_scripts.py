"""The scripts as files: PowerShell can parse them, nothing is put into them, and the command line stays short and constant."""

from __future__ import annotations

import base64
import re
from importlib.resources import files
from pathlib import Path

import pytest
import tree_sitter_powershell
from tree_sitter import Language, Node, Parser

from tokvm.sources.hyperv import powershell

SCRIPTS = sorted(
    Path(entry.name).stem for entry in files("tokvm.sources.hyperv.scripts").iterdir() if entry.name.endswith(".ps1")
)
PAGE = Path(__file__).parents[2] / "docs" / "hyperv-commands.md"


def errors(text: str) -> list[str]:
    """What the grammar cannot make sense of."""
    found: list[str] = []
    waiting: list[Node] = [Parser(Language(tree_sitter_powershell.language())).parse(text.encode()).root_node]
    while waiting:
        node = waiting.pop()
        if node.is_error or node.is_missing:
            found.append(f"line {node.start_point[0] + 1}: {(node.text or b'')[:60]!r}")
        waiting.extend(node.children)
    return found


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_parses(name: str) -> None:
    assert errors(powershell.script_text(name)) == []


def test_the_bootstrap_parses() -> None:
    assert errors(powershell.BOOTSTRAP) == []


@pytest.mark.parametrize(
    ("whole", "broken"),
    [("Get-VM -Id $id", "Get-VM -Id ($id"), ("param($data)", "param($data"), ("} finally {", "} finally "), ("@{ ", "@{ = ")],
)
def test_a_broken_script_is_seen(whole: str, broken: str) -> None:
    text = powershell.script_text("record")
    assert whole in text
    assert errors(text.replace(whole, broken, 1)) != []


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_takes_one_argument_and_names_vms_by_id(name: str) -> None:
    text = powershell.script_text(name)
    code = [line for line in text.splitlines() if not line.startswith("#")]
    assert text.isascii()
    assert code[0] == "param($data)"
    assert not re.search(r"-VMName|-Name \$data|Invoke-Expression|\biex\b|-Path \$|Save-VM", text)


COMMANDS = {
    *("Get-VM", "Set-VM", "Start-VM", "Stop-VM", "Checkpoint-VM", "Get-VMSnapshot", "Remove-VMSnapshot", "Get-VMFirmware"),
    *("Get-VMSecurity", "Get-VMHardDiskDrive", "Get-VMNetworkAdapter", "Get-VMIntegrationService", "Get-VHD", "Get-Volume"),
    *("Get-ClusterGroup", "Get-ClusterResource", "Get-CimInstance", "Invoke-CimMethod", "Get-Command", "New-Object"),
    *("ForEach-Object", "Where-Object", "Select-Object", "Start-Sleep"),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_uses_known_commands_only(name: str) -> None:
    """The grammar takes any word for a command; a misspelt one would show on the host alone."""
    code = "\n".join(line for line in powershell.script_text(name).splitlines() if not line.startswith("#"))
    assert set(re.findall(r"\b[A-Z][A-Za-z]+-[A-Z][A-Za-z]+\b", code)) <= COMMANDS


def code_of(name: str) -> str:
    return "\n".join(line for line in powershell.script_text(name).splitlines() if not line.startswith("#"))


def variables(code: str) -> set[str]:
    return {found.lower() for found in re.findall(r"\$([A-Za-z_][A-Za-z0-9_]*)", code)}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_leaves_nothing_to_the_next_and_takes_nothing_from_the_one_before(name: str) -> None:
    """One PowerShell runs them all, one after another, each in a scope below the bootstrap's."""
    code = code_of(name)
    assert not re.search(r"\$(global|script|using):|\$env:\w+ =|\b(Set|New)-(Variable|Alias|PSDrive)\b", code, re.IGNORECASE)
    assert not re.search(r"\bexit\b|preference", code, re.IGNORECASE)
    opened = re.findall(r"\$(\w+) = (?:New-Object System\.Threading\.Mutex|\[System\.IO\.File\]::Open)", code)
    assert all(f"${one}.Dispose()" in code for one in opened)
    released = re.findall(r"finally {\n    \$mutex\.ReleaseMutex\(\)\n    \$mutex\.Dispose\(\)", code)
    assert len(released) == code.count("Threading.Mutex ")
    for shared in variables(code) & (variables(powershell.BOOTSTRAP) - {"_", "null", "true", "false", "data"}):
        first = re.search(rf"\${shared}\b(.{{0,3}})", code, re.IGNORECASE)
        assert first is not None
        assert first[1].startswith(" = "), f"${shared} is the bootstrap's where it was not set"


def test_nobody_but_the_bootstrap_reads_the_input() -> None:
    """`$input` anywhere makes PowerShell read it as well (ConsoleHost.cs: IsUsingDollarInput)."""
    assert "input" not in variables("\n".join([powershell.BOOTSTRAP, *map(code_of, SCRIPTS)]))
    assert " -InputFormat None " in powershell.COMMAND


def test_every_script_is_on_the_page_and_no_other() -> None:
    page = PAGE.read_text("utf-8")
    assert set(re.findall(r"\*\*([a-z-]+)\*\* `\{", page)) == set(SCRIPTS)
    assert powershell.BOOTSTRAP in page
    assert f"{len(powershell.COMMAND)} characters" in page


def test_the_page_names_every_field_of_a_scripts_data() -> None:
    page = PAGE.read_text("utf-8")
    for name in SCRIPTS:
        used = set(re.findall(r"\$data\.([a-zA-Z]+)", powershell.script_text(name)))
        said = re.search(rf"\*\*{name}\*\* `{{([^}}]*)}}`", page)
        assert said is not None
        assert set(re.findall(r'"([a-zA-Z]+)"', said[1])) == used


def test_the_command_line_needs_no_quoting_and_fits_into_cmd() -> None:
    assert re.fullmatch(r"[A-Za-z0-9 .+/=-]+", powershell.COMMAND)
    assert len(powershell.BOOTSTRAP) < 3000
    assert len(powershell.COMMAND) < 8191
    sent = base64.b64decode(powershell.COMMAND.rpartition(" ")[2]).decode("utf-16-le")
    assert sent == powershell.BOOTSTRAP
    assert sent.startswith("$ProgressPreference='SilentlyContinue'\n")
