"""Runs the real command many times at the price of one start: everything is imported, then each job is a fork.

    stdin    {"argv": […], "cwd": "…", "out": "…"}        one a line; out: prefix of the files for its output
    stdout   {"pid": …, "code": …, "cpu_s": …, "memory": …}

A job has a process of its own: its limits, its time and its memory, and under `strace -ff` a trace of its own. Run as
`strace … python -m tests.hostile.runner`.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import pkgutil
import resource
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NoReturn

CPU_S = 20
MEMORY = 2 << 30  # of address space: an allocation of a count that nobody checked fails


def main() -> None:
    _import_all()
    _warm_up()
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _run(job)
        _, status, used = os.wait4(pid, 0)
        done = {
            "pid": pid,
            "code": os.waitstatus_to_exitcode(status),
            "cpu_s": used.ru_utime + used.ru_stime,
            "memory": used.ru_maxrss * 1024,
        }
        print(json.dumps(done), flush=True)


def _import_all() -> None:
    """So that what a job opens is what its arguments made it open."""
    import tokvm
    import tokvm.cli.main

    for module in pkgutil.walk_packages(tokvm.__path__, "tokvm."):
        if module.name.split(".")[1] in ("core", "images", "remote", "targets", "transfer", "app", "cli"):
            importlib.import_module(module.name)


def _warm_up() -> None:
    """The commands once, here: they import some more, and so do the libraries that they use. Typer's work is done once, too."""
    import typer.main

    import tokvm.cli.main as command

    command.cli = typer.main.get_command(command.cli)  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as folder:
        image, target = f"{folder}/disk.raw", f"{folder}/target.raw"
        Path(image).write_bytes(b"x" * 8192)
        for verb, *more in (
            ("info",),
            ("info", "--json"),
            ("map", "--json"),
            ("convert", "--to", target),
            ("compare", "--to", target),
        ):
            _command(["image", verb, *more, "--format", "raw", "--", image], quiet=True)
        _command(["image", "info", "--json", "--", image], quiet=True)


def _run(job: dict[str, object]) -> NoReturn:
    code = 99
    try:
        os.chdir(str(job["cwd"]))
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for fd, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(f"{job['out']}.{name}", flags, 0o600), fd)
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        code = _command(list(job["argv"]))  # type: ignore[call-overload]
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _command(argv: list[str], *, quiet: bool = False) -> int:
    from tokvm.cli.main import main

    sys.argv = ["tokvm", *argv]
    if quiet:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            return _command(argv)
    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


if __name__ == "__main__":
    main()
