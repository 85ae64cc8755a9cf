"""What may reach ssh's command line, and what always does."""

from __future__ import annotations

import dataclasses
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokvm.core.errors import UsageError
from tokvm.remote.ssh import SshConfig, quote
from tokvm.remote.ssh_config import command_bytes, option_value

ANYTHING = st.binary(max_size=40).map(lambda raw: raw.replace(b"\0", b"").decode("utf-8", "surrogateescape"))


@pytest.mark.parametrize(
    ("netloc", "user", "host", "port"),
    [
        ("xen1", None, "xen1", None),
        ("root@xen1", "root", "xen1", None),
        ("root@xen1.example.org:2222", "root", "xen1.example.org", 2222),
        ("10.0.0.1:22", None, "10.0.0.1", 22),
        ("root@[fe80::1]:22", "root", "fe80::1", 22),
        ("[::1]", None, "::1", None),
        ("_u.s-er@_h", "_u.s-er", "_h", None),
    ],
)
def test_a_place_is_taken_apart(netloc: str, user: str | None, host: str, port: int | None) -> None:
    config = SshConfig.parse(netloc)
    assert (config.user, config.host, config.port) == (user, host, port)
    assert config.where.startswith("ssh://")


@pytest.mark.parametrize(
    "netloc",
    [
        "",
        "-oProxyCommand=touch /tmp/pwned",
        "-h",
        "root@-oProxyCommand=x",
        "-l@host",
        "ro ot@host",
        "root@ho st",
        "root@host:",
        "root@host:0",
        "root@host:65536",
        "root@host:٢٢",
        "root@host:22:23",
        "root@host/path",
        "a@b@c",
        "@host",
        "root@",
        "root@$(id)",
        "root@`id`",
        "root@ho\nst",
        "root@host\n",
        "root\n@host",
        "[::1",
        "::1",
        "[-oProxyCommand=x]",
        "root@%h",
        "root@höst",
        "r@" + "h" * 300,
    ],
)
def test_what_is_no_place_is_refused_before_ssh_runs(netloc: str) -> None:
    with pytest.raises(UsageError):
        SshConfig.parse(netloc)


@given(st.text(max_size=30))
def test_whatever_is_accepted_holds_no_option(text: str) -> None:
    try:
        config = SshConfig.parse(text)
    except UsageError:
        return
    for part in (config.host, config.user or "x"):
        assert part.isascii()
        assert part[0] != "-"
        assert not set(part) & set(" \t\n'\"$`\\;&|<>(){}*?!~#=/%@")


def test_a_config_is_checked_however_it_is_made() -> None:
    good = SshConfig.parse("root@host")
    for change in ({"host": "-x"}, {"user": "-x"}, {"port": 0}, {"options": ("ProxyCommand",)}, {"options": ("A=b\nC=d",)}):
        with pytest.raises(UsageError):
            dataclasses.replace(good, **change)


def test_the_policy_is_strict_unless_told() -> None:
    arguments = SshConfig.parse("root@host", options=("StrictHostKeyChecking=no",)).arguments()
    assert arguments.index("StrictHostKeyChecking=yes") < arguments.index("StrictHostKeyChecking=no")  # the first one wins
    assert "BatchMode=yes" in arguments
    assert "-F" not in arguments
    assert "StrictHostKeyChecking=accept-new" in SshConfig.parse("host", accept_new_host_key=True).arguments()


@pytest.mark.parametrize(
    "name", ["plain", "with space", 'quo"te', "back\\slash", "per%cent", "%h", "$HOME", "ünï", "a'b", "#x"]
)
def test_ssh_reads_paths_as_they_are(tmp_path: Path, name: str) -> None:
    config = SshConfig.parse("host", known_hosts=str(tmp_path / name), identity=str(tmp_path / name), config_file="/dev/null")
    shown = subprocess.run(["ssh", "-G", *config.arguments(), "--", "host"], capture_output=True, check=True, text=True).stdout
    assert f"userknownhostsfile {tmp_path / name}\n" in shown
    assert f"identityfile {tmp_path / name}\n".replace("%", "%%") in shown  # shown before ssh expands it
    assert "globalknownhostsfile /dev/null\n" in shown


def test_a_path_that_ssh_would_expand_is_refused() -> None:
    for path in ("/a/${HOME}/x", "/a\nb"):
        with pytest.raises(UsageError):
            option_value(path)


@pytest.mark.parametrize("shell", [["dash"], ["bash"], ["busybox", "ash"]])
@settings(max_examples=40, deadline=None)
@given(args=st.lists(ANYTHING, max_size=6))
@pytest.mark.slow
def test_quoted_arguments_come_out_of_a_shell_byte_for_byte(shell: list[str], args: list[str]) -> None:
    line = command_bytes(quote(["printf", "[%s]", "x", *args]))
    done = subprocess.run([*shell, "-c", line], capture_output=True, check=True)
    assert done.stdout == b"".join(b"[" + command_bytes(arg) + b"]" for arg in ["x", *args])


def test_no_argument_can_hold_nul() -> None:
    with pytest.raises(UsageError):
        quote(["a\0b"])


def test_the_first_word_is_a_command_and_no_assignment() -> None:
    assert quote(["a=b", "c=d"]) == "'a=b' c=d"
    assert quote(["xe", "vm-list", "uuid=x"]) == "xe vm-list uuid=x"
