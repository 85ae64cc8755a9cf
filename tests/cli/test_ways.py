"""A way that nobody rehearsed, asked for with the real command: refused, and nothing else is barred by it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tokvm.core.errors import Blocked, DomainError
from tokvm.testing.xenserver.host import DiskSpec, MachineSpec, NicSpec, XenHost, build_host

MiB = 1 << 20
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def xen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[XenHost]:
    machine = MachineSpec("web", disks=[DiskSpec(MiB)], nics=[NicSpec("02:16:3e:00:00:01")])
    with build_host(tmp_path_factory.mktemp("host"), machines=[machine]) as host:
        yield host
        assert host.violations() == []


@pytest.mark.slow
def test_a_way_that_was_not_rehearsed_is_refused_and_bars_nothing_else(tokvm: Run, xen: XenHost, tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    to = ["--ssh-config", str(xen.sshd.config_file), "--to", str(tmp_path / "target"), "--network", "*=user"]
    sync = ["sync", xen.url, "web", "--passes", "1", *to]
    assert tokvm(*sync).returncode == 0
    for argv in (["cutover", "web", "--way", "micro", "--dry-run"], ["cutover", "web", "--way", "micro"]):
        refused = tokvm(*argv, "--json")
        assert refused.returncode == Blocked.exit_code, refused.stderr
        assert "tokvm rehearse" in json.loads(refused.stdout)["error"]["fix"]
    assert xen.is_running("web"), "it is said before anything is stopped"
    other = tokvm("cutover", "web", "--way", "none", "--dry-run", "--json")
    assert other.returncode in (0, DomainError.exit_code), other.stderr  # there may be no libvirtd here
    for argv in (sync, ["rollback", "web", "--dry-run"], ["finish", "web"]):
        done = tokvm(*argv)
        assert done.returncode == 0, (argv, done.stderr)
