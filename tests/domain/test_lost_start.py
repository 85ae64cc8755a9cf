"""A start whose reply is lost may have run; one that libvirt refuses did not."""

from __future__ import annotations

from typing import Any

import pytest

from tokvm.core.errors import DomainError
from tokvm.domain.base import StartUnknown
from tokvm.domain.connection import Connection
from tokvm.domain.host import LibvirtHost

libvirt = pytest.importorskip("libvirt")
UUID = "5f1c2a52-0000-4000-8000-000000000001"


class Unstartable:
    """A virDomain whose start fails as told. `lands`: it runs afterwards all the same."""

    def __init__(self, code: int, area: int, *, lands: bool) -> None:
        self._error, self._lands, self._sent = (code, area), lands, False

    def create(self) -> None:
        self._sent = True
        failed = libvirt.libvirtError("start")
        failed.err = (*self._error, "its own words", 2, None, None, None, 0, 0)
        raise failed

    def isActive(self) -> bool:
        return self._sent and self._lands


def start(monkeypatch: pytest.MonkeyPatch, domain: Any) -> None:
    monkeypatch.setattr(Connection, "look_up", lambda _self, _uuid: domain)
    monkeypatch.setattr(LibvirtHost, "_refuse_stranger", lambda _self, _domain, _verb: None)
    LibvirtHost("test:///default").start(UUID)


@pytest.mark.parametrize("area", ["VIR_FROM_RPC", "VIR_FROM_REMOTE"])
def test_libvirt_going_away_is_no_refusal(monkeypatch: pytest.MonkeyPatch, area: str) -> None:
    code = libvirt.VIR_ERR_INTERNAL_ERROR  # "client socket is closed", "End of file while reading data"
    with pytest.raises(StartUnknown, match="its own words"):
        start(monkeypatch, Unstartable(code, getattr(libvirt, area), lands=False))


def test_qemu_failing_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DomainError, match="does not start: its own words") as refused:
        start(monkeypatch, Unstartable(libvirt.VIR_ERR_INTERNAL_ERROR, libvirt.VIR_FROM_QEMU, lands=False))
    assert not isinstance(refused.value, StartUnknown)


def test_a_domain_that_runs_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    domain = Unstartable(libvirt.VIR_ERR_OPERATION_INVALID, libvirt.VIR_FROM_QEMU, lands=True)
    start(monkeypatch, domain)
    assert domain.isActive()
