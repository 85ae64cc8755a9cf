"""The manifest file: what survives a torn tail, and which record speaks for a byte."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from tokvm.core.errors import JournalError
from tokvm.core.units import GiB, KiB, MiB
from tokvm.transfer import manifest as manifests
from tokvm.transfer.manifest import CELL, ManifestReader, ManifestWriter, RecordKind, digest, read_manifest
from tokvm.transfer.resolve import resolve


def opened(path: Path, *, number: int = 3, disk: int = 1, size: int = 8 * MiB) -> ManifestWriter:
    return ManifestWriter.open(path, number=number, disk=disk, size=size)


def test_pieces_are_cut_at_cells(tmp_path: Path) -> None:
    data = memoryview(random.Random(1).randbytes(3 * CELL))
    writer = opened(tmp_path / "m")
    writer.add(CELL - 512, data[: CELL + 1024])
    writer.zero(4 * CELL, 5 * GiB)
    writer.flush()
    rows = read_manifest(tmp_path / "m")
    writer.close()
    pieces = [(int(row["offset"]), int(row["length"])) for row in rows]
    assert pieces[:3] == [(CELL - 512, 512), (CELL, CELL), (2 * CELL, 512)]
    assert rows["digest"][1].tobytes() == digest(data[512 : 512 + CELL])
    assert set(rows["kind"][3:].tolist()) == {RecordKind.ZERO}
    assert int(rows["length"][3:].sum()) == 5 * GiB


def test_only_what_was_flushed_counts(tmp_path: Path) -> None:
    writer = opened(tmp_path / "m")
    writer.zero(0, 512)
    writer.flush()
    writer.zero(512, 512)
    assert len(read_manifest(tmp_path / "m")) == 1
    writer.close()
    again = opened(tmp_path / "m")
    again.zero(1024, 512)
    again.flush()
    assert read_manifest(tmp_path / "m")["offset"].tolist() == [0, 1024]
    again.close()


def test_a_file_cut_anywhere_keeps_whole_frames_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "m"
    writer = opened(path)
    ends = [path.stat().st_size]
    for number in range(3):
        writer.zero(number * MiB, MiB)
        writer.zero(number * MiB, 512)
        writer.flush()
        ends.append(path.stat().st_size)
    writer.close()
    raw = path.read_bytes()
    for cut in [*range(70), *range(70, len(raw) + 1, 3)]:
        path.write_bytes(raw[:cut])
        whole = max((count for count, end in enumerate(ends) if end <= cut), default=0)
        again = opened(path)
        again.zero(7 * MiB, 512)
        again.flush()
        again.close()
        offsets = read_manifest(path)["offset"].tolist()
        assert offsets == [n * MiB for n in range(whole) for _ in (0, 1)] + [7 * MiB]


def test_a_flipped_bit_anywhere_is_never_believed(tmp_path: Path) -> None:
    path = tmp_path / "m"
    writer = opened(path)
    for number in range(2):
        writer.add(number * CELL, memoryview(bytes([number]) * 512))
        writer.flush()
    writer.close()
    raw, good = path.read_bytes(), read_manifest(path)
    for at in range(len(raw)):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 0x10]) + raw[at + 1 :])
        try:
            rows = read_manifest(path)
        except JournalError:
            assert at < 64
            continue
        assert len(rows) < len(good)
        assert rows.tobytes() == good[: len(rows)].tobytes()


@pytest.mark.parametrize("other", [{"number": 4}, {"disk": 0}, {"size": MiB}])
def test_another_passs_manifest_is_refused(other: dict[str, int], tmp_path: Path) -> None:
    opened(tmp_path / "m").close()
    with pytest.raises(JournalError, match="another pass"):
        opened(tmp_path / "m", **other)


def test_a_file_that_is_no_manifest_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(b"x" * 200)
    with pytest.raises(JournalError):
        opened(tmp_path / "m")
    with pytest.raises(JournalError):
        read_manifest(tmp_path / "m")
    with pytest.raises(JournalError):
        read_manifest(tmp_path / "missing")
    assert (tmp_path / "m").read_bytes() == b"x" * 200


def test_many_records_become_several_frames_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifests, "FRAME_RECORDS", 16)
    writer = opened(tmp_path / "m")
    writer.append(b"".join(manifests.zero_records(n * 4096, 4096) for n in range(100)))
    writer.flush()
    writer.close()
    reader = ManifestReader.open(tmp_path / "m")
    assert (reader.frames, len(reader)) == (7, 100)
    assert reader.records(40 * 4096, 42 * 4096)["offset"].tolist() == [40 * 4096, 41 * 4096]
    assert len(reader.sample(5)) == 5
    reader.close()


def test_the_newest_record_of_each_byte_against_a_byte_model(tmp_path: Path) -> None:
    rng = random.Random(11)
    size = 4 * CELL
    for case in range(30):
        speaks: list[tuple[int, int, int] | None] = [None] * (size // 512)
        readers = []
        for number in range(3):
            writer = opened(tmp_path / f"m-{case}-{number}", number=number, size=size)
            for turn in range(rng.randrange(6)):
                first = rng.randrange(size // 512)
                last = min(size // 512, first + rng.choice([1, 2, 50, 128, 300]))
                offset, length = first * 512, (last - first) * 512
                if rng.random() < 0.4:
                    writer.zero(offset, length)
                    for sector in range(first, last):
                        speaks[sector] = (-1, offset, length)
                else:
                    writer.add(offset, memoryview(bytes(length)))
                    for sector in range(first, last):
                        cell = sector * 512 // CELL * CELL
                        low, high = max(cell, offset), min(cell + CELL, offset + length)
                        speaks[sector] = (number * 10 + turn, low, high - low)
            writer.flush()
            readers.append(writer.read())
            writer.close()
        found = resolve(readers, 0, size)
        held: dict[tuple[int, int, int], int] = {}
        for speaker in speaks:
            if speaker is not None and speaker[0] != -1:
                held[speaker] = held.get(speaker, 0) + 512
        whole = sorted((key[1], key[2]) for key, count in held.items() if count == key[2])
        assert sorted((int(row["offset"]), int(row["length"])) for row in found.whole) == whole
        assert found.stale == sum(count for key, count in held.items() if count != key[2])
        assert found.silent == 512 * sum(1 for speaker in speaks if speaker is None)
        assert sum(length for _, length in found.zeros) == 512 * sum(1 for s in speaks if s is not None and s[0] == -1)
        for reader in readers:
            reader.close()
    assert np.dtype(manifests.RECORD).itemsize == 32
    assert 64 * KiB == CELL
