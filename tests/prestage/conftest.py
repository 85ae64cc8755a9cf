"""Guests that are folder trees, under each shell, and a real sshd whose login is in one of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.prestage.guest_tree import SHELLS, GuestTree, make_toolbox

from tokvm.remote.ssh import SshConfig, SshHost
from tokvm.testing.sshd import Sshd

MakeGuest = Callable[..., GuestTree]


@pytest.fixture(scope="session")
def toolboxes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By shell; those that this machine has."""
    there = [shell for shell in SHELLS if shutil.which(shell)]
    return {shell: make_toolbox(tmp_path_factory.mktemp("tools") / shell, shell) for shell in there}


@pytest.fixture(params=SHELLS)
def make_guest(request: pytest.FixtureRequest, toolboxes: dict[str, Path], tmp_path: Path) -> MakeGuest:
    """`make_guest(generator)`, once a test, under each shell."""
    if request.param not in toolboxes:
        pytest.skip(f"{request.param} is not installed")

    def make(generator: str = "initramfs-tools") -> GuestTree:
        return GuestTree.make(toolboxes[request.param], tmp_path / "guest", generator)

    return make


@pytest.fixture
def guest(make_guest: MakeGuest) -> GuestTree:
    return make_guest()


@pytest.fixture
def dash_guest(toolboxes: dict[str, Path], tmp_path: Path) -> GuestTree:
    """Under one shell, whose own tools can be replaced by stand-ins (busybox' shell prefers its applets)."""
    return GuestTree.make(toolboxes["dash"], tmp_path / "guest")


@pytest.fixture(scope="session")
def shared_sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    folder = tmp_path_factory.mktemp("sshd")
    with Sshd(folder, forced_command=["/bin/sh", str(folder / "login")]) as sshd:
        yield sshd


@pytest.fixture
def logs_into(shared_sshd: Sshd) -> Iterator[Callable[[GuestTree | str], SshHost]]:
    """A host whose login is in this guest; or is a script of its own."""
    hosts: list[SshHost] = []

    def login(guest: GuestTree | str) -> SshHost:
        (shared_sshd.folder / "login").write_text(guest if isinstance(guest, str) else guest.login)
        config = SshConfig.parse(shared_sshd.netloc, config_file=str(shared_sshd.config_file))
        hosts.append(SshHost(config))
        return hosts[-1]

    yield login
    for host in hosts:
        host.close()
