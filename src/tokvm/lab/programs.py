"""Programs of the distribution that the lab uses, found also where an ordinary user's PATH does not look."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence

from tokvm.lab.errors import LabError
from tokvm.remote import process

SBIN = "/usr/local/sbin:/usr/sbin:/sbin"


def find_program(name: str, *, package: str) -> str:
    """The path of `name`, or LabError naming the package that has it."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:{SBIN}")
    if found is None:
        raise LabError(f"{name} is not installed", fix=f"apt-get install {package}")
    return found


def run_program(
    argv: Sequence[str],
    *,
    package: str,
    timeout_s: float = 120,
    input_bytes: bytes | None = None,
    env: Mapping[str, str] | None = None,
) -> bytes:
    """Run it to its end and hand back its stdout; LabError with the end of its stderr when it fails."""
    program = find_program(argv[0], package=package)
    done = process.run([program, *argv[1:]], input=input_bytes, timeout_s=timeout_s, where=argv[0], env=env)
    if done.code != 0:
        complaint = done.stderr.decode(errors="replace").strip()[-800:] or f"exit status {done.code}"
        raise LabError(f"{argv[0]} failed: {complaint}", where=" ".join(argv))
    return done.stdout
