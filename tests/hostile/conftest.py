"""The command under strace, for the named hostile images."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.hostile.traces import CALLS

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Done:
    """A command that ended. trace: of what it did, empty where there is no strace."""

    argv: tuple[str, ...]
    code: int
    cpu_s: float
    memory: int
    stdout: bytes
    stderr: bytes
    trace: Path
    job: str


class Commands:
    """A runner (`tests.hostile.runner`), traced."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        environment = {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "TOKVM_STATE_DIR": str(folder / "state"), "OPENBLAS_NUM_THREADS": "1",
            "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}", "PYTHONDONTWRITEBYTECODE": "1", "HOME": str(folder), "LC_ALL": "C.UTF-8",
        }  # fmt: skip
        trace = ["strace", "-ff", "-qq", "-y", "-s", "65536", "--seccomp-bpf", "-e", f"trace={CALLS}", "-e", "signal=none"]
        self._process = subprocess.Popen(
            [*trace, "-o", str(folder / "trace"), sys.executable, "-m", "tests.hostile.runner"], cwd=folder, env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._read() == "ready\n"

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def __call__(self, *argv: str, cwd: Path) -> Done:
        self._count += 1
        out = self._folder / f"job{self._count}"
        assert self._process.stdin is not None
        job = {"argv": argv, "cwd": str(cwd), "out": str(out)}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        found = json.loads(self._read())
        streams = [Path(f"{out}.{name}") for name in ("stdout", "stderr")]
        raw = [path.read_bytes() for path in streams]
        for path in streams:
            path.unlink()
        trace = self._folder / f"trace.{found.pop('pid')}"
        return Done(argv, **found, stdout=raw[0], stderr=raw[1], trace=trace, job=out.name)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.wait(timeout=30) == 0
        assert self._process.stdout is not None
        self._process.stdout.close()


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    made = Commands(tmp_path_factory.mktemp("hostile"))
    yield made
    made.close()
