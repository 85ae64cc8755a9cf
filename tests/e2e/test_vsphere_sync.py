"""vSphere from end to end: the real command for ls, check and sync; the real runner for a cutover, libvirt a stand-in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.sources.vsphere_rig import MiB, Rig, rigs

from tokvm.core.disk import DiskWriter
from tokvm.domain.base import DomainPlan, DomainState, TargetDisk
from tokvm.migration.doors import Doors
from tokvm.migration.journal import Journal
from tokvm.migration.reports import StopCause
from tokvm.migration.runner import Migration
from tokvm.sources.vmware.api.source import VsphereSource
from tokvm.targets.open import TargetSpec, open_target
from tokvm.testing.esxi.host import DatastoreSpec, DiskSpec, HostOptions

pytestmark = pytest.mark.slow
Make = Callable[..., Rig]
SIZE = 8 * MiB
NFS = HostOptions(datastores=[DatastoreSpec("nfs", type="NFS")])


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    yield from rigs(tmp_path, monkeypatch)


# ---- the command


def tokvm(rig: Rig, folder: Path, verb: str, *argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    login = () if environment else ("--password-file", str(rig.vsphere.password_file))
    options = ("--ssh-config", str(rig.host.sshd.config_file), "--tls-ca", str(rig.vsphere.ca_file), *login)
    env = {**os.environ, "TOKVM_STATE_DIR": str(folder / "state"), **environment}
    command = [sys.executable, "-m", "tokvm", verb, *options, *argv]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)


def sync(rig: Rig, folder: Path, *more: str) -> Any:
    (folder / "target").mkdir(exist_ok=True)
    argv = ("--json", "--network", "*=user", "--to", str(folder / "target"), *more, "--", rig.vsphere.url, "web")
    done = tokvm(rig, folder, "sync", *argv)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def on_target(folder: Path) -> bytes:
    (path,) = (folder / "target").glob("*.raw")
    return path.read_bytes()


def test_a_vm_of_a_vcenter_is_listed_and_checked(make: Make, tmp_path: Path) -> None:
    rig = make()
    listed = tokvm(rig, tmp_path, "ls", "--", rig.vsphere.url)
    assert listed.returncode == 0, listed.stderr
    assert rig.uuid in listed.stdout
    by_environment = tokvm(rig, tmp_path, "check", "--vm", "web", "--", rig.vsphere.url, TOKVM_PASSWORD=rig.vsphere.password)
    assert by_environment.returncode == 0, by_environment.stderr
    assert "nothing is in the way" in by_environment.stdout
    nobody = tokvm(rig, tmp_path, "ls", "--", rig.vsphere.url, TOKVM_PASSWORD="")
    assert nobody.returncode == 2
    assert "--password-file" in nobody.stderr


def test_over_vmfs_the_base_is_copied_and_the_rest_waits(make: Make, tmp_path: Path) -> None:
    rig = make()
    rig.write(MiB, os.urandom(3 * MiB))
    first = sync(rig, tmp_path)
    assert (len(first["passes"]), first["stopped_by"]) == (1, "delta-waits-for-the-stop")
    assert on_target(tmp_path) == rig.content()
    rig.write(5 * MiB, os.urandom(MiB))
    assert sync(rig, tmp_path)["stopped_by"] == "delta-waits-for-the-stop"
    assert len(rig.snapshot_names()) == 1
    third = sync(rig, tmp_path, "--passes", "2", "--bytes", f"ssh://{rig.host.sshd.netloc}")
    assert len(third["passes"]) == 1
    assert on_target(tmp_path) == rig.content()


@pytest.mark.parametrize("vcenter", [True, False], ids=["vcenter", "esxi"])
def test_over_nfs_every_pass_comes_over_https(make: Make, tmp_path: Path, *, vcenter: bool) -> None:
    rig = make(vcenter=vcenter, options=NFS)
    rig.write(MiB, os.urandom(3 * MiB))
    for number in range(1, 4):
        sync(rig, tmp_path, "--passes", str(number))
        assert on_target(tmp_path) == rig.content()
        rig.write(number * MiB, os.urandom(64 * 512))


def test_no_secret_is_kept(make: Make, tmp_path: Path) -> None:
    rig = make(options=NFS)
    sync(rig, tmp_path, "--passes", "1")
    secret = rig.vsphere.password.encode()
    kept = [path for path in (tmp_path / "state").rglob("*") if path.is_file()]
    assert kept
    assert not any(secret in path.read_bytes() for path in kept)


# ---- the runner


class StandIn:
    """A libvirt with one domain, which shows life as soon as it runs."""

    url = "stand-in:///"

    def __init__(self) -> None:
        self.domain = DomainState.ABSENT

    def domain_xml(self, _plan: DomainPlan) -> str:
        return "<domain/>"

    def define(self, _plan: DomainPlan) -> None:
        self.domain = DomainState.OFF

    def state(self, _uuid: str) -> DomainState:
        return self.domain

    def start(self, _uuid: str) -> None:
        self.domain = DomainState.RUNNING

    def stop(self, _uuid: str) -> None:
        self.domain = DomainState.OFF

    def undefine(self, _uuid: str) -> None:
        self.domain = DomainState.ABSENT

    def cut_network(self, _uuid: str) -> None: ...

    def alive(self, _uuid: str) -> bool:
        return True

    def close(self) -> None: ...


class Run:
    """One migration of the rig's VM to raw files; each call of `migration` is as a new process."""

    def __init__(self, rig: Rig, folder: Path) -> None:
        self.rig = rig
        self.libvirt = StandIn()
        self._folder = folder
        self._journal = Journal.open(folder)
        vm = rig.vm
        self._sizes = [disk.size for disk in vm.disks]
        self.paths = [folder / f"disk{disk.index}.raw" for disk in vm.disks]
        targets = [str(path) for path in self.paths]
        self._record = self._journal.create(vm=vm, source=rig.source.url, plan={}, targets=targets)

    def migration(self, source: VsphereSource) -> Migration:
        doors = Doors(
            source=source,
            open_target=self._open,
            host=self.libvirt,
            plan=self._plan,
            manifest_path=lambda number, disk: self._folder / f"manifest-{number}-{disk}",
        )
        return Migration(self._journal, self._record, doors)

    def _open(self, index: int) -> DiskWriter:
        known = self._journal.book(self._record.id).disks()[index].identity
        return open_target(TargetSpec(str(self.paths[index])), size=self._sizes[index], expect=known or None)

    def _plan(self) -> DomainPlan:
        disks = tuple(TargetDisk(str(path), block=False) for path in self.paths)
        return DomainPlan(self.rig.vm, "web", disks, {"*": "user"})

    def close(self) -> None:
        self._journal.close()


@pytest.mark.parametrize("vcenter", [True, False], ids=["vcenter", "esxi"])
def test_a_cutover_without_ssh_brings_what_changed_since_the_base(make: Make, tmp_path: Path, *, vcenter: bool) -> None:
    rig = make(vcenter=vcenter, disks=[DiskSpec(SIZE), DiskSpec(3 * MiB + 512)])
    rig.write(MiB, os.urandom(2 * MiB))
    run = Run(rig, tmp_path)
    report = run.migration(rig.connect()).sync(passes=None)
    assert report.stopped_by is StopCause.WAITS
    rig.write(4 * MiB, os.urandom(MiB))
    rig.write(3 * MiB, os.urandom(512), disk=1)
    done = run.migration(rig.connect()).cutover(deadline_s=20, proof_s=5)
    assert (done.outcome, run.libvirt.domain) == ("committed", DomainState.RUNNING)
    assert [path.read_bytes() for path in run.paths] == [rig.content(0), rig.content(1)]
    assert not rig.host.is_running("web")
    assert rig.source.is_fenced(rig.uuid)
    calls = [one for one in rig.vsphere.calls() if one in ("ExportSnapshot", "HttpNfcLeaseComplete", "RemoveSnapshot_Task")]
    assert calls == 2 * ["ExportSnapshot", "HttpNfcLeaseComplete"], "one export at a time; no merge before all is over"
    run.migration(rig.connect()).finish()
    assert rig.snapshot_names() == []
    assert rig.source.is_fenced(rig.uuid)
    run.close()


def test_a_rollback_gives_the_source_back_as_it_was(make: Make, tmp_path: Path) -> None:
    rig = make()
    run = Run(rig, tmp_path)
    run.migration(rig.connect()).sync(passes=None)
    rig.vsphere.fault("folder", "status", status=500, text="disk on fire", skip=12, times=1000)
    with pytest.raises(Exception, match="fire"):
        run.migration(rig.connect()).cutover(deadline_s=20, proof_s=5)
    rig.vsphere.clear_faults()
    if not rig.host.is_running("web"):
        run.migration(rig.connect()).rollback()
    assert rig.host.is_running("web")
    assert not rig.source.is_fenced(rig.uuid)
    assert rig.vsphere.override("web")["restart_priority"] == ""
    run.migration(rig.connect()).cutover(deadline_s=20, proof_s=5)
    assert run.paths[0].read_bytes() == rig.content()
    run.close()
