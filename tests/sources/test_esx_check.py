"""What is in the way of a VM, each with what to do about it; and that a plain VM has nothing in its way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.sources.esx_double import DIR, OTHER, STORE, VM, FakeEsx, connect

from tokvm.core.machine import Finding, Severity
from tokvm.sources.vmware.source import EsxSource

Change = Callable[[FakeEsx], object]


def findings(host: FakeEsx, source: EsxSource | None = None) -> list[Finding]:
    source = source or connect(host)
    return source.check(source.inspect(VM), owner="me@here 1")


def set_(**values: object) -> Change:
    return lambda host: host.__dict__.update(values)


def backing(text: str) -> Change:
    return lambda host: host.backing.update({"scsi0:0": text})


def device(type_: str, more: str = "") -> Change:
    return set_(devices=f", \n      (vim.vm.device.{type_}) {{\n         key = 11000{more}\n      }}")


def snapshots(count: int, name: str = "nightly") -> Change:
    return lambda host: [host.freeze(f"{name}-{number}") for number in range(count)]


def test_a_plain_vm_has_nothing_in_its_way(tmp_path: Path) -> None:
    host = FakeEsx(tmp_path)
    assert findings(host) == []
    assert not [words for words in host.log if words[0] == "vim-cmd" and "power.o" in words[1]]


@pytest.mark.parametrize(
    ("change", "severity", "what", "fix"),
    [
        (backing('diskMode = "independent_persistent", '), Severity.BLOCKER, "snapshots leave it out", "dependent"),
        (backing('diskMode = "independent_nonpersistent", '), Severity.BLOCKER, "independent_nonpersistent", "dependent"),
        (backing('diskMode = "nonpersistent", '), Severity.BLOCKER, "thrown away", "persistent"),
        (backing('sharing = "sharingMultiWriter", '), Severity.BLOCKER, "sharingMultiWriter", "detach"),
        (set_(controller="physicalSharing"), Severity.BLOCKER, "physicalSharing", "detach"),
        (backing('keyId = (vim.encryption.CryptoKeyId) {\n keyId = "1"\n}, '), Severity.BLOCKER, "ciphertext", "decrypt"),
        (set_(settings={"encryption.keySafe": "vmware:key/list/x"}), Severity.BLOCKER, "ciphertext", "decrypt"),
        (device("VirtualTPM"), Severity.BLOCKER, "virtual TPM", "BitLocker"),
        (set_(settings={"vtpm.present": "TRUE"}), Severity.BLOCKER, "virtual TPM", "BitLocker"),
        (device("VirtualNVDIMM"), Severity.BLOCKER, "persistent memory", "remove"),
        (device("VirtualPCIPassthrough"), Severity.BLOCKER, "passed through", "remove"),
        (set_(store_type="vsan"), Severity.BLOCKER, "type vsan", "storage vMotion"),
        (set_(store_type="VVOL"), Severity.BLOCKER, "type VVOL", "storage vMotion"),
        (set_(consolidation_needed=True), Severity.BLOCKER, "need consolidation", "Consolidate"),
        (set_(needs_consolidate=True), Severity.BLOCKER, "need consolidation", "Consolidate"),
        (set_(fault_tolerance="running"), Severity.BLOCKER, "fault tolerance", "turn"),
        (set_(state="suspended"), Severity.BLOCKER, "suspended", "resume"),
        (set_(question="msg.hbacommon.outofspace"), Severity.BLOCKER, "outofspace", "answer"),
        (set_(template=True), Severity.BLOCKER, "template", "make a VM"),
        (set_(chains={}), Severity.BLOCKER, "no disk", "nothing"),
        (set_(tools="guestToolsNotRunning"), Severity.WARNING, "cannot be asked", "--force-off"),
        (set_(vcenter='"192.0.2.7"'), Severity.WARNING, "192.0.2.7", "vpx://"),
        (set_(free=1 << 20), Severity.WARNING, "little room", "free space"),
        (snapshots(2), Severity.WARNING, "2 snapshot(s) of somebody else: ", "must stay"),
        (snapshots(4), Severity.WARNING, "more than is wise", "must stay"),
        (snapshots(29), Severity.BLOCKER, "29 snapshots", "remove"),
    ],
)  # fmt: skip
def test_what_is_in_the_way_is_said(tmp_path: Path, change: Change, severity: Severity, what: str, fix: str) -> None:
    host = FakeEsx(tmp_path)
    change(host)
    found = [one for one in findings(host) if what in one.what]
    assert len(found) == 1, findings(host)
    assert (found[0].severity, fix in found[0].fix) == (severity, True), found


@pytest.mark.parametrize(("mode", "kind"), [("physicalMode", "physical"), ("virtualMode", "virtual")])
def test_a_raw_device_mapping_is_refused(tmp_path: Path, mode: str, kind: str) -> None:
    host = FakeEsx(tmp_path)
    real = host.do_device_getdevices(()).replace("FlatVer2BackingInfo) {", "RawDiskMappingVer1BackingInfo) {\n")
    real = real.replace('diskMode = "persistent"', f'diskMode = "persistent", \ncompatibilityMode = "{mode}"')
    host.script["device.getdevices"] = [real, real]
    found = [one for one in findings(host) if "raw device mapping" in one.what]
    assert [kind in one.what for one in found] == [True]


def test_our_own_snapshots_are_nobody_elses(tmp_path: Path) -> None:
    host = FakeEsx(tmp_path)
    snapshots(3, "tokvm-ab12")(host)
    assert findings(host) == []


def test_a_vm_that_another_one_holds_or_fenced_is_not_ours(tmp_path: Path) -> None:
    host = FakeEsx(tmp_path)
    host.texts[f"{DIR}/tokvm-owner"] = json.dumps({"v": 1, "owner": "you@there 2"})
    (found,) = findings(host)
    assert (found.severity, "you@there 2" in found.what, f"{DIR}/tokvm-owner" in found.fix) == (Severity.BLOCKER, True, True)
    host.texts[f"{DIR}/tokvm-owner"] = json.dumps({"v": 1, "owner": "me@here 1"})
    assert findings(host) == []
    host.texts.clear()
    host.texts[f"{DIR}/tokvm.json"] = json.dumps({"v": 1, "fence": {"reason": "migrated", "before": None}})
    assert ["it is fenced: migrated" in one.what for one in findings(host)] == [True]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"v": 2}', '{"v": 1, "owner": 3}', '{"v": 1, "more": 1}', "[" * 90_000])
def test_a_record_that_nobody_here_wrote_is_in_the_way(tmp_path: Path, text: str) -> None:
    host = FakeEsx(tmp_path)
    for name in ("tokvm-owner", "tokvm.json"):
        host.texts = {f"{DIR}/{name}": text}
        found = [one for one in findings(host) if "is not what this tokvm wrote" in one.what]
        assert len(found) == 1


def test_a_vm_that_went_away_meanwhile_is_a_blocker(tmp_path: Path) -> None:
    host = FakeEsx(tmp_path)
    source = connect(host)
    vm = source.inspect(VM)
    host.uuid = OTHER
    assert [(one.severity, "no such VM" in one.what) for one in source.check(vm)] == [(Severity.BLOCKER, True)]


def test_a_disk_on_an_unmounted_datastore_is_refused(tmp_path: Path) -> None:
    host = FakeEsx(tmp_path)
    gone = host.do_device_getdevices(()).replace(f"[{STORE}] web/web.vmdk", "[unplugged] web/web.vmdk")
    host.script["device.getdevices"] = [gone]
    with pytest.raises(Exception, match="no mounted datastore"):
        connect(host).inspect(VM)
