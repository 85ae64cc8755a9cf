"""docs/esxi-commands.md and the played ESXi host agree on what may be sent; all else is refused and recorded."""

from __future__ import annotations

import re
import shlex
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.persona.conftest import SSH, BuildEsxi, MiB

from tokvm.testing.esxi import contract, shell
from tokvm.testing.esxi.dump import LEAN, NEW, OLD, UNSET, Many, Null, Object, Ref, dump
from tokvm.testing.esxi.errors import NotInContract
from tokvm.testing.esxi.host import TAG, DiskSpec, MachineSpec

DIR = "/vmfs/volumes/5f2c0b1e-8d3a7c44-1f00-0cc47a000001/my vm (1) 'é'"
PAGE = Path(__file__).parents[2] / "docs" / "esxi-commands.md"
WORDS = {
    "N": "12",
    "S": "3",
    "MARK": "tokvm-01jd-7",
    "TASK": "haTask-12-vim.VirtualMachine.createSnapshot-77",
    "ACTION": "none",
    "DELAY": "-1",
    "ORDER": "-1",
    "STOP": "systemDefault",
    "STOPDELAY": "-1",
    "HEARTBEAT": "systemDefault",
    "SOURCE": f"{DIR}/a b.vmdk",
    "FILE": f"{DIR}/x.vmx",
    "JSON": '{"a": "b\'c $(d) `e` é"}',
}


def documented() -> list[str]:
    """The commands of the page's tables, with something in the place of each placeholder."""
    found = []
    for row in re.findall(r"^\| `(.*?)` \|", PAGE.read_text(), re.MULTILINE):
        line = re.sub(
            r"DIR(/[A-Za-z.-]+)+", lambda match: shlex.quote(match[0].replace("DIR", DIR).replace("NAME", "d 1")), row
        )
        line = line.replace("if=FILE", "if=" + shlex.quote(f"{DIR}/a-flat.vmdk"))
        found.append(re.sub(r"\b[A-Z]+\b(?=\s|$)", lambda match: shlex.quote(WORDS.get(match[0], match[0])), line))
    return found


def test_every_command_of_the_page_is_known() -> None:
    lines = documented()
    assert len(lines) > 25
    names = set()
    for line in lines:
        tagged = f"{line}; echo {TAG} $?"
        found = [one for one in (line, tagged) if not _refused(one)]
        assert len(found) == 1, line
        names.add(contract.read_line(found[0])[0][0].name)
    assert names == {*contract.ROWS, "claim", "write"}


def _refused(line: str) -> str:
    try:
        contract.read_line(line)
    except NotInContract as error:
        return str(error)
    return ""


PLAIN = DIR.partition(" ")[0]
GOOD = f"vim-cmd vmsvc/get.summary 1; echo {TAG} $?"


@pytest.mark.parametrize(
    "line",
    [
        "",
        "ls",
        "reboot",
        "vim-cmd vmsvc/get.summary 1",  # a read without TAG
        "vim-cmd vmsvc/get.summary 1; echo x $?",
        "vim-cmd vmsvc/get.summary 1; echo tokvm-0123456789abcdeg $?",
        f"{GOOD}; vim-cmd vmsvc/get.summary 1; echo tokvm-1123456789abcdef $?",
        f"{GOOD};",
        f"{GOOD}; ",
        f"{GOOD} && reboot",
        f"{GOOD}; reboot; echo {TAG} $?",
        f"vim-cmd vmsvc/power.off 1; echo {TAG} $?",  # a change among reads
        "vim-cmd vmsvc/power.off 1; vim-cmd vmsvc/power.on 1",
        "vim-cmd vmsvc/power.off",
        "vim-cmd vmsvc/power.off 1 2",
        "vim-cmd vmsvc/power.off x",
        "vim-cmd vmsvc/power.off $1",
        "vim-cmd vmsvc/power.off 1 >/dev/null",
        "vim-cmd vmsvc/power.off 1 &",
        "vim-cmd vmsvc/power.off 1\nreboot",
        "vim-cmd vmsvc/power.off 1 | cat",
        'vim-cmd vmsvc/power.off "$(reboot)"',
        "vim-cmd vmsvc/power.off '1",
        "vim-cmd vmsvc/snapshot.removeall 1",
        "vim-cmd vmsvc/snapshot.create 1 mine tokvm 0 0",
        "vim-cmd vmsvc/snapshot.create 1 tokvm-a-1 tokvm 1 0",
        "vim-cmd vmsvc/snapshot.remove 1 2 1",
        "vim-cmd hostsvc/autostartmanager/update_autostartentry 1 none -1 -1 none -1 no",
        f"cat /etc/passwd; echo {TAG} $?",
        f"cat /vmfs/volumes/datastore1/web/web.vmx; echo {TAG} $?",  # by name, not by uuid
        f"cat '{DIR.replace(chr(39), '')}/../x/y.vmx'; echo {TAG} $?",
        f"cat '{DIR.replace(chr(39), '')}/web-flat.vmdk'; echo {TAG} $?",
        f"rm -f {PLAIN}/web.vmx",
        f"rm -rf {PLAIN}",
        f"set -C; printf %s x >{PLAIN}/tokvm.json",
        f"printf %s x >{PLAIN}/web.vmx",
        f"printf %s x >{PLAIN}/tokvm.json.new && mv -f {PLAIN}/y {PLAIN}/tokvm.json",
        f"vmkfstools -U {PLAIN}/web.vmdk",
        f"vmkfstools -i {PLAIN}/web.vmdk {PLAIN}/web2.vmdk -d thin",
    ],
)
def test_what_is_not_on_the_page_is_refused(line: str) -> None:
    assert _refused(line)


def test_a_violation_is_recorded_and_does_nothing(build_esxi: BuildEsxi, ssh: SSH) -> None:
    host = build_esxi()
    done = ssh(host, "vim-cmd vmsvc/destroy 1")
    assert (done.returncode, done.stdout) == (127, b"")
    assert b"not found" in done.stderr
    assert [row["command"] for row in host.violations()] == ["vim-cmd vmsvc/destroy 1"]
    assert host.is_running("web")


def test_somebody_elses_snapshot_is_not_ours_to_remove(build_esxi: BuildEsxi) -> None:
    host = build_esxi()
    made = host.foreign_snapshot("web", "nightly")["id"]
    host.vim("vmsvc/snapshot.remove", host.vmid("web"), made, 0)
    assert [one["name"] for one in host.snapshots("web")] == ["nightly"]
    assert "somebody else's" in str(host.violations()[0]["why"])


@given(st.lists(st.text(st.characters(exclude_characters="\n\0", exclude_categories=["Cs"])), min_size=1))
def test_quoted_words_come_out_as_they_went_in(words: list[str]) -> None:
    line = shlex.join(words)
    assert shell.parse(line).commands == [words]


@given(st.text(string.printable, max_size=60))
def test_no_text_makes_the_little_shell_fail_in_another_way(text: str) -> None:
    try:
        found = shell.parse(text)
    except NotInContract:
        return
    assert all(found.commands)


def test_several_reads_in_a_line_each_with_its_code(build_esxi: BuildEsxi, ssh: SSH) -> None:
    host = build_esxi()
    folder = host.directory("web")
    reads = ["vim-cmd vmsvc/power.getstate 1", "vim-cmd vmsvc/power.getstate 99", f"cat {folder}/tokvm.json", "date +%s"]
    done = ssh(host, "; ".join(f"{one}; echo {TAG} $?" for one in reads))
    parts = done.stdout.decode().split(TAG)
    assert done.returncode == 0
    assert [part.split("\n")[0] for part in parts[1:]] == [" 0", " 1", " 1", " 0"]
    assert parts[0] == "Retrieved runtime info\nPowered on\n"
    assert "(vim.fault.NotFound) {" in parts[1]
    assert done.stderr.decode() == f"cat: can't open '{folder}/tokvm.json': No such file or directory\n"
    assert host.violations() == []


def test_a_text_without_an_end_of_line_shares_its_line_with_the_tag(build_esxi: BuildEsxi) -> None:
    host = build_esxi()
    folder = host.directory("web")
    assert host.run(f"printf %s '{{}}' >{folder}/tokvm.json.new && mv -f {folder}/tokvm.json.new {folder}/tokvm.json").code == 0
    assert host.run(f"cat {folder}/tokvm.json; echo {TAG} $?").stdout == f"{{}}{TAG} 0\n"


@pytest.mark.slow
def test_the_first_claim_wins(build_esxi: BuildEsxi) -> None:
    host = build_esxi()
    owner = f"{host.directory('web')}/tokvm-owner"
    assert [host.run(f"set -C; printf %s {who} >{owner}").code for who in ("a", "b")] == [0, 1]
    assert host.ask("cat", owner).stdout == "a"
    assert host.run(f"rm -f {owner}").code == host.run(f"rm -f {owner}").code == 0
    assert host.run(f"set -C; printf %s 'b \"ü\"' >{owner}").code == 0
    assert host.ask("cat", owner).stdout == 'b "ü"'
    assert host.violations() == []


# What hosts print, taken from published output of real ones


def test_the_table_of_vms_is_as_wide_as_what_is_in_it(build_esxi: BuildEsxi) -> None:
    """ESXi 6.7's, to the blank; an annotation of two lines breaks it."""
    machines = [
        MachineSpec("xx", running=False, fields={"guestId": "rhel8_64Guest", "version": "vmx-14"}),
        MachineSpec(
            "makemake",
            running=False,
            fields={"guestId": "centos8_64Guest", "version": "vmx-14", "annotation": "Rocky linux 8\nautostart"},
        ),
    ]
    assert build_esxi(*machines).ask("vim-cmd", "vmsvc/getallvms").stdout == (
        "Vmid     Name                    File                     Guest OS       Version         Annotation       \n"
        "1      xx         [datastore1] xx/xx.vmx               rhel8_64Guest     vmx-14                           \n"
        "2      makemake   [datastore1] makemake/makemake.vmx   centos8_64Guest   vmx-14    Rocky linux 8\nautostart\n"
    )


def test_a_vm_whose_files_are_gone_is_skipped_and_said_so(build_esxi: BuildEsxi) -> None:
    host = build_esxi(MachineSpec("a", running=False), MachineSpec("b", running=False, fields={"invalid": True}))
    lines = host.ask("vim-cmd", "vmsvc/getallvms").stdout.splitlines()
    assert lines[0] == "Skipping invalid VM '2'"
    assert [line[:1] for line in lines[1:]] == ["V", "1"]


def test_dumps_of_old_and_new_hosts() -> None:
    value = Object("a.B", [("n", Null("c.D")), ("u", UNSET), ("s", Many("string", ['x "y"', "z"])), ("r", Ref("vim.X:1"))])
    middle = '   s = (string) [\n      "x "y"", \n      "z"\n   ], \n'
    assert dump(value, style=NEW) == f"(a.B) {{\n   n = (c.D) null, \n   u = <unset>, \n{middle}   r = 'vim.X:1'\n}}\n"
    assert dump(value, style=LEAN) == f"(a.B) {{\n   n = (c.D) null, \n{middle}   r = 'vim.X:1'\n}}\n"
    assert dump(value, style=OLD) == (
        f"(a.B) {{\n   dynamicType = <unset>, \n   n = (c.D) null, \n   u = <unset>, \n{middle}   r = 'vim.X:1', \n}}\n"
    )


def test_a_fault_is_printed_with_its_quotes_as_they_are(build_esxi: BuildEsxi) -> None:
    host = build_esxi(fault_code=0)
    done = host.vim("vmsvc/power.off", 2)
    assert done.code == 0
    assert done.stdout == (
        "(vim.fault.NotFound) {\n   faultCause = (vmodl.MethodFault) null, \n   faultMessage = <unset>\n"
        '   msg = "Unable to find a VM corresponding to "2""\n}\n'
    )


def test_devices_name_the_whole_chain(build_esxi: BuildEsxi) -> None:
    host = build_esxi(MachineSpec("a b", disks=[DiskSpec(8 * MiB, bus="sata", unit=3), DiskSpec(MiB, bus_number=1)]))
    for _ in range(2):
        host.foreign_snapshot("a b")
    text = host.ask("vim-cmd", "vmsvc/device.getdevices", 1).stdout
    names = re.findall(r'^( *)fileName = "(.*)", $', text, re.MULTILINE)
    store = host.state()["datastores"][0]["name"]
    assert [name for _, name in names[:3]] == [
        f"[{store}] a b/a b-000002.vmdk",
        f"[{store}] a b/a b-000001.vmdk",
        f"[{store}] a b/a b.vmdk",
    ]
    assert len({indent for indent, _ in names}) == 3
    assert [int(key) for key in re.findall(r"VirtualDisk\) \{\s+key = (\d+)", text)] == [16003, 2016]
    assert 'deltaDiskFormat = "seSparseFormat"' in text
