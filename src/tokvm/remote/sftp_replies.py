"""What a reply means: the one that was expected, the server's refusal, or no SFTP at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import ClassVar

from tokvm.core.errors import SourceError
from tokvm.remote.errors import last_line
from tokvm.remote.sftp_pipe import Pending
from tokvm.remote.sftp_wire import Attributes, Body, Kind, Status, WireError

_LONGEST_HANDLE = 256


class RemoteFileError(SourceError):
    """The server refused something about one file. `status` is SFTP's own code; FAILURE is all it says for a locked file."""

    meaning: ClassVar[str] = "the source's SFTP server refused a file; its own words are shown"

    def __init__(self, what: str, *, status: int, where: str, fix: str = "") -> None:
        super().__init__(what, where=where, fix=fix)
        self.status = status


@contextlib.contextmanager
def protocol(where: str) -> Iterator[None]:
    """A reply that cannot be taken apart is the source's error."""
    try:
        yield
    except WireError as exc:
        raise SourceError(f"this is not the SFTP protocol: {exc}", where=where) from exc


def expect(reply: Pending, kind: Kind, *, where: str) -> Body:
    """The reply's body if it is of this kind; else the refusal."""
    if reply.kind == kind:
        return Body(reply.body)
    raise refusal(reply, where=where)


def handle_of(reply: Pending, *, where: str) -> bytes:
    body = expect(reply, Kind.HANDLE, where=where)
    with protocol(where):
        handle = body.string()
        if len(handle) > _LONGEST_HANDLE:
            raise WireError(f"a handle of {len(handle)} bytes")
        return handle


def attributes_of(reply: Pending, *, where: str) -> Attributes:
    body = expect(reply, Kind.ATTRS, where=where)
    with protocol(where):
        return body.attributes()


def is_eof(reply: Pending) -> bool:
    return reply.kind == Kind.STATUS and reply.body[:4] == Status.EOF.to_bytes(4, "big")


def refusal(reply: Pending, *, where: str) -> SourceError:
    """The error that a STATUS means; any other kind of reply was not due."""
    if reply.kind != Kind.STATUS:
        return SourceError(f"this is not the SFTP protocol: a reply of kind {reply.kind} was not due", where=where)
    body = Body(reply.body)
    with protocol(where):
        code = body.u32()
        said = last_line(body.string()) if body.left else ""
    match code:
        case Status.NO_SUCH_FILE:
            what, fix = "there is no such file", ""
        case Status.PERMISSION_DENIED:
            what, fix = "the server may not read it", "log in as a user who may, or change the file's mode"
        case Status.FAILURE:
            what, fix = "the server says only that it failed", "on a hypervisor: is the file locked by a running VM?"
        case _:
            what, fix = f"the server refused with status {code}", ""
    return RemoteFileError(f"{what} ({said})" if said else what, status=code, where=where, fix=fix)
