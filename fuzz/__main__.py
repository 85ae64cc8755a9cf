"""`python -m fuzz TARGET --seconds N [--work FOLDER]`, `python -m fuzz [TARGET] --replay | --keep FOLDER`.

Fuzzing works in FOLDER (a temporary one): what reached new code is put there, findings go to FOLDER/findings. --replay runs the
kept corpus or, with --file, one input. --keep takes what is worth it from a FOLDER over into the kept corpus.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import warnings
from pathlib import Path


def main() -> int:
    options = _options()
    logging.disable(logging.CRITICAL)  # the readers' warnings about hostile images are what we came for
    warnings.simplefilter("error")  # numpy's are findings
    if options.replay:
        return _replay(options.target, options.file)
    if options.keep:
        return _keep(options.target, options.keep)
    if not options.target:
        sys.exit("say which target to fuzz")
    return _fuzz(options.target, options.seconds, options.work or Path(tempfile.mkdtemp(prefix="tokvm-fuzz-")))


def _replay(name: str | None, files: list[Path] | None) -> int:
    from fuzz.targets import TARGETS, inputs

    for one in [name] if name else TARGETS:
        paths = files or inputs(one)
        for path in paths:
            TARGETS[one].run(path.read_bytes())
        print(f"{one}: {len(paths)} inputs, no finding")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("target", nargs="?")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--replay", action="store_true")
    parser.add_argument("--file", type=Path, action="append")
    parser.add_argument("--keep", type=Path, metavar="FOLDER")
    return parser.parse_args()


def _keep(only: str | None, work: Path) -> int:
    from fuzz.keep import keep, write
    from fuzz.targets import CORPUS, TARGETS, inputs

    for name in [only] if only else TARGETS:
        found = [*inputs(name), *(path for path in (work / name).glob("*") if path.is_file())]
        seeds = [TARGETS[name].compact(image) for image in TARGETS[name].images()]
        chosen = keep(TARGETS[name], [*seeds, *(path.read_bytes() for path in found)])
        print(f"{name}: {len(found)} inputs, {len(chosen)} kept, {write(CORPUS / name, chosen)} bytes")
    return 0


def _fuzz(name: str, seconds: int, work: Path) -> int:
    """Does not return: libFuzzer ends the process. Its exit code is 0 when nothing was found."""
    import atheris

    with atheris.instrument_imports(include=["tokvm.images"]):
        from fuzz import seeds
        from fuzz.targets import CORPUS, MAX_TEXT, TARGETS

    target = TARGETS[name]
    grown, findings, start = work / name, work / "findings", work / f"{name}-seeds"
    for folder in (grown, findings, start):
        folder.mkdir(parents=True, exist_ok=True)
    seeds.written(start, target.images(), target.compact)
    words = work / f"{name}.words"
    words.write_text("".join(_entry(word) for word in target.words))
    length = target.mutator.windows.length if target.mutator else MAX_TEXT
    argv = [
        sys.argv[0], f"-max_total_time={seconds}", f"-max_len={length}", f"-artifact_prefix={findings}/{name}-", "-timeout=10",
        "-rss_limit_mb=4096", "-print_final_stats=1", *([f"-dict={words}"] if target.words else []), str(grown), str(start),
        *([str(CORPUS / name)] if (CORPUS / name).is_dir() else []),
    ]  # fmt: skip
    print(f"working in {work}", flush=True)
    if target.mutator is None:
        atheris.Setup(argv, target.run)
    else:
        mutator = target.mutator
        custom = lambda data, size, seed: mutator.mutate(data, seed, atheris.Mutate)[:size]  # noqa: E731
        atheris.Setup(argv, target.run, custom_mutator=custom)
    atheris.Fuzz()
    return 0


def _entry(word: bytes) -> str:
    """A line of libFuzzer's dictionary."""
    return '"' + "".join(f"\\x{byte:02x}" for byte in word) + '"\n'


if __name__ == "__main__":
    sys.exit(main())
