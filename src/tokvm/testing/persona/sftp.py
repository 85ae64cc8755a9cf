"""A played host's sftp-server, as far as reading goes: SFTP v3 on stdin and stdout.

A file that somebody has locked is `Failure` (4), not a word more: SFTP has no code for it. Opening for anything but reading is
a violation: nobody has to write on a source. Settings: SftpSettings, in STATE_DIR/sftp.json, read by each session.
"""

from __future__ import annotations

import json
import os
import random
import select
import struct
from typing import Any, NoReturn

from tokvm.testing.persona import holders
from tokvm.testing.persona.sftp_settings import SftpSettings
from tokvm.testing.persona.store import Store

LIMITS = b"limits@openssh.com"
LARGEST_REQUEST = 256 << 10
OK, EOF, NO_SUCH_FILE, DENIED, FAILURE, UNSUPPORTED = 0, 1, 2, 3, 4, 8
(
    INIT, VERSION, OPEN, CLOSE, READ, WRITE, LSTAT, FSTAT, OPENDIR, READDIR, REALPATH, STAT, STATUS, HANDLE, DATA, NAME, ATTRS,
    EXTENDED, EXTENDED_REPLY,
) = (1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 16, 17, 101, 102, 103, 104, 105, 200, 201)  # fmt: skip
READ_ONLY = 1


class Locked(OSError):
    """Somebody has the file to himself."""


class Forbidden(Exception):
    """A request that only a defect sends."""


class SftpServer:
    """Each host says where its files are (`find`), who may open them (`open_file`), and what it tells of them."""

    def __init__(self, store: Store[Any]) -> None:
        self.store = store
        self.settings: SftpSettings = json.loads(self.store.path("sftp.json").read_text())
        self.files: dict[bytes, int] = {}
        self.lists: dict[bytes, list[str]] = {}
        self.opened = 0
        self.sent = 0
        self.pending = bytearray()
        self.holder = holders.this_process()

    # What differs from host to host

    def find(self, raw: bytes) -> str:
        """The file here that the client calls so; FileNotFoundError."""
        raise NotImplementedError

    def open_file(self, raw: bytes, handle: str) -> tuple[str, int | None]:
        """(the host's name of the file, what it is opened as), noted in `holder` under the host's lock; None: it is locked."""
        raise NotImplementedError

    def real_path(self, raw: bytes) -> bytes:
        return raw

    def names_in(self, raw: bytes) -> list[str]:
        return sorted(os.listdir(self.find(raw)))  # noqa: PTH208

    def attributes(self, said: os.stat_result) -> bytes:
        raise NotImplementedError

    # What is the same for all

    def serve(self) -> None:
        """Until the client hangs up. What is open then stays on record: see holders."""
        holders.note(self.store, self.holder)
        try:
            while waiting := self._requests():
                if self.settings["shuffle"]:
                    random.shuffle(waiting)
                for request in waiting:
                    self._answer(request)
        except BrokenPipeError:
            pass
        if not self.holder["paths"]:
            holders.forget(self.store, os.getpid())

    def _requests(self) -> list[bytes]:
        """All that are there, at least one; none at the end."""
        found: list[bytes] = []
        while True:
            while len(self.pending) >= 4 and len(self.pending) >= 4 + (size := int.from_bytes(self.pending[:4], "big")):
                found.append(bytes(self.pending[4 : 4 + size]))
                del self.pending[: 4 + size]
            patience = None if not found else 0.002 if self.settings["shuffle"] else 0.0
            if not select.select([0], [], [], patience)[0]:
                return found
            piece = os.read(0, 1 << 20)
            if not piece:
                return found
            self.pending += piece

    def _answer(self, request: bytes) -> None:
        if request[0] == INIT:
            known = _string(LIMITS) + _string(b"1") if self.settings["limits"] else b""
            self._out(VERSION, struct.pack(">I", 3) + known)
            return
        number = int.from_bytes(request[1:5], "big")
        code, text = UNSUPPORTED, "Operation unsupported"
        try:
            if self._act(request[0], number, request[5:]):
                return
        except Locked:
            code, text = FAILURE, "Failure"
        except (FileNotFoundError, NotADirectoryError):
            code, text = NO_SUCH_FILE, "No such file or directory"
        except Forbidden as error:
            self.store.append("violations", {"command": f"sftp request {request[0]}", "why": str(error)})
            code, text = DENIED, "Permission denied"
        except (OSError, KeyError):
            code, text = FAILURE, "Failure"
        self._status(number, code, text)

    def _act(self, kind: int, number: int, body: bytes) -> bool:
        """Answer; False for what nobody knows."""
        size = int.from_bytes(body[:4], "big")
        text, rest = body[4 : 4 + size], body[4 + size :]
        match kind:
            case 3:
                self._open(number, text, int.from_bytes(rest[:4], "big"))
            case 4:
                self._close(number, text)
            case 5:
                self._read(number, text, *struct.unpack(">QI", rest))
            case 7 | 17:
                self._out(ATTRS, struct.pack(">I", number) + self.attributes(os.stat(self.find(text))))  # noqa: PTH116
            case 8:
                self._out(ATTRS, struct.pack(">I", number) + self.attributes(os.fstat(self.files[text])))
            case 11:
                self._open_folder(number, text)
            case 12:
                self._list(number, text)
            case 16:
                path = _string(self.real_path(text))
                self._out(NAME, struct.pack(">II", number, 1) + path + path + bytes(4))
            case 200 if text == LIMITS and self.settings["limits"]:
                cap = self.settings["cap"]
                self._out(EXTENDED_REPLY, struct.pack(">IQQQQ", number, LARGEST_REQUEST, cap, LARGEST_REQUEST, 100))
            case 6 | 9 | 10 | 13 | 14 | 15 | 18 | 19 | 20:
                raise Forbidden("something on the host would be changed")
            case _:
                return False
        return True

    def _open(self, number: int, raw: bytes, flags: int) -> None:
        if flags != READ_ONLY:
            raise Forbidden(f"{raw!r} opened with flags {flags:#x}")
        handle = self._next_handle()
        name, opened = self.open_file(raw, handle.decode())
        self.store.append("commands.log", {"sftp": name, "pid": os.getpid(), "refused": opened is None})
        if opened is None:
            raise Locked
        self.files[handle] = opened
        self._out(HANDLE, struct.pack(">I", number) + _string(handle))

    def hold(self, handle: str, name: str) -> None:
        """From now on this session holds the file; called under the host's lock."""
        self.holder["paths"][handle] = name
        holders.note(self.store, self.holder)

    def _close(self, number: int, handle: bytes) -> None:
        if self.lists.pop(handle, None) is None:
            os.close(self.files.pop(handle))
            del self.holder["paths"][handle.decode()]
            with self.store.locked():
                holders.note(self.store, self.holder)
        self._status(number, OK, "Success")

    def _read(self, number: int, handle: bytes, offset: int, length: int) -> None:
        data = os.pread(self.files[handle], min(length, self.settings["cap"]), offset)
        if not data:
            self._status(number, EOF, "End of file")
            return
        self.sent += len(data)
        if 0 <= self.settings["die_after"] < self.sent:
            os._exit(1)
        if 0 <= self.settings["freeze_after"] < self.sent:
            _wait_for_hangup()
        self._out(DATA, struct.pack(">II", number, len(data)) + data)

    def _open_folder(self, number: int, raw: bytes) -> None:
        handle = self._next_handle()
        self.lists[handle] = [".", "..", *self.names_in(raw)]
        self._out(HANDLE, struct.pack(">I", number) + _string(handle))

    def _list(self, number: int, handle: bytes) -> None:
        names, self.lists[handle] = self.lists[handle], []
        if not names:
            self._status(number, EOF, "End of file")
            return
        rows = b"".join(_string(name) + _string(name) + bytes(4) for name in map(os.fsencode, names))
        self._out(NAME, struct.pack(">II", number, len(names)) + rows)

    def _next_handle(self) -> bytes:
        self.opened += 1
        return b"%d" % self.opened

    def _status(self, number: int, code: int, text: str) -> None:
        self._out(STATUS, struct.pack(">II", number, code) + _string(text.encode()) + bytes(4))

    def _out(self, kind: int, body: bytes) -> None:
        data = memoryview(struct.pack(">IB", len(body) + 1, kind) + body)
        while data:
            data = data[os.write(1, data) :]


def _string(raw: bytes) -> bytes:
    return len(raw).to_bytes(4, "big") + raw


def packed_attributes(said: os.stat_result, *, owner: int, mode: int) -> bytes:
    """Size, owner and group, mode, times."""
    times = int(said.st_atime) & 0xFFFF_FFFF, int(said.st_mtime) & 0xFFFF_FFFF
    return struct.pack(">IQIIIII", 0xF, said.st_size, owner, owner, mode, *times)


def _wait_for_hangup() -> NoReturn:
    """Nothing more is said; what comes is read and forgotten, until the client goes."""
    while os.read(0, 1 << 16):
        pass
    raise BrokenPipeError
