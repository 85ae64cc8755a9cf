"""Power, snapshots and bad days of the played ESXi host."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.persona.conftest import SSH, BuildEsxi, MiB

from tokvm.testing.esxi.host import AutostartSpec, DatastoreSpec, DiskSpec, EsxHost, MachineSpec

OFF = "Retrieved runtime info\nPowered off\n"
ON = "Retrieved runtime info\nPowered on\n"


def power(host: EsxHost, vmid: int = 1) -> str:
    return host.ask("vim-cmd", "vmsvc/power.getstate", vmid).stdout


def processes(host: EsxHost) -> list[str]:
    text = host.ask("esxcli", "--formatter=xml", "vm", "process", "list").stdout
    return re.findall(r'<field name="ConfigFile">\s*<string>(.*)</string>', text)


def small(name: str = "web", **more: object) -> MachineSpec:
    return MachineSpec(name, disks=[DiskSpec(MiB)], **more)  # type: ignore[arg-type]


# Power


@pytest.mark.slow
def test_a_guest_is_asked_and_takes_its_time(build_esxi: BuildEsxi) -> None:
    host = build_esxi(small(shutdown_s=2.0))
    assert processes(host) == [f"{host.directory('web')}/web.vmx"]
    assert host.vim("vmsvc/power.shutdown", 1) == (0, "", "")
    assert power(host) == ON
    until(lambda: not host.is_running("web"))
    assert (power(host), processes(host)) == (OFF, [])
    assert host.vim("vmsvc/power.on", 1) == (0, "Powering on VM:\n", "")
    assert (power(host), len(processes(host))) == (ON, 1)
    assert host.starts_and_stops("web") == [("on", "a person"), ("off", "the guest stopped"), ("on", "vim-cmd")]


def test_a_guest_that_ignores_it_has_its_power_cut(build_esxi: BuildEsxi) -> None:
    host = build_esxi(small(ignores_shutdown=True))
    assert host.vim("vmsvc/power.shutdown", 1).code == 0
    assert power(host) == ON
    assert host.vim("vmsvc/power.off", 1) == (0, "Powering off VM:\n", "")
    assert power(host) == OFF
    done = host.vim("vmsvc/power.off", 1)
    assert done.code == 1
    assert done.stdout.startswith("Powering off VM:\nPower off failed: (vim.fault.InvalidPowerState) {\n")
    assert 'existingState = "poweredOff"\n   msg = "The attempted operation' in done.stdout


@pytest.mark.parametrize("code", [0, 1])
def test_without_tools_nobody_can_be_asked(build_esxi: BuildEsxi, code: int) -> None:
    host = build_esxi(small(fields={"tools": "guestToolsNotRunning"}), fault_code=code)
    done = host.vim("vmsvc/power.shutdown", 1)
    assert (done.code, done.stderr) == (code, "")
    assert done.stdout.startswith("(vim.fault.ToolsUnavailable) {\n")
    assert power(host) == ON


def test_a_suspended_vm_has_no_process_and_is_not_off(build_esxi: BuildEsxi) -> None:
    host = build_esxi(small())
    host.suspend("web")
    assert power(host) == "Retrieved runtime info\nSuspended\n"
    assert processes(host) == []
    assert "InvalidPowerState" in host.vim("vmsvc/power.shutdown", 1).stdout


@pytest.mark.slow
def test_a_power_on_that_waits_for_an_answer(build_esxi: BuildEsxi, ssh: SSH) -> None:
    question = "msg.uuid.altered:This virtual machine might have been moved or copied."
    host = build_esxi(small(running=False, asks=question))
    assert host.ask("vim-cmd", "vmsvc/message", 1).stdout == "No message.\n"
    with pytest.raises(subprocess.TimeoutExpired):
        host.run("vim-cmd vmsvc/power.on 1", timeout_s=1.0)
    assert (power(host), len(processes(host))) == (OFF, 1)
    said = host.ask("vim-cmd", "vmsvc/message", 1).stdout
    assert said.startswith(f"Virtual machine message _vmx1:\n{question}\n   0. ")
    assert f'text = "{question}", ' in host.ask("vim-cmd", "vmsvc/get.summary", 1).stdout
    host.answer("web", 0)
    assert (power(host), processes(host)) == (OFF, [])
    sshd = host.sshd
    argv = [
        "ssh",
        "-F",
        str(sshd.config_file),
        "-p",
        str(sshd.port),
        "--",
        f"{sshd.user}@{sshd.host}",
        "vim-cmd vmsvc/power.on 1",
    ]
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as waiting:
        until(lambda: host.vm("web")["question"])
        host.answer("web", 1)
        assert waiting.communicate(timeout=10)[0] == b"Powering on VM:\n"
    assert power(host) == ON
    assert host.violations() == []


def until(what: Callable[[], object], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_what_the_host_starts_by_itself(build_esxi: BuildEsxi) -> None:
    host = build_esxi(small("a", autostart=AutostartSpec(order=2)), small("b", autostart=AutostartSpec(order=1)), small("c"))
    line = "vim-cmd hostsvc/autostartmanager/update_autostartentry -- {} none -1 2 systemDefault -1 systemDefault"
    assert host.run(line.format(1)) == (0, "", "")
    assert 'startAction = "none"' in host.ask("vim-cmd", "hostsvc/autostartmanager/get_autostartseq").stdout
    host.host_restarts()
    assert [host.is_running(name) for name in "abc"] == [False, True, False]
    assert host.starts_and_stops("b")[-2:] == [("off", "host restart"), ("on", "autostart")]
    host.run(line.format(1).replace("none", "powerOn"))
    host.host_restarts()
    assert host.is_running("a")
    assert [vm["vmid"] for vm in host.state()["vms"]] == [1, 2, 3]


def test_ha_starts_what_it_finds_off(build_esxi: BuildEsxi) -> None:
    host = build_esxi(small())
    assert not host.ha_restarts("web")
    host.guest_stops("web")
    assert host.ha_restarts("web")
    assert host.starts_and_stops("web")[-1] == ("on", "vSphere HA")


# Snapshots


def test_the_tree_of_snapshots(build_esxi: BuildEsxi) -> None:
    host = build_esxi(small())
    for label in ("one", "two"):
        host.foreign_snapshot("web", label, description=f"the {label}")
    host.revert("web", 1)
    host.foreign_snapshot("web", "three")
    text = host.ask("vim-cmd", "vmsvc/snapshot.get", 1).stdout
    text = re.sub(r"\d+/\d+/\d{4} \d+:\d+:\d+", "TIME", text)
    assert text == (
        "Get Snapshot:\n|-ROOT\n"
        "--Snapshot Name        : one\n--Snapshot Id        : 1\n--Snapshot Desciption  : the one\n"
        "--Snapshot Created On  : TIME\n--Snapshot State       : powered on\n"
        "--|-CHILD\n"
        "----Snapshot Name        : two\n----Snapshot Id        : 2\n----Snapshot Desciption  : the two\n"
        "----Snapshot Created On  : TIME\n----Snapshot State       : powered on\n"
        "--|-CHILD\n"
        "----Snapshot Name        : three\n----Snapshot Id        : 3\n----Snapshot Desciption  : \n"
        "----Snapshot Created On  : TIME\n----Snapshot State       : powered off\n"
    )
    vmsd = host.local(f"{host.directory('web')}/web.vmsd").read_text()
    assert re.findall(r'^snapshot(\d)\.parent = "(\d)"', vmsd, re.MULTILINE) == [("1", "1"), ("2", "1")]
    assert 'snapshot.current = "3"\n' in vmsd


def test_without_snapshots_there_is_no_root(build_esxi: BuildEsxi) -> None:
    host = build_esxi(small())
    assert host.ask("vim-cmd", "vmsvc/snapshot.get", 1).stdout == "Get Snapshot:\n"
    assert host.local(f"{host.directory('web')}/web.vmsd").read_bytes() == b""


def test_values_with_quotes_and_lines_are_escaped_in_vmx_and_vmsd(build_esxi: BuildEsxi) -> None:
    host = build_esxi(small(fields={"annotation": 'a "b" | #c\nd\tü'}))
    host.foreign_snapshot("web", 'n "1"')
    folder = host.directory("web")
    assert 'annotation = "a |22b|22 |7C |23c|0Ad|09ü"\n' in host.ask("cat", f"{folder}/web.vmx").stdout
    assert 'snapshot0.displayName = "n |221|22"\n' in host.ask("cat", f"{folder}/web.vmsd").stdout
    assert 'annotation = "a "b" | #c\nd\tü"' in host.ask("vim-cmd", "vmsvc/get.summary", 1).stdout


@pytest.mark.slow
def test_making_and_removing_take_their_time(build_esxi: BuildEsxi) -> None:
    host = build_esxi(small(), create_s=60.0, merge_s=60.0)
    assert host.vim("vmsvc/snapshot.create", 1, "tokvm-a-1", "tokvm", 0, 0).stdout == "Create Snapshot:\n"
    assert host.snapshots("web") == []
    task = host.ask("vim-cmd", "vmsvc/get.tasklist", 1).stdout.split("'vim.Task:")[-1].split("'")[0]
    assert task.startswith("haTask-1-vim.VirtualMachine.createSnapshot-")
    assert 'state = "running"' in host.ask("vim-cmd", "vimsvc/task_info", task).stdout
    assert "TaskInProgress" in host.vim("vmsvc/snapshot.create", 1, "tokvm-a-2", "tokvm", 0, 0).stdout
    host.finish_tasks()
    assert 'state = "success"' in host.ask("vim-cmd", "vimsvc/task_info", task).stdout
    assert [one["name"] for one in host.snapshots("web")] == ["tokvm-a-1"]
    assert host.vim("vmsvc/snapshot.remove", 1, 1, 0).stdout == "Remove Snapshot:\n"
    assert (host.snapshots("web"), len(host.chain("web"))) == ([], 2)
    host.finish_tasks()
    assert len(host.chain("web")) == 1
    assert task in host.ask("vim-cmd", "vmsvc/get.tasklist", 1).stdout, "what is over stays in the list for a while"
    assert "NotFound" in host.vim("vmsvc/snapshot.remove", 1, 1, 0).stdout
    assert host.violations() == []


def test_finished_tasks_are_forgotten(build_esxi: BuildEsxi) -> None:
    host = build_esxi(small(), recent_s=0.1)
    host.foreign_snapshot("web")
    time.sleep(0.2)
    assert host.ask("vim-cmd", "vmsvc/get.tasklist", 1).stdout == "(ManagedObjectReference) []\n"
    done = host.ask("vim-cmd", "vimsvc/task_info", "haTask-1-vim.VirtualMachine.createSnapshot-5")
    assert done.stdout.startswith("(vmodl.fault.ManagedObjectNotFound) {\n")


def test_a_revert_goes_back_to_the_snapshots_bytes(build_esxi: BuildEsxi) -> None:
    host = build_esxi(small())
    host.write_disk("web", offset=0, data=b"a" * 512)
    made = host.foreign_snapshot("web")["id"]
    before = host.chain("web")[0]
    host.write_disk("web", offset=0, data=b"b" * 512)
    host.revert("web", made)
    assert host.read_disk("web")[:512] == b"a" * 512
    assert host.chain("web") == [before, host.chain("web")[1]], "the name is that of the delta that is gone"
    host.start("web")
    host.write_disk("web", offset=512, data=b"c" * 512)
    host.guest_stops("web")
    assert host.read_disk("web")[:1024] == b"a" * 512 + b"c" * 512


# Moving


@pytest.mark.slow
def test_a_vm_that_is_away_is_not_found_and_comes_back_under_another_number(build_esxi: BuildEsxi) -> None:
    host = build_esxi(small(), small("db"))
    host.vmotion_away("web")
    assert "(vim.fault.NotFound) {" in host.ask("vim-cmd", "vmsvc/get.summary", 1).stdout
    assert "web" not in host.ask("vim-cmd", "vmsvc/getallvms").stdout
    assert len(processes(host)) == 1
    assert host.ask("dd", f"if={host.extent(host.chain('web')[0])}", "of=/dev/null", "bs=512", "count=1").code == 1
    host.vmotion_back("web")
    assert host.vmid("web") > 2
    assert power(host, host.vmid("web")) == ON


@pytest.mark.slow
def test_storage_vmotion_takes_all_files_along(build_esxi: BuildEsxi) -> None:
    host = build_esxi(small(), datastores=[DatastoreSpec(), DatastoreSpec("ds two", type="VMFS-5")])
    host.write_disk("web", offset=0, data=b"a" * 512)
    made = host.foreign_snapshot("web")["id"]
    host.write_disk("web", offset=0, data=b"b" * 512)
    old = host.directory("web")
    host.local(f"{old}/tokvm.json").write_text("{}")
    host.storage_vmotion("web", "ds two", "web_1")
    assert [path.name for path in host.local(old).iterdir()] == ["tokvm.json"], "what hostd does not know stays behind"
    second = host.state()["datastores"][1]["uuid"]
    assert host.chain("web") == [f"/vmfs/volumes/{second}/web_1/web{end}.vmdk" for end in ("-000001", "")]
    assert host.extent(host.chain("web")[0]).endswith("-000001-delta.vmdk")
    assert "[ds two] web_1/web.vmx" in host.ask("vim-cmd", "vmsvc/get.summary", 1).stdout
    assert host.local(host.extent(host.frozen("web", made)[0])).read_bytes()[:512] == b"a" * 512
    host.guest_stops("web")
    image = host.local(host.chain("web")[0])
    out = Path(f"{image}.raw")
    subprocess.run(["qemu-img", "convert", "-f", "vmdk", "-O", "raw", str(image), str(out)], check=True)
    assert out.read_bytes() == host.read_disk("web")


def test_a_merge_that_a_restart_interrupts_leaves_work_to_do(build_esxi: BuildEsxi) -> None:
    host = build_esxi(small(autostart=AutostartSpec()), merge_s=30.0)
    made = host.foreign_snapshot("web")["id"]
    host.write_disk("web", offset=0, data=b"b" * 512)
    host.delete_snapshot("web", made)
    host.host_restarts()
    assert (host.is_running("web"), len(host.chain("web"))) == (True, 2)
    assert "consolidationNeeded = true" in host.ask("vim-cmd", "vmsvc/get.summary", 1).stdout
    host.consolidate("web")
    assert len(host.chain("web")) == 1


# Faults


@pytest.mark.slow
def test_a_lost_reply_was_done_and_a_drop_was_not(build_esxi: BuildEsxi, ssh: SSH) -> None:
    host = build_esxi(small())
    host.fault("snapshot.create", "drop")
    host.fault("snapshot.create", "lost_reply", skip=1)
    line = "vim-cmd vmsvc/snapshot.create 1 tokvm-a-{} tokvm 0 0"
    for number, names in ((1, []), (2, ["tokvm-a-2"])):
        assert ssh(host, line.format(number)).returncode == 255
        assert [one["name"] for one in host.snapshots("web")] == names
    assert ssh(host, line.format(3)).returncode == 0
    assert host.faults_left() == []


@pytest.mark.slow
def test_what_was_asked_for_lands_late(build_esxi: BuildEsxi, ssh: SSH) -> None:
    host = build_esxi(small())
    host.fault("power.off", "late", seconds=2.0)
    assert ssh(host, "vim-cmd vmsvc/power.off 1").returncode == 255
    assert host.is_running("web")
    until(lambda: not host.is_running("web"))


def test_planned_refusals(build_esxi: BuildEsxi) -> None:
    host = build_esxi(small())
    host.fault("power.off", "error", type="HostConnectFault", message="no")
    assert host.vim("vmsvc/power.off", 1).stdout.endswith('   msg = "no"\n}\n')
    assert host.is_running("web")
    host.fault("power.off", "error_after", type="Timedout", message="slow")
    assert "(vim.fault.Timedout) {" in host.vim("vmsvc/power.off", 1).stdout
    assert not host.is_running("web")
    host.fault("cat", "error", message="cat: read error: Input/output error")
    done = host.ask("cat", f"{host.directory('web')}/web.vmx")
    assert (done.code, done.stdout, done.stderr) == (1, "", "cat: read error: Input/output error\n")
    host.fault("", "hostd_down")
    done = host.ask("vim-cmd", "vmsvc/getallvms")
    assert (done.code, done.stdout) == (1, "")
    assert "Connection failure" in done.stderr


@pytest.mark.slow
def test_answers_that_are_cut_or_missing_and_one_that_never_comes(build_esxi: BuildEsxi) -> None:
    host = build_esxi(small())
    whole = host.ask("vim-cmd", "hostsvc/hostsummary").stdout
    host.fault("hostsummary", "cut_answer")
    host.fault("hostsummary", "no_answer", skip=1)
    host.fault("hostsummary", "hang", skip=2)
    line = "vim-cmd hostsvc/hostsummary; echo tokvm-0123456789abcdef $?"
    assert whole.startswith(host.run(line).stdout[:100])
    assert host.run(line) == (0, "", "")
    with pytest.raises(subprocess.TimeoutExpired):
        host.run(line, timeout_s=1.0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["freeze", "hang"])
def test_silence_before_or_after_the_deed(build_esxi: BuildEsxi, kind: str) -> None:
    host = build_esxi(small())
    host.fault("power.off", kind)
    with pytest.raises(subprocess.TimeoutExpired):
        host.run("vim-cmd vmsvc/power.off 1", timeout_s=1.0)
    assert host.is_running("web") == (kind == "hang")
