"""Commands over the control connection of a real sshd."""

from __future__ import annotations

from tokvm.remote.ssh import SshHost


def test_a_command_answers_with_output_and_code(host: SshHost) -> None:
    done = host.run(["sh", "-c", "echo out; echo err >&2; exit 3"], check=False)
    assert (done.code, done.stdout, done.stderr) == (3, b"out\n", b"err\n")
