from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from tokvm.domain import accel
from tokvm.domain.accel import Kvm, KvmAnswer, boot_sector, find_emulator, kvm_works, probe_kvm, try_guest
from tokvm.domain.base import Accel

needs_qemu = pytest.mark.skipif(find_emulator() is None, reason="QEMU is not installed")
needs_kvm_device = pytest.mark.skipif(not os.access(accel.DEVICE, os.R_OK | os.W_OK), reason="there is no /dev/kvm to try")


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Something in the place of /dev/kvm."""
    path = tmp_path / "kvm"
    path.touch()
    monkeypatch.setattr(accel, "DEVICE", path)
    monkeypatch.setattr(accel, "EMULATORS", ("sh",))
    return path


class Trials:
    """Counts the guests tried, and answers as told."""

    def __init__(self, verdict: Kvm) -> None:
        self.verdict = verdict
        self.count = 0

    def __call__(self, emulator: str, tried: Accel, *, deadline_s: float) -> KvmAnswer:
        self.count += 1
        return KvmAnswer(self.verdict, f"{emulator} {tried} {deadline_s}")


def trials(monkeypatch: pytest.MonkeyPatch, verdict: Kvm) -> Trials:
    told = Trials(verdict)
    monkeypatch.setattr(accel, "try_guest", told)
    return told


def test_the_boot_sector_is_one_and_its_addresses_are_right() -> None:
    sector = boot_sector()
    assert len(sector) == 512
    assert sector[-2:] == b"\x55\xaa"
    assert sector.index(accel.MARK) == 0x66
    assert sector[0x48:0x50] == bytes(8)
    assert sector[0x60:0x66] == (23).to_bytes(2, "little") + (0x7C48).to_bytes(4, "little")


@needs_qemu
@pytest.mark.slow
def test_the_trial_itself_is_sound_because_tcg_passes_it() -> None:
    assert try_guest(find_emulator() or "", Accel.TCG, deadline_s=60).verdict is Kvm.WORKS


@needs_qemu
def test_a_guest_that_does_not_come_up_in_time_is_ended() -> None:
    begun = time.monotonic()
    answer = try_guest(find_emulator() or "", Accel.TCG, deadline_s=0.05)
    assert answer.verdict is Kvm.BROKEN
    assert time.monotonic() - begun < 5


def test_an_emulator_that_fails_at_once_is_quoted() -> None:
    assert try_guest("false", Accel.KVM, deadline_s=5) == KvmAnswer(Kvm.BROKEN, "QEMU ended with 1 before the guest spoke")


def test_an_emulator_that_cannot_be_started_is_no_kvm() -> None:
    assert try_guest("/nonexistent/qemu", Accel.KVM, deadline_s=5).verdict is Kvm.BROKEN


@pytest.mark.slow
@needs_qemu
@needs_kvm_device
def test_the_answer_of_this_host_comes_within_seconds_and_is_kept(tmp_path: Path) -> None:
    cache = tmp_path / "tokvm" / "kvm.json"
    begun = time.monotonic()
    answer = probe_kvm(cache=cache)
    assert answer.verdict in {Kvm.WORKS, Kvm.BROKEN}
    assert time.monotonic() - begun < accel.DEADLINE_S + 3
    begun = time.monotonic()
    assert probe_kvm(cache=cache) == answer
    assert time.monotonic() - begun < 0.5


def test_no_device_is_no_kvm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(accel, "DEVICE", tmp_path / "none")
    assert probe_kvm().verdict is Kvm.ABSENT
    assert not kvm_works()


def test_a_device_that_may_not_be_opened_is_told_apart(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda _path, _mode: False)
    assert probe_kvm().verdict is Kvm.FORBIDDEN
    assert device.exists()


def test_no_emulator_is_no_kvm(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accel, "EMULATORS", ("/nonexistent/qemu",))
    assert probe_kvm().verdict is Kvm.ABSENT
    assert device.exists()


@pytest.mark.usefixtures("device")
def test_a_yes_is_asked_once_for_each_boot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told, cache = trials(monkeypatch, Kvm.WORKS), tmp_path / "kvm.json"
    assert probe_kvm(cache=cache) == probe_kvm(cache=cache)
    assert told.count == 1
    kept = json.loads(cache.read_text())
    cache.write_text(json.dumps({**kept, "key": "another boot"}))
    assert probe_kvm(cache=cache).verdict is Kvm.WORKS
    assert told.count == 2


@pytest.mark.usefixtures("device")
def test_a_no_is_asked_again_later(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told, cache = trials(monkeypatch, Kvm.BROKEN), tmp_path / "kvm.json"
    probe_kvm(cache=cache)
    probe_kvm(cache=cache)
    assert told.count == 1
    kept = json.loads(cache.read_text())
    cache.write_text(json.dumps({**kept, "time": kept["time"] - accel.NO_LASTS_S - 1}))
    probe_kvm(cache=cache)
    assert told.count == 2


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("junk", [b"", b"{", b"[]", b"3", b'{"verdict": "perhaps"}', b"\xff\xfe"])
def test_a_damaged_answer_is_asked_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, junk: bytes) -> None:
    told, cache = trials(monkeypatch, Kvm.WORKS), tmp_path / "kvm.json"
    cache.write_bytes(junk)
    assert probe_kvm(cache=cache).verdict is Kvm.WORKS
    assert told.count == 1


@pytest.mark.usefixtures("device")
def test_an_answer_that_cannot_be_kept_is_still_an_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told = trials(monkeypatch, Kvm.WORKS)
    (tmp_path / "file").touch()
    assert probe_kvm(cache=tmp_path / "file" / "below" / "kvm.json").verdict is Kvm.WORKS
    assert told.count == 1
