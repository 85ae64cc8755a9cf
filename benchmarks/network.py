"""(b) Bytes over SSH: our SFTP reader and the export stream, against `ssh HOST cat`, over a real sshd on loopback."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from benchmarks.measure import Result, Variant, alternate, worker
from tokvm.testing.sshd import Sshd

CAT = "ssh HOST cat, thrown away"
CAT_TO_FILE = "ssh HOST cat > file + fsync"
SFTP = "tokvm SFTP reader, thrown away"
STREAM = "tokvm VHD stream, thrown away"
STREAM_PASS = "tokvm stream pass to a file"


def over_ssh(vhd: Path, folder: Path, *, repeats: int, tell: Callable[[str], None]) -> list[Result]:
    """`vhd` is one dynamic VHD. The file is read once before, so that the disk has no part in it."""
    target, manifest = folder / "stream.raw", folder / "stream.manifest"
    with Sshd(folder / "sshd") as sshd:
        remote = (sshd.netloc, str(sshd.config_file), str(vhd))
        cat = ("ssh", "-F", str(sshd.config_file), "-p", str(sshd.port), f"{sshd.user}@{sshd.host}", "cat", str(vhd))

        def fresh() -> None:
            target.unlink(missing_ok=True)

        variants = [
            Variant(CAT, (cat,), lambda: _warm(vhd)),
            Variant(SFTP, (worker("sftp", *remote),)),
            Variant(STREAM, (worker("stream", *remote),)),
            Variant(CAT_TO_FILE, (cat, ("sync", str(target))), fresh, stdout=str(target)),
            Variant(STREAM_PASS, (worker("stream-pass", *remote, str(target), str(manifest)),), fresh),
            Variant("tokvm stream pass, no manifest", (worker("stream-pass", *remote, str(target), "-"),), fresh),
        ]
        try:
            return alternate(variants, repeats=repeats, payload=vhd.stat().st_size, tell=tell)
        finally:
            fresh()
            manifest.unlink(missing_ok=True)


def _warm(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        while os.sendfile(_NULL, fd, None, 1 << 24):
            pass
    finally:
        os.close(fd)


_NULL = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
