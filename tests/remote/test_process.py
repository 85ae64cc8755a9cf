"""Local programs: bounded, killed in time, and never left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tokvm.core.units import MiB
from tokvm.remote import process
from tokvm.remote.process import ProgramError, ProgramTimeout, Stdin, run, start, which

Eventually = Callable[..., None]


def alive(pid: int) -> bool:
    """False for a zombie too."""
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_program_is_fed_and_heard() -> None:
    done = run(["sh", "-c", "cat; echo err >&2; exit 3"], input=b"in\n", timeout_s=10, where="test")
    assert (done.code, done.stdout, done.stderr, done.text) == (3, b"in\n", b"err\n", "in\n")


def test_no_input_is_the_end_of_input() -> None:
    assert run(["cat"], timeout_s=10, where="test").stdout == b""
    assert run(["cat"], input=b"", timeout_s=10, where="test").stdout == b""


def test_a_signal_is_a_negative_code() -> None:
    assert run(["sh", "-c", "kill -TERM $$"], timeout_s=10, where="test").code == -signal.SIGTERM


def test_much_goes_both_ways_at_once() -> None:
    data = os.urandom(MiB) * 8
    assert run(["cat"], input=data, timeout_s=10, where="test").stdout == data


def test_a_program_that_does_not_read_its_input_is_no_error() -> None:
    assert run(["true"], input=bytes(8 * MiB), timeout_s=10, where="test").code == 0


def test_arguments_are_bytes_and_no_shell_sees_them() -> None:
    arguments: list[str | bytes] = ["$(id)", "a'b", "two\nlines", b"\xff\xfe", "-n", ""]
    done = run(["printf", "%s\\0", *arguments], timeout_s=10, where="test")
    assert done.stdout == b"$(id)\0a'b\0two\nlines\0\xff\xfe\0-n\0\0"


def test_env_adds_to_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLD", "old")
    assert run(["sh", "-c", 'echo "$OLD $NEW"'], timeout_s=10, where="test", env={"NEW": "new"}).text == "old new\n"


def test_at_the_deadline_it_is_killed_with_its_children(eventually: Eventually) -> None:
    began = time.monotonic()
    with pytest.raises(ProgramTimeout, match=r"within 0\.5 s") as caught:
        run(["sh", "-c", "sleep 1000 & echo $!; echo hm >&2; wait"], timeout_s=0.5, where="test")
    assert time.monotonic() - began < 3
    assert caught.value.stderr == b"hm\n"
    eventually(lambda: not alive(int(caught.value.stdout)))


def test_a_daemon_left_behind_does_not_hold_us_up(eventually: Eventually) -> None:
    began = time.monotonic()
    done = run(["sh", "-c", "sleep 1000 & echo $!"], timeout_s=10, where="test")
    daemon = int(done.stdout)
    try:
        assert time.monotonic() - began < 3
        assert alive(daemon)
    finally:
        os.kill(daemon, signal.SIGKILL)
    eventually(lambda: not alive(daemon))


def test_endless_output_is_an_error_and_not_memory() -> None:
    with pytest.raises(ProgramError, match="said more than"):
        run(["yes"], timeout_s=20, where="test")


def test_of_endless_complaints_the_last_are_kept() -> None:
    done = run(["sh", "-c", "head -c 5000000 /dev/zero >&2; printf last >&2"], timeout_s=20, where="test")
    assert len(done.stderr) == process.STDERR_KEPT
    assert done.stderr.endswith(b"last")


def test_a_missing_program_is_named_with_what_to_do() -> None:
    with pytest.raises(ProgramError, match="not found"):
        run(["no-such-program"], timeout_s=1, where="test")
    with pytest.raises(ProgramError) as caught:
        which("no-such-program", fix="apt install it")
    assert caught.value.fix == "apt install it"
    assert which("sh").endswith("/sh")


@pytest.mark.parametrize("argument", ["a\0b", "x" * 3 * MiB])
def test_what_cannot_be_an_argument_is_our_error(argument: str) -> None:
    with pytest.raises(ProgramError, match="could not be started"):
        run(["true", argument], timeout_s=1, where="test")


def test_a_child_is_a_pair_of_pipes() -> None:
    with start(["sh", "-c", "cat; echo bye >&2; exit 4"], where="test", stdin=Stdin.PIPE) as child:
        os.write(child.stdin, b"hello")
        child.close_stdin()
        assert os.read(child.stdout, 100) == b"hello"
        assert child.wait(5) == 4
        assert child.poll() == 4
        assert child.stderr_tail() == b"bye\n"


def test_closing_a_child_ends_it_and_its_group_and_leaks_nothing() -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        child = start(["sh", "-c", "sleep 1000 & echo $!; wait"], where="test", stdin=Stdin.PIPE)
        below = int(os.read(child.stdout, 100))
        child.close()
        child.close()
        assert not alive(child.pid)
        deadline = time.monotonic() + 5
        while alive(below) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not alive(below)
    assert len(list(Path("/proc/self/fd").iterdir())) <= before


def test_waiting_has_an_end_and_leaves_it_running() -> None:
    with start(["sleep", "1000"], where="test") as child:
        with pytest.raises(ProgramTimeout):
            child.wait(0.1)
        assert child.poll() is None
        child.terminate(timeout_s=5)
        assert child.poll() == -signal.SIGTERM


def test_a_child_outlives_the_thread_that_started_it() -> None:
    made: list[process.Child] = []
    thread = threading.Thread(target=lambda: made.append(start(["sleep", "1000"], where="test")))
    thread.start()
    thread.join()
    time.sleep(0.3)
    with made[0] as child:
        assert child.poll() is None


PARENT = """
    import threading, time
    from tokvm.remote.process import Stdin, start
    def work():
        child = start(["sleep", "1000"], where="test", stdin=Stdin.PIPE)
        print(child.pid, flush=True)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    time.sleep(1000)
"""


def test_a_child_dies_with_us_even_by_kill_9(eventually: Eventually) -> None:
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(PARENT)], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    with parent.stdout:
        child = int(parent.stdout.readline())
        assert alive(child)
        parent.kill()
        parent.wait()
    eventually(lambda: not alive(child))


def test_a_fork_of_ours_can_start_programs_too() -> None:
    run(["true"], timeout_s=5, where="test")
    script = """
        import os, warnings
        warnings.simplefilter("ignore")
        from tokvm.remote.process import run
        run(["true"], timeout_s=5, where="test")
        pid = os.fork()
        if pid == 0:
            os._exit(run(["sh", "-c", "exit 7"], timeout_s=5, where="test").code)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    """
    done = run([sys.executable, "-c", textwrap.dedent(script)], timeout_s=20, where="test")
    assert done.text == "7\n", done.stderr
