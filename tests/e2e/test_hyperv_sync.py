"""The real command against a Hyper-V host: ls, sync of a base and deltas while the VM runs, by checkpoints and AVHDX layers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tokvm.sources.hyperv.powershell import COMMAND
from tokvm.testing.hyperv.host import DiskSpec, HostOptions, HyperVHost, MachineSpec, build_host
from tokvm.testing.transcripts import read_transcript

pytestmark = pytest.mark.slow

MiB = 1 << 20
SIZE = 16 * MiB
NAME = "wéb [1] 'x’ $(y)"


GERMAN = HostOptions(default_shell="cmd", banner=True, code_page="cp850", wrap=120)
RUSSIAN = HostOptions(default_shell="powershell", banner=True, code_page="cp866", wrap=0, limits=True, orphans=True)


@pytest.fixture
def build(tmp_path: Path) -> Iterator[Callable[..., HyperVHost]]:
    """A host with one running VM that has written 5 MiB; nothing outside of the contract may be asked of it."""
    made: list[HyperVHost] = []

    def build(options: HostOptions, **spec: Any) -> HyperVHost:
        disk = spec.pop("disk", DiskSpec(SIZE))
        made.append(build_host(tmp_path / "host", machines=[MachineSpec(NAME, disks=[disk], **spec)], options=options))
        made[-1].write_disk(NAME, 0, offset=MiB, data=os.urandom(5 * MiB))
        return made[-1]

    yield build
    for host in made:
        host.close()
        assert host.violations() == []


def tokvm(host: HyperVHost, folder: Path, verb: str, *argv: str) -> subprocess.CompletedProcess[str]:
    ssh = ("--ssh-config", str(host.sshd.config_file))
    environment = {**os.environ, "TOKVM_STATE_DIR": str(folder / "state")}
    command = [sys.executable, "-m", "tokvm", verb, *ssh, *argv]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)


def sync(host: HyperVHost, folder: Path, *more: str) -> None:
    """One pass; afterwards the target is what the guest has written so far."""
    target = folder / "target"
    target.mkdir(exist_ok=True)
    argv = ("--passes", "1", "--network", "*=user", "--to", str(target), *more, "--", host.url, NAME)
    done = tokvm(host, folder, "sync", *argv)
    assert done.returncode == 0, done.stderr
    (path,) = target.glob("*.raw")
    assert path.read_bytes() == host.read_disk(NAME)
    assert host.is_running(NAME)


def work(host: HyperVHost, number: int) -> None:
    """What the guest does between two passes."""
    host.write_disk(NAME, 0, offset=(3 * number + 2) * MiB + 512, data=os.urandom(137 * 512))
    host.trim_disk(NAME, 0, offset=4 * MiB, length=2 * MiB)


@pytest.mark.parametrize("options", [GERMAN, RUSSIAN], ids=["cmd", "powershell"])
def test_a_running_vm_is_synced_pass_by_pass(build: Callable[..., HyperVHost], tmp_path: Path, options: HostOptions) -> None:
    host = build(options)
    listed = tokvm(host, tmp_path, "ls", "--", host.url)
    assert listed.returncode == 0, listed.stderr
    assert host.id(NAME) in listed.stdout
    for number in range(3):
        sync(host, tmp_path)
        work(host, number)
    assert host.powershells() == 4


@pytest.mark.parametrize("kind", ["dynamic", "fixed"])
def test_the_vhds_of_a_vm_of_generation_1_are_read_too(build: Callable[..., HyperVHost], tmp_path: Path, kind: str) -> None:
    host = build(HostOptions(), disk=DiskSpec(SIZE, kind=kind, format="vhd"), generation=1)
    host.foreign_checkpoint(NAME)
    work(host, 0)
    for number in range(1, 4):
        sync(host, tmp_path)
        work(host, number)
    assert {path.rpartition(".")[2] for path, _ in host.opened()} == {"vhd", "avhd"}


def test_a_recorded_sync_tells_each_question_with_its_answer(build: Callable[..., HyperVHost], tmp_path: Path) -> None:
    host = build(GERMAN)
    sync(host, tmp_path, "--record", str(tmp_path / "transcripts"))
    (path,) = (tmp_path / "transcripts").glob("*-sync.jsonl")
    asked = [json.loads(line) for line in path.read_text().splitlines() if '"kind":"request"' in line]
    assert len(asked) == len(host.commands())
    assert {one["command"] for one in asked} == {COMMAND}
    assert all(len(one["stdin_decoded"]) >= 1 and one["stdin_decoded"][0].startswith("#") for one in asked)
    answers = [one for one in read_transcript(path).exchanges if one.kind == "request"]
    assert all(one.code is None and one.error is None and "@@E" in one.stdout for one in answers)
    assert any(NAME in text for one in answers if one.end for text in one.end["stdout_decoded"])
