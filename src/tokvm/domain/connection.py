"""A connection to libvirt that outlives libvirtd's restarts; its errors arrive as DomainError.

python3-libvirt comes from the distribution and fits its libvirt, so it is imported only when a libvirt is needed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

from tokvm.core.errors import DomainError

log = logging.getLogger(__name__)


def load_libvirt() -> ModuleType:
    """The binding, silenced: it would print each error to stderr besides raising it."""
    try:
        import libvirt
    except ImportError as exc:
        raise DomainError(
            "the Python binding of libvirt is not installed",
            where="libvirt",
            fix="install python3-libvirt, and make the venv with `/usr/bin/python3 -m venv --system-site-packages`",
        ) from exc
    libvirt.registerErrorHandler(_swallow, None)
    module: ModuleType = libvirt
    return module


def _swallow(_context: object, _error: object) -> None:
    """libvirt's own error printer, replaced."""


class Connection:
    """`uri` as libvirt takes it (`qemu:///system`, `qemu+ssh://root@host/system`). Connects when first asked something: copying
    disks needs no libvirt."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._handle: Any = None

    def __repr__(self) -> str:
        return f"Connection({self.uri!r})"

    @property
    def libvirt(self) -> ModuleType:
        return load_libvirt()

    @property
    def is_local(self) -> bool:
        """True when libvirt sees the same files, devices and KVM as this process."""
        return not urlsplit(self.uri).netloc

    def handle(self) -> Any:
        """The open virConnect; opened again when libvirtd has gone away in between, which only a call can tell."""
        if self._handle is not None:
            try:
                self._handle.getLibVersion()
            except self.libvirt.libvirtError as exc:
                log.info("%s: connecting again (%s)", self.uri, exc)
                self._handle = None
        if self._handle is None:
            fix = "start libvirtd (`systemctl start libvirtd`), join the group libvirt, or give another --libvirt URI"
            with self.translated("cannot connect", where=self.uri, fix=fix):
                self._handle = self.libvirt.open(self.uri)
        return self._handle

    @contextmanager
    def translated(self, what: str, *, where: str, fix: str = "") -> Iterator[None]:
        """libvirt's errors inside become DomainError: `what`, then libvirt's own words."""
        try:
            yield
        except self.libvirt.libvirtError as exc:
            raise DomainError(f"{what}: {exc.get_error_message() or exc}", where=where, fix=fix) from exc

    def broke(self, failed: Any) -> bool:
        """Is this libvirtError about the way to libvirtd (which may have done what it was asked), not an answer of it?"""
        return failed.get_error_domain() in (self.libvirt.VIR_FROM_RPC, self.libvirt.VIR_FROM_REMOTE)

    def look_up(self, uuid: str) -> Any | None:
        """The virDomain, or None when there is none."""
        handle = self.handle()
        with self.translated("cannot look for the domain", where=f"{uuid} on {self.uri}"):
            try:
                return handle.lookupByUUIDString(uuid)
            except self.libvirt.libvirtError as exc:
                if exc.get_error_code() == self.libvirt.VIR_ERR_NO_DOMAIN:
                    return None
                raise

    def look_up_name(self, name: str) -> Any | None:
        """The virDomain of that name, or None."""
        handle = self.handle()
        with self.translated("cannot look for the domain", where=f"{name!r} on {self.uri}"):
            try:
                return handle.lookupByName(name)
            except self.libvirt.libvirtError as exc:
                if exc.get_error_code() == self.libvirt.VIR_ERR_NO_DOMAIN:
                    return None
                raise

    def close(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            try:
                handle.close()
            except self.libvirt.libvirtError as exc:
                log.debug("%s: closing: %s", self.uri, exc)
