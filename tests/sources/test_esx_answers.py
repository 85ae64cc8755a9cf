"""Taking apart what ESXi prints: dumps whose strings nobody escapes, tables for people, dictionaries, XML; and naming files."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.sources.esx_double import MOUNT, STORE, esxcli, fault

from tokvm.core.errors import SourceError
from tokvm.sources.vmware import faults
from tokvm.sources.vmware.esxcli import parse_rows
from tokvm.sources.vmware.faults import Fault, explain, fault_name, is_away
from tokvm.sources.vmware.listings import possible_marks, possible_vmids
from tokvm.sources.vmware.machines import _VMX
from tokvm.sources.vmware.places import Datastore, Datastores
from tokvm.sources.vmware.vimcmd import Object, Reference, parse
from tokvm.sources.vmware.vmx import Dictionary, SnapshotList

DUMP = """Listsummary:

(vim.vm.Summary) {
   dynamicType = <unset>,
   vm = 'vim.VirtualMachine:3',
   runtime = (vim.vm.RuntimeInfo) {
      powerState = "poweredOn",
      question = (vim.vm.QuestionInfo) null,
      reasons = (string) [
         "one",
         "two"
      ],
      none = (vim.CustomFieldsManager.Value) [],
      maxCpuUsage = -1,
   },
   config = (vim.vm.Summary.ConfigSummary) {
      name = "web",
      template = false
   }
}
""".replace(",\n", ", \n")


def fields(text: str, **known: object) -> dict[str, object]:
    found = parse(text, **known)  # type: ignore[arg-type]
    assert isinstance(found, Object)
    return dict(found.fields)


def test_a_dump_of_any_age_is_taken_apart() -> None:
    found = fields(DUMP)
    assert found["vm"] == Reference("vim.VirtualMachine:3")
    assert found["dynamicType"] is None
    runtime, config = found["runtime"], found["config"]
    assert isinstance(runtime, Object)
    assert isinstance(config, Object)
    assert runtime.fields == {
        "powerState": "poweredOn", "question": None, "reasons": ["one", "two"], "none": [], "maxCpuUsage": -1,
    }  # fmt: skip
    assert config.fields == {"name": "web", "template": False}
    assert parse("(ManagedObjectReference) []") == []
    assert parse("(vim.vm.SnapshotInfo) null\n") is None


def test_quotes_and_lines_in_strings_stand_as_they_are() -> None:
    found = fields('(x) {\n   msg = "no VM corresponding to "23"", \n   note = "first\nsecond "line" of it", \n   name = ""\n}')
    assert found == {"msg": 'no VM corresponding to "23"', "note": 'first\nsecond "line" of it', "name": ""}


@pytest.mark.parametrize(
    "note",
    [
        'x", \n   powerState = "poweredOff',  # replaces
        'x"\n}\n(vim.vm.Summary) {\n   name = "evil',  # ends the object and begins another
        'x", \n   list = (string) [\n      "y',  # opens what nobody closes
        'ends with "quotes"\nand goes on',
        'x", \n   powerState = (y) {\n   z = "',
    ],
)
def test_a_text_that_imitates_fields_is_refused(note: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        parse(f'(x) {{\n   powerState = "poweredOn", \n   note = "{note}", \n   after = 1, \n}}')


def test_a_text_that_is_known_is_only_a_text() -> None:
    note = 'ends with "quotes"\n   powerState = "poweredOff'
    text = f'(x) {{\n   powerState = "poweredOn", \n   note = "{note}", \n   after = 1, \n}}'
    assert fields(text, known=[note]) == {"powerState": "poweredOn", "note": note, "after": 1}


@given(st.text(alphabet='ab"\n,= {}()[]<>', max_size=40))
def test_no_text_changes_a_field_that_stands_before_or_behind_it(note: str) -> None:
    text = f'(x) {{\n   first = "1", \n   note = "{note}", \n   last = "2", \n}}'
    try:
        found = fields(text)
    except ValueError:
        return
    assert found["first"] == "1"
    assert found["last"] == "2"


@given(st.text(max_size=60))
def test_any_known_text_comes_through(note: str) -> None:
    text = f'(x) {{\n   first = "1", \n   note = "{note}", \n   last = "2", \n}}'
    assert fields(text, known=[note])["note"] == note


@pytest.mark.parametrize(
    "text", ["", "Listsummary:", "(x) {", "(x) {\n a = }", "(x) [1 2", "(x) {}\n(x) {}", "'a'", "(x) {" * 99]
)
def test_what_is_no_dump_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse(text)


def test_a_dump_is_bounded() -> None:
    with pytest.raises(ValueError, match="deep"):
        parse("(x) [" * 100 + "]" * 100)
    with pytest.raises(ValueError, match="longer"):
        parse("(x) [" + " " * (9 << 20) + "]")


def test_a_fault_is_known_by_name_and_shown_in_the_hosts_words() -> None:
    text = "Powering off VM:\n" + fault("InvalidPowerState", 'cannot be performed on "web" (Powered off).')
    assert fault_name(text) is None  # an answer that begins otherwise is an answer
    assert fault_name(text, anywhere=True) == "InvalidPowerState"
    assert fault_name("(vmodl.fault.ManagedObjectNotFound) {\n}") == "ManagedObjectNotFound"
    assert fault_name("(vmodl.RuntimeFault) {\n}") == "RuntimeFault"
    assert fault_name('(vim.TaskInfo) {\n   state = "running"\n}') is None
    error = explain(text, command="vim-cmd vmsvc/power.off 12", where="ssh://root@esx1")
    assert error.fault is Fault.BAD_STATE
    assert 'cannot be performed on "web"' in error.what
    assert explain(fault("NewlyInvented"), command="x", where="y").fault is Fault.UNKNOWN
    assert faults.is_failure("Create Snapshot:\nCreate snapshot failed\n")
    assert not faults.is_failure("Create Snapshot:\n")
    assert is_away("Connect to localhost failed: Connection failure.\n")
    assert not is_away(DUMP)


def test_a_table_of_vms_gives_numbers_to_ask_for() -> None:
    text = (
        "Vmid      Name     File                Guest OS    Version   Annotation\n"
        "12     web 1   [Store 1] web/web.vmx   x   vmx-19   first\n"
        "13     evil   [Store 1] evil/evil.vmx   x   vmx-19   looks like the next row\n"
        "not a row\n\nSkipping invalid VM '7'\n12   again\n"
    )
    assert possible_vmids(text) == [12, 13]
    assert possible_vmids("Vmid   Name   File   Guest OS   Version   Annotation\n") == []
    with pytest.raises(ValueError, match="Vmid"):
        possible_vmids("Failed to login\n")


def test_a_tree_gives_pairs_that_may_be_ours() -> None:
    text = (
        "Get Snapshot:\n|-ROOT\n--Snapshot Name        : tokvm-ab12-1\n--Snapshot Id        : 3\n"
        "--Snapshot Desciption  : x\n--Snapshot Created On  : 10/4/2026 19:0:52\n--Snapshot State       : powered off\n"
        "--|-CHILD\n----Snapshot Name        : nightly\n--Snapshot Name        : tokvm-ab12-7\n----Snapshot Id        : 4\n"
        "----Snapshot Desciption  : \n----Snapshot Name        : tokvm-ab12-9\n----Snapshot Id        : 9\n"
    )
    assert possible_marks(text) == {
        (3, "tokvm-ab12-1"),
        (9, "tokvm-ab12-9"),
    }  # the second is of a description: the .vmsd decides


def test_a_dictionary_is_read_in_its_encoding_and_unescaped() -> None:
    found = Dictionary(
        '#!/usr/bin/vmware\n.encoding = "UTF-8"\nDisplayName = "the |22new|22 one|0Asecond |7C ü"\nplain = TRUE\n'
    )
    assert found.get("displayname") == 'the "new" one\nsecond | ü'
    assert found.truth("PLAIN")
    assert found.get("none", "x") == "x"
    latin = '.encoding = "windows-1252"\nname = "ü"\n'.encode("cp1252").decode("utf-8", "surrogateescape")
    assert Dictionary(latin).get("name") == "ü"


@pytest.mark.parametrize("label", ["rot13", "zlib", "undefined", "none-such"])
def test_an_encoding_that_is_none_of_texts_is_not_used(label: str) -> None:
    assert Dictionary(f'.encoding = "{label}"\nname = "web"\n').get("name") == "web"


@pytest.mark.parametrize(
    "read",
    [
        lambda: parse('(x) {\n   hostName = "x"' + " " * 20_000 + 'y",\n}'),
        lambda: _VMX.findall("\n" * 40_000 + "x"),
        lambda: Dictionary("a =" + " " * 40_000 + '"\n'),
        lambda: Dictionary("\n" * 40_000 + "a"),
    ],
)
def test_blanks_without_end_cost_no_time(read: Callable[[], object]) -> None:
    """A guest chooses its host name, and whoever may edit a VM its notes; every `tokvm ls` reads them."""
    begun = time.process_time()
    with contextlib.suppress(ValueError):
        read()
    assert time.process_time() - begun < 2


def test_a_key_with_two_values_is_refused_when_it_is_asked_for() -> None:
    found = Dictionary('a = "1"\na = "1"\nb = "1"\nB = "2"\n')
    assert found.get("a") == "1"
    with pytest.raises(ValueError, match="says b twice"):
        found.get("b")
    with pytest.raises(ValueError, match="line 1"):
        Dictionary("what is this\n")


def test_disks_and_snapshots_are_counted_past_nine() -> None:
    disks = "".join(f'scsi0:{n}.present = "TRUE"\nscsi0:{n}.fileName = "d{n}.vmdk"\n' for n in range(12))
    others = 'sata0:0.present = "TRUE"\nsata0:0.deviceType = "cdrom-image"\nsata0:0.fileName = "x.vmdk"\n'
    others += 'scsi1:0.fileName = "absent.vmdk"\n'
    assert set(Dictionary(disks + others).disks()) == {f"scsi0:{n}" for n in range(12)}
    rows = "".join(
        f'snapshot{n}.uid = "{n + 100}"\nsnapshot{n}.displayName = "s{n}"\nsnapshot{n}.numDisks = "11"\n'
        + "".join(
            f'snapshot{n}.disk{d}.fileName = "d{d}-{n}.vmdk"\nsnapshot{n}.disk{d}.node = "scsi0:{d}"\n' for d in range(11)
        )
        for n in range(12)
    )
    found = SnapshotList.parse(rows)
    assert [entry.uid for entry in found.entries] == list(range(100, 112))
    entry = found.with_uid(111)
    assert entry is not None
    assert entry.frozen["scsi0:10"] == "d10-11.vmdk"


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('snapshot0.uid = "1"\nsnapshot1.uid = "1"\n', "one uid"),
        ('snapshot0.uid = "x"\n', "no number"),
        ('snapshot0.uid = "1"\nsnapshot0.numDisks = "99999"\n', "no number"),
        ('snapshot0.uid = "1"\nsnapshot0.numDisks = "1"\n', "missing"),
    ],
)
def test_a_snapshot_list_that_contradicts_itself_is_refused(text: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        SnapshotList.parse(text)


def test_esxcli_rows_come_from_xml_without_entities() -> None:
    assert parse_rows(esxcli("VirtualMachine", [{"DisplayName": "a & <b>", "WorldID": "1"}])) == [
        {"DisplayName": "a & <b>", "WorldID": "1"}
    ]
    assert parse_rows(esxcli("VirtualMachine", [])) == []
    bomb = '<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "aaaa">]><output>&a;</output>'
    for text, match in ((bomb, "DOCTYPE"), ("Connect to localhost failed", "no XML"), ("<a>" * 3, "no XML")):
        with pytest.raises(ValueError, match=match):
            parse_rows(text)


STORES = Datastores(
    [
        Datastore(STORE, MOUNT, "VMFS-6", 1, 1),
        Datastore("a", "/vmfs/volumes/11111111-22222222-3333-444444444444", "NFS", 1, 1),
        Datastore("a] b", "/vmfs/volumes/55555555-66666666", "NFS41", 1, 1),
        Datastore("vsanDatastore", "/vmfs/volumes/vsan:5270", "vsan", 1, 1),
    ],
    "ssh://root@esx1",
)


@pytest.mark.parametrize(
    "name", ["web.vmdk", "a b 'c' \"d\".vmdk", "$(reboot).vmdk", "`x`;rm -rf /.vmdk".replace("/", ""), "[x] y.vmdk"]
)
def test_a_file_of_any_name_is_found_on_its_datastore(name: str) -> None:
    assert STORES.path(f"[{STORE}] web/{name}") == f"{MOUNT}/web/{name}"
    assert STORES.path(f"[a] {name}") == f"/vmfs/volumes/11111111-22222222-3333-444444444444/{name}"
    assert STORES.beside(f"/vmfs/volumes/{STORE}/web/{name}", "/x") == f"{MOUNT}/web/{name}"
    assert STORES.beside(f"{MOUNT}/web/{name}", "/x") == f"{MOUNT}/web/{name}"


def test_a_name_beside_a_file_lies_beside_it() -> None:
    assert STORES.beside("web.vmdk", f"{MOUNT}/web") == f"{MOUNT}/web/web.vmdk"
    assert STORES.path("[a] b/c.vmdk").endswith("-444444444444/b/c.vmdk")
    with pytest.raises(SourceError, match="may lie on 2"):
        STORES.path("[a] b] c.vmdk")


@pytest.mark.parametrize(
    "text",
    ["web.vmdk", "[gone] web/web.vmdk", "[a] ../x.vmdk", "[a] x/../../y.vmdk", "[a] /x.vmdk", "[a] x//y.vmdk", "[a] ",
     "[a] x\ny.vmdk", "[a] x\0y.vmdk", "[a", ""],
)  # fmt: skip
def test_what_leads_elsewhere_is_refused(text: str) -> None:
    with pytest.raises(SourceError):
        STORES.path(text)


@pytest.mark.parametrize(
    "text", ["/etc/passwd", "/vmfs/volumes/../etc/passwd", "/vmfs/volumes/gone/x", "../x.vmdk", "/vmfs/volumes/a/../x"]
)
def test_a_path_that_leads_elsewhere_is_refused(text: str) -> None:
    with pytest.raises(SourceError):
        STORES.beside(text, f"{MOUNT}/web")


def test_only_some_datastores_have_files() -> None:
    assert [STORES.find(f"[{name}] x/y.vmdk")[0].has_files for name in (STORE, "a", "vsanDatastore")] == [True, True, False]
