"""`python -m benchmarks [--size 4G] [--quick] [--only a b c] [--json FILE]`, from the project's folder."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks import copies, formats, maps, memory, network
from benchmarks.inputs import large_runs, small_runs
from benchmarks.measure import BenchmarkError, apart
from benchmarks.report import CopyLine, Section, as_dict, compact, markdown
from tokvm.core.units import GiB, format_bytes, parse_size

PARTS = ("file", "device", "ssh", "memory", "formats", "maps")


def main() -> int:
    options = _options()
    with tempfile.TemporaryDirectory(prefix="tokvm-benchmarks-", dir=options.folder) as scratch:
        folder = Path(options.keep or scratch)
        folder.mkdir(exist_ok=True)
        try:
            sections = list(_measure(options, folder))
        except BenchmarkError as exc:
            _tell(f"error: {exc}")
            return 1
    print(compact(sections, _head(options)))
    if options.details:
        print(markdown(sections, "Every variant; speed and CPU are divided by the first one's."))
    if options.json:
        options.json.write_text(json.dumps(as_dict(sections), indent=1))
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--size", type=parse_size, default=4 * GiB, help="virtual size of the disks (half of it is data)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="1 GiB and two repeats: shows that it works, not how fast it is")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--format", nargs="+", choices=formats.NAMES, default=formats.NAMES, help="of the formats part")
    parser.add_argument("--details", action="store_true", help="print every variant's figures too")
    parser.add_argument("--folder", type=Path, help="where to work (default: the temporary directory); needs 4 times --size")
    parser.add_argument("--keep", type=Path, help="work here and keep the images, for the next run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample here too")
    options = parser.parse_args()
    if options.quick:
        options.size, options.repeats = min(options.size, GiB), min(options.repeats, 2)
    return options


def _measure(options: argparse.Namespace, folder: Path) -> Iterator[Section]:
    """The parts that were asked for, one after another."""
    if {"file", "device", "ssh"} & set(options.only):
        yield from _copies(options, folder)
    if "memory" in options.only:
        _tell("memory by disk size")
        results = memory.by_size(folder, tell=_tell)
        yield Section("Peak memory, 256 MiB of data on disks of growing size", "", results)
    if "formats" in options.only:
        yield from formats.every_format(folder, options.size, names=options.format, repeats=options.repeats, tell=_tell)
    if "maps" in options.only:
        yield from maps.of_giants(folder, quick=options.quick, repeats=min(options.repeats, 2), tell=_tell)


def _copies(options: argparse.Namespace, folder: Path) -> Iterator[Section]:
    repeats = options.repeats
    for make, what in ((large_runs, "large runs"), (small_runs, "4 KiB random runs in the children")):
        _tell(f"{what}: making the images")
        chain = apart(make, folder, options.size)
        about = f"VHD chain of 3 layers, {what}, {format_bytes(chain.payload)} of data"
        if "file" in options.only:
            results = copies.to_file(chain, folder, repeats=repeats, tell=_tell)
            lines = _lines(f"VHD chain, {what} → raw file", copies.KERNEL)
            yield Section(f"{about} → raw file", copies.KERNEL, results, lines)
        if "device" in options.only and os.geteuid() == 0:
            results = copies.to_device(chain, folder, repeats=repeats, tell=_tell)
            lines = _lines(f"VHD chain, {what} → loop device", copies.KERNEL_DEVICE)
            yield Section(f"{about} → loop device", copies.KERNEL_DEVICE, results, lines)
        if "ssh" in options.only and make is large_runs:
            yield from _over_ssh(Path(chain.flat_vhd), folder, repeats)


def _over_ssh(flat: Path, folder: Path, repeats: int) -> Iterator[Section]:
    results = network.over_ssh(flat, folder, repeats=repeats, tell=_tell)
    thrown = (
        CopyLine("SFTP, thrown away", network.SFTP, (network.CAT,)),
        CopyLine("vdi-export stream, thrown away", network.STREAM, (network.CAT,)),
    )
    kept = (CopyLine("vdi-export stream, whole pass → raw file", network.STREAM_PASS, (network.CAT_TO_FILE,)),)
    for title, reference, part, lines in (
        ("SSH on loopback, thrown away", network.CAT, results[:3], thrown),
        ("SSH on loopback → raw file", network.CAT_TO_FILE, results[3:], kept),
    ):
        yield Section(f"{title} ({format_bytes(flat.stat().st_size)})", reference, part, lines)


def _lines(label: str, kernel: str) -> tuple[CopyLine, ...]:
    """A pass as it is made, and what of it is the manifest."""
    references = (kernel, copies.CP)
    return (
        CopyLine(label, copies.PASS, references, copies.QEMU),
        CopyLine(f"{label}, no manifest", copies.PASS_ALONE, references, copies.QEMU),
    )


def _head(options: argparse.Namespace) -> str:
    qemu = subprocess.run(["qemu-img", "--version"], capture_output=True, text=True, check=False).stdout.split("\n")[0]
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    return (
        f"`python -m benchmarks --size {options.size // GiB}G --repeats {options.repeats}`: "
        f"Python {platform.python_version()}, "
        f"{qemu}, Linux {platform.release()}, {os.cpu_count()} CPUs, load {load}, "
        f"{format_bytes(shutil.disk_usage(options.folder or tempfile.gettempdir()).free)} free.\n"
        "Best of the repeats; caches are cold for the files, warm for SSH. Above 1: tokvm is faster. The kernel's copy is\n"
        "the faster one of copy_file_range (sendfile to a device) and cp: of the flat VHD that qemu-img gets too, for formats\n"
        "of a dense file of as many bytes as the disk has data. All of them end with fsync."
    )


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
