"""What the tests of the command line share."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def tokvm(tmp_path: Path) -> Run:
    """The real command, with a state directory of its own."""

    def run(*argv: object, **more: object) -> subprocess.CompletedProcess[str]:
        import os

        environment = dict(os.environ) | {"TOKVM_STATE_DIR": str(tmp_path / "state")}
        command = [sys.executable, "-m", "tokvm", *map(str, argv)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, **more)  # type: ignore[call-overload, no-any-return]

    return run
