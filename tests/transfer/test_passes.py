"""A pass: what ends up on the target, what a checkpoint promises, how it stops and how it fails."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tokvm.core.disk import Chunk
from tokvm.core.errors import ConnectionLost, ImageError, TargetError
from tokvm.core.extents import ExtentKind
from tokvm.core.units import KiB, MiB
from tokvm.transfer.manifest import ManifestWriter
from tokvm.transfer.passes import Checkpoint, PassLimits, PassStopped, StopReason, TargetState, run_pass

Model = tuple[bytes, list[tuple[int, int, ExtentKind]]]
SMALL = PassLimits(checkpoint_bytes=512 * KiB, checkpoint_s=60.0)


def ignore(_: object) -> None:
    """For callbacks that a test does not look at."""


def copy(
    reader: Any, writer: Any, state: TargetState = TargetState.UNKNOWN, resume: Checkpoint | None = None, **options: Any
) -> Any:
    options.setdefault("record", ignore)
    options.setdefault("progress", ignore)
    options.setdefault("limits", SMALL)
    return run_pass(reader, writer, state=state, resume=resume, **options)


@pytest.mark.slow
def test_a_base_pass_leaves_nothing_of_what_the_target_held(model: Model, reader_of: Any, dirty: Any, target: Any) -> None:
    content, extents = model
    path = dirty(len(content))
    writer = target(path, len(content))
    result = copy(reader_of(content, extents), writer)
    assert bytes(writer.read_back(0, len(content))) == content
    survivors = sum(1 for have, want in zip(path.read_bytes(), content, strict=True) if have == 0x53 and want != 0x53)
    assert survivors == 0
    assert result.data_bytes == sum(length for _, length, kind in extents if kind is ExtentKind.DATA)
    assert result.data_bytes + result.zero_bytes == len(content)


def test_a_delta_pass_leaves_what_it_does_not_name(model: Model, delta: Any, reader_of: Any, dirty: Any, target: Any) -> None:
    base, extents = model
    path = dirty(len(base))
    writer = target(path, len(base))
    copy(reader_of(base, extents), writer)
    content, changed = delta(base, seed=5)
    result = copy(reader_of(content, changed, piece=4 * KiB), writer, TargetState.PREVIOUS_PASS)
    assert bytes(writer.read_back(0, len(base))) == content
    assert result.data_bytes == sum(length for _, length, kind in changed if kind is ExtentKind.DATA)


def test_a_new_file_is_not_zeroed_and_stays_sparse(reader_of: Any, tmp_path: Path, target: Any) -> None:
    content = bytes(64 * MiB - 4 * KiB) + b"x" * 4 * KiB
    writer = target(tmp_path / "new.raw", len(content))
    seen: list[Checkpoint] = []
    copy(reader_of(content, [(64 * MiB - 4 * KiB, 4 * KiB, ExtentKind.DATA)]), writer, record=seen.append)
    assert seen[0].zeroed
    assert (tmp_path / "new.raw").stat().st_blocks * 512 <= 64 * KiB
    assert (tmp_path / "new.raw").read_bytes() == content


def test_zero_filled_data_becomes_a_hole(reader_of: Any, tmp_path: Path, target: Any) -> None:
    content = bytes(8 * MiB)
    writer = target(tmp_path / "new.raw", len(content))
    result = copy(reader_of(content, [(0, 8 * MiB, ExtentKind.DATA)]), writer)
    assert result.data_bytes == 8 * MiB
    assert (tmp_path / "new.raw").stat().st_blocks == 0


@pytest.mark.parametrize(
    "extents", [[], [(0, 512, ExtentKind.DATA)], [(512, 512, ExtentKind.ZERO)], [(4096, 1024, ExtentKind.DATA)]]
)
def test_tiny_disks(extents: Any, reader_of: Any, dirty: Any, target: Any) -> None:
    content = bytearray(5120)
    for offset, length, kind in extents:
        if kind is ExtentKind.DATA:
            content[offset : offset + length] = b"d" * length
    writer = target(dirty(5120), 5120)
    seen: list[Checkpoint] = []
    copy(reader_of(bytes(content), extents), writer, record=seen.append)
    assert bytes(writer.read_back(0, 5120)) == content
    assert seen[-1].position == len(extents)
    assert seen[-1].zeroed


def test_each_checkpoint_is_true_when_it_is_recorded(model: Model, reader_of: Any, dirty: Any, target: Any) -> None:
    """Everything handed out before a checkpoint's position is on the medium at the moment `record` is called."""
    content, extents = model
    reader = reader_of(content, extents, piece=64 * KiB)
    writer = target(dirty(len(content)), len(content))
    checked = []

    def record(checkpoint: Checkpoint) -> None:
        for offset, length, _ in reader.pieces[: checkpoint.position]:
            assert bytes(writer.read_back(offset, length)) == content[offset : offset + length]
        checked.append(checkpoint)

    copy(reader, writer, record=record)
    assert len(checked) > 5
    assert [c.position for c in checked] == sorted(c.position for c in checked)
    assert checked[-1].position == len(reader.pieces)
    assert Checkpoint(**asdict(checked[-1])) == checked[-1]


def test_flush_comes_before_record(
    model: Model, reader_of: Any, dirty: Any, target: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, extents = model
    writer = target(dirty(len(content)), len(content))
    order: list[str] = []
    real = os.fdatasync

    def fdatasync(fd: int) -> None:
        real(fd)
        order.append("flush")

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    copy(reader_of(content, extents), writer, record=lambda _: order.append("record"))
    records = [place for place, what in enumerate(order) if what == "record"]
    assert records
    for earlier, later in zip([-1, *records], records, strict=False):
        assert "flush" in order[earlier + 1 : later] or order[earlier] == "record"
    assert order.count("flush") >= len(records)


def test_every_resume_point_gives_the_same_bytes(model: Model, reader_of: Any, dirty: Any, target: Any) -> None:
    content, extents = model
    writer = target(dirty(len(content)), len(content))
    seen: list[Checkpoint] = []
    copy(reader_of(content, extents, piece=64 * KiB), writer, record=seen.append)
    whole = bytes(writer.read_back(0, len(content)))
    for checkpoint in seen:
        reader = reader_of(content, extents, piece=64 * KiB)
        again: list[Checkpoint] = []
        result = copy(reader, writer, resume=checkpoint, record=again.append)
        assert reader.sent == sum(length for _, length, kind in reader.pieces[checkpoint.position :] if kind is ExtentKind.DATA)
        assert again[-1].data_bytes == seen[-1].data_bytes == result.data_bytes
        assert result.run_bytes == reader.sent
        assert again[-1].position == seen[-1].position
    assert bytes(writer.read_back(0, len(content))) == whole == content


def test_progress_adds_up(model: Model, reader_of: Any, dirty: Any, target: Any) -> None:
    content, extents = model
    reader = reader_of(content, extents)
    moved: list[int] = []
    callers = set()

    def progress(count: int) -> None:
        moved.append(count)
        callers.add(threading.get_ident())

    copy(reader, target(dirty(len(content)), len(content)), progress=progress)
    assert sum(moved) == reader.total
    assert callers == {threading.get_ident()}


def test_memory_stays_bounded_and_every_buffer_comes_back(reader_of: Any, tmp_path: Path, target: Any) -> None:
    content = os.urandom(MiB) * 16
    reader = reader_of(content, [(0, len(content), ExtentKind.DATA)], piece=128 * KiB, buffers=2)
    copy(reader, target(tmp_path / "new.raw", len(content)))
    assert reader.free_buffers() == 2


def test_cancelling_stops_at_a_true_checkpoint(model: Model, reader_of: Any, dirty: Any, target: Any) -> None:
    content, extents = model
    reader = reader_of(content, extents, piece=64 * KiB)
    writer = target(dirty(len(content)), len(content))
    seen: list[Checkpoint] = []
    with pytest.raises(PassStopped) as caught:
        copy(reader, writer, record=seen.append, cancelled=lambda: reader.sent > MiB)
    assert caught.value.reason is StopReason.CANCELLED
    assert caught.value.checkpoint == seen[-1]
    assert 0 < seen[-1].position < len(reader.pieces)
    assert reader.free_buffers() == 4
    copy(reader_of(content, extents, piece=64 * KiB), writer, resume=seen[-1])
    assert bytes(writer.read_back(0, len(content))) == content


def test_a_deadline_stops_a_slow_pass(model: Model, reader_of: Any, dirty: Any, target: Any) -> None:
    content, extents = model
    reader = reader_of(content, extents, piece=64 * KiB)
    reader.before = lambda _: time.sleep(0.02)
    began = time.monotonic()
    with pytest.raises(PassStopped) as caught:
        copy(reader, target(dirty(len(content)), len(content)), total_deadline=time.monotonic() + 0.2)
    assert caught.value.reason is StopReason.DEADLINE
    assert time.monotonic() - began < 2


def test_a_stop_while_zeroing_goes_on_where_it_stopped(reader_of: Any, dirty: Any, target: Any) -> None:
    size = 8 * MiB
    writer = target(dirty(size), size)
    seen: list[Checkpoint] = []
    with pytest.raises(PassStopped):
        copy(reader_of(bytes(size), []), writer, record=seen.append, cancelled=lambda: True)
    assert not seen[-1].zeroed
    assert seen[-1].zeroed_to == MiB
    copy(reader_of(bytes(size), []), writer, resume=seen[-1], record=seen.append)
    assert seen[-1].zero_bytes == size
    assert not any(writer.read_back(0, size))


def test_the_rate_limit_holds(reader_of: Any, tmp_path: Path, target: Any) -> None:
    content = os.urandom(2 * MiB)
    limits = PassLimits(rate_limit=4.0 * MiB)
    began = time.monotonic()
    copy(
        reader_of(content, [(0, len(content), ExtentKind.DATA)], piece=64 * KiB),
        target(tmp_path / "n", len(content)),
        limits=limits,
    )
    assert 0.2 < time.monotonic() - began < 2


def test_the_readers_error_passes_through_and_earlier_checkpoints_stay_true(
    model: Model, reader_of: Any, dirty: Any, target: Any
) -> None:
    content, extents = model
    reader = reader_of(content, extents, piece=64 * KiB)

    def lose(position: int) -> None:
        if position == 30:
            raise ConnectionLost("gone", where="host")

    reader.before = lose
    writer = target(dirty(len(content)), len(content))
    seen: list[Checkpoint] = []
    with pytest.raises(ConnectionLost):
        copy(reader, writer, record=seen.append)
    assert seen[-1].position <= 30
    assert reader.free_buffers() == 4
    copy(reader_of(content, extents, piece=64 * KiB), writer, resume=seen[-1])
    assert bytes(writer.read_back(0, len(content))) == content


@pytest.mark.parametrize("offset", [-512, 4 * MiB, 1 << 62])
def test_a_chunk_outside_the_disk_is_refused(offset: int, reader_of: Any, tmp_path: Path, target: Any) -> None:
    reader = reader_of(bytes(4 * MiB), [])
    reader.chunks = lambda _position=0: iter([Chunk(offset, 512, ExtentKind.DATA, 1, memoryview(b"x" * 512))])
    with pytest.raises(ImageError):
        copy(reader, target(tmp_path / "n", 8 * MiB))
    assert (tmp_path / "n").stat().st_blocks == 0


def test_a_disk_larger_than_the_target_is_refused(reader_of: Any, tmp_path: Path, target: Any) -> None:
    with pytest.raises(TargetError):
        copy(reader_of(bytes(2 * MiB), []), target(tmp_path / "n", MiB))


@pytest.mark.parametrize("call", ["pwrite", "fdatasync"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
@pytest.mark.slow
def test_any_failing_call_ends_the_pass_and_a_resumed_run_is_byte_identical(
    call: str,
    code: int,
    model: Model,
    reader_of: Any,
    dirty: Any,
    target: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fail the Nth pwrite or fdatasync, for many N: never success, checkpoints never advance past it, the next run repairs."""
    content, extents = model
    path = dirty(len(content))
    real = getattr(os, call)
    failures, reasons = 0, set[str]()
    for fail_at in [1, 2, 3, 5, 8, 13, 21, 34]:
        path.write_bytes(b"\x53" * len(content))
        writer = target(path, len(content))
        identity, lock, count = writer.identity, threading.Lock(), 0

        def faulty(*arguments: Any, fail_at: int = fail_at, lock: threading.Lock = lock) -> Any:
            nonlocal count
            with lock:
                count += 1
                mine = count
            if mine == fail_at:
                raise OSError(code, os.strerror(code))
            return real(*arguments)

        seen: list[Checkpoint] = []
        with monkeypatch.context() as patch:
            patch.setattr(os, call, faulty)
            try:
                copy(reader_of(content, extents, piece=64 * KiB), writer, record=seen.append)
            except TargetError as exc:
                reasons.add(exc.what)
                failures += 1
                frozen = len(seen)
                with pytest.raises(TargetError):
                    writer.flush()
                assert len(seen) == frozen
            else:
                assert count < fail_at
        writer.close()
        again = target(path, len(content), expect=identity)
        copy(reader_of(content, extents, piece=64 * KiB), again, resume=seen[-1] if seen else None)
        assert bytes(again.read_back(0, len(content))) == content
        again.close()
    assert failures >= 5
    assert all(reason.endswith(os.strerror(code)) for reason in reasons)


def test_a_failing_worker_stops_the_pass_promptly(
    reader_of: Any, tmp_path: Path, target: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = os.urandom(MiB) * 32
    reader = reader_of(content, [(0, len(content), ExtentKind.DATA)], piece=128 * KiB)
    writer = target(tmp_path / "n", len(content))

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(TargetError):
        copy(reader, writer)
    assert reader.sent <= 4 * MiB
    assert reader.free_buffers() == 4


def test_no_thread_is_left_behind(model: Model, reader_of: Any, dirty: Any, target: Any) -> None:
    content, extents = model
    writer = target(dirty(len(content)), len(content))
    copy(reader_of(content, extents), writer)
    with pytest.raises(KeyboardInterrupt):
        copy(reader_of(content, extents), writer, progress=_interrupt)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("pass-")]


def _interrupt(_: int) -> None:
    raise KeyboardInterrupt


def test_a_target_changed_between_runs_is_noticed(
    model: Model, reader_of: Any, dirty: Any, target: Any, tmp_path: Path
) -> None:
    content, extents = model
    path = dirty(len(content))
    writer = target(path, len(content))
    manifest = ManifestWriter.open(tmp_path / "m", number=0, disk=0, size=len(content))
    seen: list[Checkpoint] = []
    copy(reader_of(content, extents), writer, manifest=manifest, record=seen.append)
    copy(reader_of(content, extents), writer, manifest=manifest, resume=seen[2])
    path.write_bytes(b"\x99" * len(content))
    with pytest.raises(TargetError, match="no longer holds"):
        copy(reader_of(content, extents), writer, manifest=manifest, resume=seen[2])
    manifest.close()
