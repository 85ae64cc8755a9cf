"""Where a password comes from, and that it is read from nowhere that others can read."""

from __future__ import annotations

import getpass
import sys
from pathlib import Path

import pytest

from tokvm.core.errors import UsageError
from tokvm.remote.passwords import VARIABLE, password_for


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)


def file_with(tmp_path: Path, raw: bytes, mode: int = 0o600) -> str:
    path = tmp_path / "password"
    path.write_bytes(raw)
    path.chmod(mode)
    return str(path)


@pytest.mark.parametrize("raw", [b" se cret ", b" se cret \n", b" se cret \r\nanother line\n"])
def test_it_is_the_first_line_of_its_file(tmp_path: Path, raw: bytes) -> None:
    assert password_for("root", file_with(tmp_path, raw)) == " se cret "


@pytest.mark.parametrize("raw", [b"", b"\nsecret\n", b"a\0b", b"\xff\xfe", b"x" * 5000])
def test_what_is_no_password_is_refused(tmp_path: Path, raw: bytes) -> None:
    with pytest.raises(UsageError, match="password"):
        password_for("root", file_with(tmp_path, raw))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o622])
def test_a_file_of_others_is_refused_with_what_to_do(tmp_path: Path, mode: int) -> None:
    file = file_with(tmp_path, b"secret", mode)
    with pytest.raises(UsageError) as refused:
        password_for("root", file)
    assert refused.value.fix == f"chmod 600 {file}"
    assert "secret" not in str(refused.value)


def test_a_file_that_went_says_what_a_later_command_can_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`cutover` has no --password-file; and another password is not sent instead of the one that was meant."""
    monkeypatch.setenv(VARIABLE, "another")
    with pytest.raises(UsageError) as refused:
        password_for("root", str(tmp_path / "gone"))
    assert "put the password there (mode 0600)" in refused.value.fix
    assert "tokvm sync" in refused.value.fix


def test_without_a_file_it_is_the_environment_s_or_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="no password for root"):
        password_for("root", None)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(getpass, "getpass", lambda _prompt, stream: "typed")
    assert password_for("root", None) == "typed"
    monkeypatch.setenv(VARIABLE, "secret")
    assert password_for("root", None) == "secret"
