"""tokvm image apply: a layer goes onto the disk it was made over, once, and onto nothing else."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

import pytest
from tests.cli.conftest import Run

from tokvm.testing.vhd_writer import write_vhd

MiB = 1 << 20
SIZE = 8 * MiB


@dataclass
class Disk:
    """A base and children as VHDs, and what the disk holds after each."""

    folder: Path
    names: list[Path] = field(default_factory=list)
    contents: list[bytes] = field(default_factory=list)

    def add(self, seed: int, *, size: int = SIZE) -> Path:
        rng = random.Random(seed)
        number = len(self.names)
        before = self.contents[-1] if self.contents else b""
        content = bytearray(before.ljust(size, b"\0"))
        runs = []
        for place in sorted(rng.sample(range(0, size, 65536), 12)):
            data = rng.randbytes(8192)
            runs.append((place, data))
            content[place : place + len(data)] = data
        path = self.folder / f"{number}.vhd"
        with path.open("wb") as out:
            write_vhd(
                out, size=size, kind="differencing" if number else "dynamic", runs=runs, unique_id=UUID(int=number + 1),
                parent_id=UUID(int=number) if number else None,
            )  # fmt: skip
        self.names.append(path)
        self.contents.append(bytes(content))
        return path


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    made = Disk(tmp_path)
    for seed in range(4):
        made.add(seed)
    return made


def apply(tokvm: Run, target: Path, *argv: object) -> subprocess.CompletedProcess[str]:
    return tokvm("image", "apply", *argv, "--to", target)


@pytest.mark.slow
def test_layers_in_order_one_after_the_other(disk: Disk, tokvm: Run, tmp_path: Path) -> None:
    target = tmp_path / "disk.raw"
    assert tokvm("image", "convert", disk.names[0], "--to", target).returncode == 0
    for number in (1, 2, 3):
        done = apply(tokvm, target, disk.names[number])
        assert done.returncode == 0, done.stderr
        assert target.read_bytes() == disk.contents[number]
    assert tokvm("image", "compare", *disk.names, "--to", target).returncode == 0


@pytest.mark.slow
def test_two_layers_at_once(disk: Disk, tokvm: Run, tmp_path: Path) -> None:
    target = tmp_path / "disk.raw"
    assert tokvm("image", "convert", *disk.names[:2], "--to", target).returncode == 0
    assert apply(tokvm, target, *disk.names[2:]).returncode == 0
    assert target.read_bytes() == disk.contents[3]


@pytest.mark.parametrize(
    ("first", "then", "says"),
    [
        ([0], [2], ["00000000-0000-0000-0000-000000000002", "00000000-0000-0000-0000-000000000001"]),  # skipped
        ([0, 1], [1], ["00000000-0000-0000-0000-000000000001", "00000000-0000-0000-0000-000000000002"]),  # repeated
        ([0, 1, 2], [1], ["00000000-0000-0000-0000-000000000003"]),  # an older one
        ([0], [0], ["is a base"]),
    ],
)
@pytest.mark.slow
def test_a_layer_that_does_not_belong_there_is_refused(
    disk: Disk, tokvm: Run, tmp_path: Path, first: list[int], then: list[int], says: list[str]
) -> None:
    target = tmp_path / "disk.raw"
    assert tokvm("image", "convert", *[disk.names[n] for n in first], "--to", target).returncode == 0
    before = target.read_bytes()
    done = apply(tokvm, target, *[disk.names[n] for n in then])
    assert done.returncode in (2, 3)
    for text in says:
        assert text in done.stderr
    assert target.read_bytes() == before == disk.contents[first[-1]]


@pytest.mark.slow
def test_the_layer_applied_last_is_refused_as_a_repeat(disk: Disk, tokvm: Run, tmp_path: Path) -> None:
    target = tmp_path / "disk.raw"
    assert tokvm("image", "convert", disk.names[0], "--to", target).returncode == 0
    assert apply(tokvm, target, disk.names[1]).returncode == 0
    done = apply(tokvm, target, disk.names[1])
    assert done.returncode == 3
    assert "applied already" in done.stderr


@pytest.mark.slow
def test_forced_linkage_names_both_ids_and_goes_on(disk: Disk, tokvm: Run, tmp_path: Path) -> None:
    target = tmp_path / "disk.raw"
    assert tokvm("image", "convert", disk.names[0], "--to", target).returncode == 0
    done = apply(tokvm, target, disk.names[2], "--force-linkage")
    assert done.returncode == 0, done.stderr
    assert "00000000-0000-0000-0000-000000000002" in done.stderr
    assert "00000000-0000-0000-0000-000000000001" in done.stderr


@pytest.mark.slow
def test_a_target_that_nobody_noted_is_refused(disk: Disk, tokvm: Run, tmp_path: Path) -> None:
    target = tmp_path / "disk.raw"
    target.write_bytes(disk.contents[0])
    done = apply(tokvm, target, disk.names[1])
    assert done.returncode == 3
    assert "nothing is noted" in done.stderr
    assert target.read_bytes() == disk.contents[0]
    forced = apply(tokvm, target, disk.names[1], "--force-linkage", "--overwrite", SIZE)
    assert forced.returncode == 0, forced.stderr
    assert target.read_bytes() == disk.contents[1]
    assert apply(tokvm, target, disk.names[2]).returncode == 0  # from now on it is known


@pytest.mark.slow
def test_another_file_under_the_same_name_is_not_taken_for_the_target(disk: Disk, tokvm: Run, tmp_path: Path) -> None:
    target = tmp_path / "disk.raw"
    assert tokvm("image", "convert", disk.names[0], "--to", target).returncode == 0
    target.unlink()
    target.write_bytes(disk.contents[3])
    done = apply(tokvm, target, disk.names[1])
    assert done.returncode == 9
    assert target.read_bytes() == disk.contents[3]


@pytest.mark.slow
def test_a_layer_of_a_disk_that_grew_grows_the_target_with_zeros(disk: Disk, tokvm: Run, tmp_path: Path) -> None:
    target = tmp_path / "disk.raw"
    grown = disk.add(9, size=SIZE + 3 * MiB)
    assert tokvm("image", "convert", *disk.names[:4], "--to", target).returncode == 0
    assert apply(tokvm, target, grown).returncode == 0
    assert target.read_bytes() == disk.contents[-1]


@pytest.mark.slow
def test_a_damaged_note_is_refused(disk: Disk, tokvm: Run, tmp_path: Path) -> None:
    target = tmp_path / "disk.raw"
    assert tokvm("image", "convert", disk.names[0], "--to", target).returncode == 0
    note = Path(f"{target}.tokvm.json")
    note.write_text(note.read_text()[:-30])
    done = apply(tokvm, target, disk.names[1])
    assert done.returncode == 11
    assert "convert the whole chain anew" in done.stderr


@pytest.mark.slow
def test_killed_in_the_middle_the_same_command_goes_on_and_another_is_refused(disk: Disk, tokvm: Run, tmp_path: Path) -> None:
    """SIGKILL as soon as the note says that the layer is being applied."""
    target = tmp_path / "disk.raw"
    assert tokvm("image", "convert", disk.names[0], "--to", target).returncode == 0
    killed = _kill_when_pending(
        ["image", "apply", str(disk.names[1]), "--to", str(target)], Path(f"{target}.tokvm.json"), tmp_path
    )
    assert killed
    other = apply(tokvm, target, disk.names[2])
    assert other.returncode == 2
    assert "in the middle of another apply" in other.stderr
    again = apply(tokvm, target, disk.names[1])
    assert again.returncode == 0, again.stderr
    assert target.read_bytes() == disk.contents[1]
    assert apply(tokvm, target, disk.names[2]).returncode == 0


@pytest.mark.slow
def test_a_killed_conversion_goes_on(disk: Disk, tokvm: Run, tmp_path: Path) -> None:
    target = tmp_path / "disk.raw"
    assert _kill_when_pending(
        ["image", "convert", *map(str, disk.names[:2]), "--to", str(target)], Path(f"{target}.tokvm.json"), tmp_path
    )
    other = tokvm("image", "convert", disk.names[0], "--to", target)
    assert other.returncode == 9
    assert "part of another conversion" in other.stderr
    again = tokvm("image", "convert", *disk.names[:2], "--to", target)
    assert again.returncode == 0, again.stderr
    assert target.read_bytes() == disk.contents[1]


def _kill_when_pending(argv: list[str], note: Path, state: Path) -> bool:
    """Start the command with slow writes, and kill it when its note says that it has begun."""
    environment = dict(os.environ) | {"TOKVM_STATE_DIR": str(state / "state")}
    script = (
        "import sys, time; from tokvm.targets.medium import Medium; whole = Medium.write\n"
        "def write(self, *a):\n    whole(self, *a); time.sleep(0.3)\n"
        "Medium.write = write\nfrom tokvm.cli.main import main\nsys.argv[0] = 'tokvm'\nmain()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, *argv], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and process.poll() is None:
        if note.exists() and json.loads(note.read_text())["pending"] is not None:
            time.sleep(0.5)  # some of it is written
            process.send_signal(signal.SIGKILL)
            return process.wait() == -signal.SIGKILL
        time.sleep(0.01)
    process.kill()
    process.wait()
    return False


@pytest.mark.slow
def test_a_qcow2_target_is_converted_applied_and_compared(disk: Disk, tokvm: Run, tmp_path: Path) -> None:
    target = tmp_path / "disk.qcow2"
    assert tokvm("image", "convert", disk.names[0], "--to", target).returncode == 0
    assert apply(tokvm, target, disk.names[2]).returncode == 3  # skipped a layer
    for number in (1, 2):
        done = apply(tokvm, target, disk.names[number])
        assert done.returncode == 0, done.stderr
    subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", target], check=True)
    raw = tmp_path / "read-by-qemu.raw"
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", target, raw], check=True)
    assert raw.read_bytes() == disk.contents[2]
    assert tokvm("image", "compare", *disk.names[:3], "--to", target).returncode == 0
    assert tokvm("image", "compare", *disk.names[:2], "--to", target).returncode == 14
    assert tokvm("image", "convert", disk.names[0], "--to", target).returncode == 9
