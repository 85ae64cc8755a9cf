"""The workers: one measured process each, as an operator's run would be one. Prints one JSON line about itself.

python -m benchmarks.work pass TARGET MANIFEST LAYER…     chain → target, as `tokvm sync` copies; MANIFEST `-` is none
python -m benchmarks.work convert TARGET LAYER…           as `tokvm image convert`, the same code
python -m benchmarks.work walk LAYER                      open it and walk over all of its map
python -m benchmarks.work dissect TARGET FILE END         dissect.hypervisor, guest bytes 0 to END, 1 MiB at a time
python -m benchmarks.work kernel TARGET FILE              copy_file_range, or sendfile to a device, and fsync
python -m benchmarks.work direct TARGET FILE              O_DIRECT both ways, one thread: what the medium gives
python -m benchmarks.work sftp NETLOC CONFIG FILE         our SFTP reader, bytes thrown away
python -m benchmarks.work stream NETLOC CONFIG FILE       `cat FILE` through RemoteStream and VhdStream, thrown away
python -m benchmarks.work stream-pass NETLOC CONFIG FILE TARGET MANIFEST   the same onto a target
"""

from __future__ import annotations

import json
import os
import shlex
import stat
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # each worker imports only what it measures
    from tokvm.core.disk import DiskReader
    from tokvm.images.vhd.stream import VhdStream
    from tokvm.remote.ssh import RemoteStream, SshHost

MiB = 1024 * 1024
PIECE = 4 * MiB


def main(argv: list[str]) -> None:
    name, *args = argv
    moved = WORKERS[name](*args)
    print(json.dumps({"moved": moved, "peak_rss": peak_rss()}))


def peak_rss() -> int:
    """This process's own high-water mark, bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def copy_chain(target: str, manifest: str, *layers: str) -> int:
    from tokvm.images.chain import Chain
    from tokvm.images.files import open_file
    from tokvm.images.open import open_image
    from tokvm.images.reader import ChainReader

    reader = ChainReader(Chain.open([open_image(open_file(layer, direct=True)) for layer in layers]))
    try:
        return _run_pass(reader, target, manifest)
    finally:
        reader.close()


def convert(target: str, *layers: str) -> int:
    from tokvm.app.convert import Target
    from tokvm.app.convert import convert as convert_chain
    from tokvm.app.image_files import open_chain

    with open_chain(layers) as chain:
        return convert_chain(chain, Target(target), _Quiet()).data_bytes


class _Quiet:
    """Implements `app.convert.PassProgress`."""

    def begin(self, what: str, total: int, done: int) -> None: ...

    def advance(self, count: int) -> None: ...


def walk(path: str) -> int:
    """The rows of the map."""
    from tokvm.app.image_files import open_layers

    with open_layers([path]) as (layer,):
        return sum(len(window) for window in layer.windows())


def copy_by_dissect(target: str, path: str, end: str) -> int:
    """What anybody would write with it: zeros are not written, so they cost it next to nothing."""
    from dissect.hypervisor.disk.vhd import VHD
    from dissect.hypervisor.disk.vhdx import VHDX
    from dissect.hypervisor.disk.vmdk import VMDK

    kind = {".vhd": VHD, ".vhdx": VHDX, ".avhdx": VHDX, ".vmdk": VMDK}[Path(path).suffix]
    with ExitStack() as held:
        reader = kind(held.enter_context(open(path, "rb")) if kind is VHD else Path(path))
        writer = held.enter_context(open(target, "wb", buffering=0))
        moved, zeros = 0, bytes(MiB)
        for offset in range(0, int(end), MiB):
            data = reader.read(MiB)
            if data != zeros:
                moved += os.pwrite(writer.fileno(), data, offset)
        writer.truncate(int(end))
        os.fsync(writer.fileno())
    return moved


def _run_pass(reader: DiskReader, target: str, manifest: str) -> int:
    """A base pass onto a target that may hold anything. `manifest` is a path, or `-` for none."""
    from tokvm.targets.open import TargetSpec, open_target
    from tokvm.transfer.manifest import ManifestWriter
    from tokvm.transfer.passes import TargetState, run_pass

    there = Path(target).exists()
    spec = TargetSpec(target, force=there, confirm=str(reader.size) if there else None)
    with ExitStack() as held:
        writer = open_target(spec, size=reader.size)
        held.callback(writer.close)
        hashes = None
        if manifest != "-":
            Path(manifest).unlink(missing_ok=True)
            hashes = ManifestWriter.open(manifest, number=0, disk=0, size=reader.size)
            held.callback(hashes.close)
        result = run_pass(
            reader,
            writer,
            state=TargetState.UNKNOWN,
            resume=None,
            record=lambda _checkpoint: None,
            progress=lambda _count: None,
            manifest=hashes,
        )
    return result.data_bytes


def copy_by_kernel(target: str, source: str) -> int:
    """No byte enters this process."""
    reader = os.open(source, os.O_RDONLY)
    writer = os.open(target, os.O_WRONLY | os.O_CREAT, 0o600)
    left = os.fstat(reader).st_size
    device = stat.S_ISBLK(os.fstat(writer).st_mode)
    moved = 0
    while left:
        count = os.sendfile(writer, reader, None, PIECE) if device else os.copy_file_range(reader, writer, PIECE)
        left -= count
        moved += count
    os.fsync(writer)
    return moved


def copy_direct(target: str, source: str) -> int:
    from tokvm.core.disk import BufferPool

    reader = os.open(source, os.O_RDONLY | os.O_DIRECT)
    writer = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o600)
    buffer, _ = BufferPool(1, PIECE).acquire()
    size, moved = os.fstat(reader).st_size, 0
    while moved < size:
        count = os.preadv(reader, [buffer], moved)
        whole = -(-count // 4096) * 4096
        moved += os.pwritev(writer, [buffer[:whole]], moved)
    os.fsync(writer)
    return moved


def read_by_sftp(netloc: str, config: str, path: str) -> int:
    host = _host(netloc, config)
    client = host.sftp()
    file = client.open(path)
    moved = 0

    def sink(_offset: int, data: memoryview) -> None:
        nonlocal moved
        moved += len(data)

    file.read_ranges([(0, file.size)], sink)
    file.close()
    client.close()
    host.close()
    return moved


def read_stream(netloc: str, config: str, path: str) -> int:
    reader, close = _vhd_stream(netloc, config, path)
    moved = 0
    for chunk in reader.chunks():
        moved += chunk.length
        chunk.release()
    reader.close()
    close()
    return moved


def copy_stream(netloc: str, config: str, path: str, target: str, manifest: str) -> int:
    reader, close = _vhd_stream(netloc, config, path)
    try:
        return _run_pass(reader, target, manifest)
    finally:
        reader.close()
        close()


def _host(netloc: str, config: str) -> SshHost:
    from tokvm.remote.ssh import SshConfig, SshHost

    return SshHost(replace(SshConfig.parse(netloc), config_file=config))


def _vhd_stream(netloc: str, config: str, path: str) -> tuple[VhdStream, Callable[[], None]]:
    """A VHD's bytes as `xe vdi-export` sends them; a restart begins at its byte, as `tail -c` sees it."""
    from tokvm.images.vhd.stream import VhdStream

    host = _host(netloc, config)
    quoted = shlex.quote(path)

    def open_at(position: int) -> RemoteStream:
        return host.stream(f"tail -c +{position + 1} {quoted}" if position else f"cat {quoted}")

    return VhdStream(open_at, name=path), host.close


WORKERS: dict[str, Callable[..., int]] = {
    "pass": copy_chain,
    "convert": convert,
    "walk": walk,
    "dissect": copy_by_dissect,
    "kernel": copy_by_kernel,
    "direct": copy_direct,
    "sftp": read_by_sftp,
    "stream": read_stream,
    "stream-pass": copy_stream,
}

if __name__ == "__main__":
    main(sys.argv[1:])
