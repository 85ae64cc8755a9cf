"""What is sent to a host is written down, without secrets, and nothing that fails there matters to who sends it."""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import logging
import os
import shlex
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tokvm.core.errors import ConnectionLost, HostKeyError, UsageError
from tokvm.core.units import MiB
from tokvm.remote import recording
from tokvm.remote.recorded import RecordedHost
from tokvm.remote.recording import Kind, Recorder
from tokvm.remote.sftp import RemoteFileError
from tokvm.remote.ssh import RemoteCommandError, quote
from tokvm.testing.transcripts import Exchange, Transcript, read_transcript


@pytest.fixture
def recorder(tmp_path: Path) -> Iterator[Recorder]:
    made = Recorder.open(tmp_path / "transcripts", verb="check", typed=["tokvm", "check"])
    yield made
    made.close()


@pytest.fixture
def host(shared_server: Any, recorder: Recorder) -> Iterator[RecordedHost]:
    made = RecordedHost(shared_server.config(), recorder)
    yield made
    made.close()


def read(recorder: Recorder) -> Transcript:
    """What was written, once all of it is."""
    recorder.close()
    return read_transcript(recorder.path)


def only(recorder: Recorder) -> Exchange:
    (found,) = read(recorder).exchanges
    return found


def test_a_command_stands_there_with_all_it_said(host: RecordedHost, recorder: Recorder) -> None:
    line = "cat; printf 'a\\0\\200'; echo oops >&2; exit 3"
    done = host.run_line(line, check=False, input="grüße".encode())
    found = only(recorder)
    assert (found.kind, found.host, found.command, found.stdin) == ("command", host.where, line, "grüße")
    assert found.code == done.code == 3
    assert found.stdout.encode("utf-8", "surrogateescape") == done.stdout == "grüße".encode() + b"a\0\x80"
    assert found.stderr == "oops\n"
    assert found.end is not None
    assert 0 < found.end["seconds"] < 10


def test_a_host_that_is_recorded_behaves_like_one_that_is_not(host: RecordedHost, recorder: Recorder) -> None:
    with pytest.raises(RemoteCommandError, match="exit code 3"):
        host.run(["sh", "-c", "exit 3"])
    with pytest.raises(ConnectionLost, match=r"did not end within 0\.5 s"):
        host.run_line("echo early; echo late >&2; sleep 30", timeout_s=0.5)
    with pytest.raises(UsageError):
        host.run_line("echo a\0b")
    failed, hanging, refused = read(recorder).exchanges
    assert failed.code == 3
    assert hanging.code is None
    assert (hanging.stdout, hanging.stderr) == ("early\n", "late\n")
    assert [one.error["class"] for one in (hanging, refused) if one.error] == ["ProgramTimeout", "UsageError"]


def test_a_connection_that_was_refused_is_an_answer_too(shared_server: Any, recorder: Recorder, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    stranger = RecordedHost(replace(shared_server.config(), known_hosts=str(tmp_path / "empty")), recorder)
    for attempt in (lambda: stranger.run(["true"]), stranger.sftp):
        with pytest.raises(HostKeyError):
            attempt()
    stranger.close()
    assert [one.error and one.error["class"] for one in read(recorder).exchanges] == ["HostKeyError", "HostKeyError"]


def drain(stream: Any) -> int:
    buffer, count = memoryview(bytearray(MiB)), 0
    while got := stream.read_into(buffer):
        count += got
    return count


def test_of_a_stream_its_size_and_its_end_are_written(host: RecordedHost, recorder: Recorder) -> None:
    stream = host.stream("head -c 300000 /dev/zero | tr '\\0' Q; echo done >&2")
    assert drain(stream) == 300000
    stream.finish()
    stream.close()
    found = only(recorder)
    assert found.kind == "stream"
    assert found.end is not None
    assert found.end["received"] == 300000
    assert (found.code, found.stderr) == (0, "done\n")
    assert "QQQQ" not in recorder.path.read_text()


@pytest.mark.slow
def test_streams_that_end_badly_say_how(host: RecordedHost, recorder: Recorder) -> None:
    failing = host.stream("echo x; echo why >&2; exit 4")
    drain(failing)
    with pytest.raises(RemoteCommandError):
        failing.finish()
    failing.close()
    silent = host.stream("echo x; sleep 30", deadline_s=0.5, first_byte_s=10)
    with pytest.raises(ConnectionLost):
        drain(silent)
    silent.close()
    host.stream("cat /dev/zero").close()
    failed, stalled, given_up = (one.end or {} for one in read(recorder).exchanges)
    assert (failed["code"], failed["stderr"], failed["received"]) == (4, "why\n", 2)
    assert (stalled["error"]["class"], stalled["received"]) == ("ConnectionLost", 2)
    assert given_up["given_up"]


def test_of_files_there_are_paths_sizes_and_refusals(host: RecordedHost, recorder: Recorder, tmp_path: Path) -> None:
    place = tmp_path / "disk ü.vmdk"
    place.write_bytes(b"Q" * 100_000)
    with host.sftp() as sftp:
        file = sftp.open(str(place))
        file.read_into(10, memoryview(bytearray(20)))
        pieces: list[int] = []
        file.read_ranges([(0, 50_000)], lambda _at, piece: pieces.append(len(piece)))
        file.close()
        assert sftp.stat(str(place)).size == 100_000
        assert [entry.name for entry in sftp.listdir(str(tmp_path)) if entry.name == place.name]
        with pytest.raises(RemoteFileError):
            sftp.open(str(tmp_path / "missing"))
    found = only(recorder)
    assert found.kind == "sftp"
    steps = {step["op"]: step for step in found.steps}
    assert [step["op"] for step in found.steps] == ["limits", "open", "close", "stat", "listdir", "open"]
    assert found.steps[1]["path"] == str(place)
    assert found.steps[1]["size"] == steps["stat"]["size"] == 100_000
    assert steps["close"]["bytes"] == 50_020
    assert [place.name, 100_000] in steps["listdir"]["entries"]
    assert steps["open"]["error"]["status"] == 2
    assert "QQQQ" not in recorder.path.read_text()


def test_a_read_that_the_server_refuses_is_written(fake: Any, recorder: Recorder, tmp_path: Path) -> None:
    (tmp_path / "busy").write_bytes(bytes(100_000))
    fake.faults(status=4)  # FAILURE: all that a server says of a locked file
    busy = RecordedHost(fake.server.config(), recorder)
    with busy.sftp() as sftp:
        file = sftp.open(str(tmp_path / "busy"))
        with pytest.raises(RemoteFileError):
            file.read_into(8192, memoryview(bytearray(1000)))
    busy.close()
    (refusal,) = (step for step in only(recorder).steps if step["op"] == "read")
    assert (refusal["error"]["class"], refusal["error"]["status"], refusal["length"]) == ("RemoteFileError", 4, 1000)


def test_base64_is_shown_decoded_and_a_uuid_is_not_taken_for_it(host: RecordedHost, recorder: Recorder) -> None:
    script = base64.b64encode("Get-VM -Name 'wéb' | Select State".encode("utf-16-le")).decode()
    answer = base64.encodebytes(json.dumps({"name": "web", "password": "canary", "text": "x" * 100}).encode())
    host.run_line(f"cat; true -EncodedCommand {script}", input=b"@@B\r\n" + answer.replace(b"\n", b"\r\n") + b"@@E\r\n")
    host.run(["true", "uuid=11111111-1111-4111-8111-111111111111"])
    recorder.close()
    sent, ended, plain, _ = (json.loads(line) for line in recorder.path.read_text().splitlines()[1:5])
    assert sent["command_decoded"] == ["Get-VM -Name 'wéb' | Select State"]
    (shown,) = sent["stdin_decoded"]
    assert json.loads(shown) == {"name": "web", "password": "REMOVED-password-1", "text": "x" * 100}
    assert ended["stdout_decoded"] == [shown]
    assert ended["stdout"].startswith("@@B\r\n")
    assert ended["stdout"].endswith("\r\n@@E\r\n")
    assert "command_decoded" not in plain


SECRETS = {
    "argument": "canary-argument-01",
    "option": "canary-option-02",
    "url": "canary-url-03",
    "encoded": "canary-encoded-04",
    "typed": "canary-typed-05",
    "environment": "canary-environment-06",
    "output": "canary-output-07",
    "json": "canary-json-08",
    "error output": "canary-stderr-09",
    "header": "canary-header-10",
    "private key": "canary-privatekey-11",
    "stdin": "canary-stdin-12",
    "known": "canary-known-13",
    "path": "canary-path-14",
    "stream": "canary-stream-15",
    "error": "canary-error-16",
}


@pytest.mark.slow
def test_no_canary_is_in_a_transcript(shared_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    s = SECRETS
    monkeypatch.setenv("VSPHERE_PASSWORD", s["environment"])
    recorder = Recorder.open(tmp_path / "t", verb="sync", typed=["tokvm", "sync", f"xenserver://root:{s['typed']}@xen1"])
    recorder.hide(s["known"])
    host = RecordedHost(shared_server.config(), recorder)
    script = base64.b64encode(f"Connect -Password '{s['encoded']}'".encode("utf-16-le")).decode()
    host.run(["true", f"device-config:chappassword={s['argument']} x", "-pw", s["option"], f"https://a:{s['url']}@h/"])
    host.run(["true", "powershell", "-EncodedCommand", script])
    said = f"password: {s['output']}\n{json.dumps({'Token': s['json']})}\nplain {s['environment']} and {s['known']}\n"
    loud = f"Authorization: Basic {s['header']}\nlogin failed: password='{s['error output']}'\n"
    key = f"-----BEGIN PRIVATE KEY-----\n{s['private key']}\n-----END PRIVATE KEY-----\n"
    (tmp_path / "said").write_text(said + key)
    (tmp_path / "loud").write_text(loud)
    done = host.run_line(f"cat {tmp_path}/said; cat {tmp_path}/loud >&2; cat >/dev/null", input=f"secret={s['stdin']}".encode())
    assert all(s[name].encode() in done.stdout for name in ("output", "json", "environment", "known", "private key"))
    stream = host.stream(f"true token={s['stream']}; cat {tmp_path}/loud >&2")
    drain(stream)
    stream.finish()
    stream.close()
    with pytest.raises(RemoteFileError), host.sftp() as sftp:
        sftp.open(f"/missing?token={s['path']}")
    host.close()
    recorder.close(ConnectionLost(f"it said password={s['error']}", where=host.where))
    text = recorder.path.read_text()
    assert len(s) >= 12
    assert [name for name, secret in s.items() if secret in text] == []
    assert s["encoded"] not in base64.b64decode(shlex.split(read_transcript(recorder.path).commands[1])[-1]).decode("utf-16-le")
    assert text.count("REMOVED-") >= len(s) - 1, "the encoded one is removed inside of its base64"


@pytest.mark.slow
def test_a_large_answer_is_cut_at_a_blank_with_its_length_and_hash(host: RecordedHost, recorder: Recorder) -> None:
    done = host.run(["seq", "400000"])
    found = only(recorder)
    assert found.end is not None
    assert found.end["stdout_cut"] == {"bytes": len(done.stdout), "sha256": hashlib.sha256(done.stdout).hexdigest()}
    assert len(found.stdout) <= recording.KEPT
    assert done.text.startswith(found.stdout)
    assert found.stdout.endswith("\n")


def test_directory_and_file_are_ours_alone(recorder: Recorder) -> None:
    assert stat.S_IMODE(recorder.path.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(recorder.path.stat().st_mode) == 0o600
    second = Recorder.open(recorder.path.parent, verb="check")
    second.close()
    assert second.path != recorder.path
    assert recorder.path.name.endswith("Z-check.jsonl")


def test_a_link_a_file_and_a_place_for_all_are_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    for name, says in {
        "link": "symbolic link",
        "dangling": "symbolic link",
        "file": "cannot be written",
        "file/below": "cannot be written",
        "open": "others could write",
    }.items():
        with pytest.raises(UsageError, match=says):
            Recorder.open(tmp_path / name, verb="ls")
    assert list((tmp_path / "real").iterdir()) == []
    assert not (tmp_path / "nowhere").exists()


def test_a_link_in_the_file_s_place_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock:
        @staticmethod
        def now(_zone: object) -> Any:
            return datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)

    monkeypatch.setattr(recording, "datetime", Clock)
    (tmp_path / "t").mkdir(mode=0o700)
    (tmp_path / "t" / "20260102T030405Z-ls.jsonl").symlink_to(tmp_path / "victim")
    made = Recorder.open(tmp_path / "t", verb="ls")
    made.close()
    assert made.path.name == "20260102T030405Z-ls-2.jsonl"
    assert not (tmp_path / "victim").exists()


def test_a_full_disk_costs_one_warning_and_no_half_line(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recorder.sent(Kind.COMMAND, "h", "first").ended(code=0)
    wait_for(lambda: recorder.path.read_text().count("\n") == 3)
    write = os.write

    def full(fd: int, data: Any) -> int:
        if len(data) < 30:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(fd, data[:20])  # room for a little

    with monkeypatch.context() as patched, caplog.at_level(logging.WARNING):
        patched.setattr(os, "write", full)
        for number in range(50):
            recorder.sent(Kind.COMMAND, "h", f"command {number}").ended(code=0)
        recorder.close()
    assert [record.getMessage() for record in caplog.records if "No space left" in record.getMessage()]
    assert len(caplog.records) == 1
    found = read_transcript(recorder.path)
    assert not found.torn
    assert found.commands[0] == "first"


@pytest.mark.parametrize(("more", "says"), [(0, "was not written within"), (100, "too slow for what there is to write")])
def test_a_disk_that_hangs_stops_nobody(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, more: int, says: str
) -> None:
    hanging, release = threading.Event(), threading.Event()

    def hang(_fd: int, data: Any) -> int:
        hanging.set()
        release.wait(20)
        return len(data)

    monkeypatch.setattr(os, "write", hang)
    monkeypatch.setattr(recording, "_CLOSE_S", 0.1)
    monkeypatch.setattr(recording, "_WAITING_LIMIT", 100_000)
    recorder.sent(Kind.COMMAND, "h", "first").ended(code=0)
    assert hanging.wait(5)
    for _ in range(more):
        recorder.sent(Kind.COMMAND, "h", "x" * 10_000).ended(code=0)
    recorder.close()
    release.set()
    assert len(caplog.records) == 1
    assert says in caplog.records[0].getMessage()
    assert "the run goes on without it" in caplog.records[0].getMessage()


def test_a_machine_without_room_begins_without_a_transcript(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(_fd: int, _data: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        with recording.recording(tmp_path / "t", verb="cutover") as made:
            assert made is None
    assert len(caplog.records) == 1
    assert list((tmp_path / "t").iterdir()) == []


@pytest.mark.slow
def test_a_kill_leaves_whole_lines_and_what_was_under_way(tmp_path: Path) -> None:
    script = f"""
import time
from pathlib import Path
from tokvm.remote.recording import Kind, Recorder
recorder = Recorder.open(Path({str(tmp_path / "t")!r}), verb="cutover")
for number in range(200):
    recorder.sent(Kind.COMMAND, "h", f"command {{number}}").ended(code=0, stdout=b"x" * 3000)
recorder.sent(Kind.COMMAND, "h", "xe vm-shutdown uuid=x")
print("under way", flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == b"under way\n"
        (path,) = (tmp_path / "t").iterdir()
        wait_for(lambda: b"vm-shutdown" in path.read_bytes())
        run.send_signal(signal.SIGKILL)
    found = read_transcript(path)
    assert len(found.exchanges) == 201
    assert found.exchanges[-1].command == "xe vm-shutdown uuid=x"
    assert found.exchanges[-1].end is None
    assert found.end is None
    with path.open("ab") as file:
        file.write(b'{"event":"sen')
    assert read_transcript(path).torn


def test_threads_write_into_one_transcript(recorder: Recorder) -> None:
    def work(name: int) -> None:
        for number in range(50):
            recorder.sent(Kind.COMMAND, "h", f"{name} {number}").ended(code=name, stdout=b"y" * 500)

    threads = [threading.Thread(target=work, args=(name,)) for name in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = read(recorder)
    assert len(found.exchanges) == 400
    assert all(one.code == int(one.command.split()[0]) for one in found.exchanges)
    assert found.end is not None


def test_a_defect_in_the_cleaning_writes_nothing_uncleaned(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_text: str) -> str:
        raise ValueError("a defect")

    monkeypatch.setattr(recorder, "_scrub", broken)
    recorder.sent(Kind.COMMAND, "h", quote(["x", "unclean"])).ended(code=0)
    recorder.close()
    assert "unclean" not in recorder.path.read_text()
    assert len(caplog.records) == 1


BEGIN = '{"event":"begin","format":1}\n'
NONE = ["", "[]\n", '{"event":"sent"}\n', '{"event":"begin","format":2}\n', BEGIN + '{"event":"ended","n":1}\n']


@pytest.mark.parametrize("text", [*NONE, BEGIN + '{"event":"end"}\n{"event":"end"}\n'])
def test_what_is_no_transcript_is_not_read_as_one(tmp_path: Path, text: str) -> None:
    (tmp_path / "x").write_text(text)
    with pytest.raises((ValueError, TypeError)):
        read_transcript(tmp_path / "x")


def wait_for(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)
