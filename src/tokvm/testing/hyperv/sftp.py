"""Win32-OpenSSH's sftp-server, as far as reading goes: SFTP v3 on stdin and stdout.

A READ brings at most 100 KiB. A file that somebody has open without sharing is `Failure` (4), not a word more. Opening for
anything but reading is a violation: nobody has to write on a source. Settings: state.SftpSettings, in STATE_DIR/sftp.json.
"""

from __future__ import annotations

import json
import os
import random
import select
import stat as modes
import struct
import time
from typing import NoReturn

from tokvm.testing import pids
from tokvm.testing.hyperv import handles, paths
from tokvm.testing.hyperv.paths import key
from tokvm.testing.hyperv.state import SftpSettings, State, Store
from tokvm.testing.hyperv.vmms import Vmms, with_state

LIMITS = b"limits@openssh.com"
LARGEST_REQUEST = 256 << 10
OK, EOF, NO_SUCH_FILE, DENIED, FAILURE, UNSUPPORTED = 0, 1, 2, 3, 4, 8
(
    INIT, VERSION, OPEN, CLOSE, READ, WRITE, LSTAT, FSTAT, OPENDIR, READDIR, REALPATH, STAT, STATUS, HANDLE, DATA, NAME, ATTRS,
    EXTENDED, EXTENDED_REPLY,
) = (1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 16, 17, 101, 102, 103, 104, 105, 200, 201)  # fmt: skip
READ_ONLY = 1


class SharingViolation(OSError):
    """Somebody has the file open."""


class Forbidden(Exception):
    """A request that only a defect sends."""


class SftpServer:
    def __init__(self, vmms: Vmms) -> None:
        self.vmms = vmms
        self.store: Store = vmms.store
        self.settings: SftpSettings = json.loads(self.store.path("sftp.json").read_text())
        self.files: dict[bytes, int] = {}
        self.lists: dict[bytes, list[str]] = {}
        self.opened = 0
        self.sent = 0
        self.pending = bytearray()
        tick = pids.start_tick(os.getpid()) or 0
        self.holder = handles.Holder(pid=os.getpid(), tick=tick, started=time.time(), paths={})

    def serve(self) -> None:
        """Until the client hangs up. What is open then stays on record: see handles."""
        handles.note(self.store, self.holder)
        try:
            while waiting := self._requests():
                if self.settings["shuffle"]:
                    random.shuffle(waiting)
                for request in waiting:
                    self._answer(request)
        except BrokenPipeError:
            pass
        if not self.holder["paths"]:
            handles.forget(self.store, os.getpid())

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
        except SharingViolation:
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
                self._out(ATTRS, struct.pack(">I", number) + _attributes(os.stat(self._find(text))))  # noqa: PTH116
            case 8:
                self._out(ATTRS, struct.pack(">I", number) + _attributes(os.fstat(self.files[text])))
            case 11:
                self._open_folder(number, text)
            case 12:
                self._list(number, text)
            case 16:
                self._out(NAME, struct.pack(">II", number, 1) + _string(text) + _string(text) + bytes(4))
            case 200 if text == LIMITS and self.settings["limits"]:
                cap = self.settings["cap"]
                self._out(EXTENDED_REPLY, struct.pack(">IQQQQ", number, LARGEST_REQUEST, cap, LARGEST_REQUEST, 100))
            case 6 | 9 | 10 | 13 | 14 | 15 | 18 | 19 | 20:
                raise Forbidden("something on the host would be changed")
            case _:
                return False
        return True

    def _find(self, raw: bytes) -> str:
        return str(paths.find(self.store.folder, paths.from_sftp(raw)))

    def _open(self, number: int, raw: bytes, flags: int) -> None:
        if flags != READ_ONLY:
            raise Forbidden(f"{raw!r} opened with flags {flags:#x}")
        windows = paths.from_sftp(raw)
        handle = self._next_handle()
        refused: list[str] = []

        def act(state: State) -> None:
            if state["options"]["locks"] and key(windows) in handles.locked(state):
                refused.append(windows)
                return
            self.files[handle] = os.open(paths.find(self.store.folder, windows), os.O_RDONLY)
            self.holder["paths"][handle.decode()] = windows
            handles.note(self.store, self.holder)

        with_state(self.vmms, act)
        self.store.append("commands.log", {"sftp": windows, "pid": os.getpid(), "refused": bool(refused)})
        if refused:
            raise SharingViolation
        self._out(HANDLE, struct.pack(">I", number) + _string(handle))

    def _close(self, number: int, handle: bytes) -> None:
        if self.lists.pop(handle, None) is None:
            os.close(self.files.pop(handle))
            del self.holder["paths"][handle.decode()]
            with self.store.locked():
                handles.note(self.store, self.holder)
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
        self.lists[handle] = [".", "..", *sorted(os.listdir(self._find(raw)))]  # noqa: PTH208
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


def _attributes(said: os.stat_result) -> bytes:
    """Windows has no owners' numbers and no modes; Win32-OpenSSH makes them up."""
    mode = (modes.S_IFDIR | 0o777) if modes.S_ISDIR(said.st_mode) else (modes.S_IFREG | 0o666)
    return struct.pack(
        ">IQIIIII", 0xF, said.st_size, 0, 0, mode, int(said.st_atime) & 0xFFFF_FFFF, int(said.st_mtime) & 0xFFFF_FFFF
    )


def _wait_for_hangup() -> NoReturn:
    """Nothing more is said; what comes is read and forgotten, until the client goes."""
    while os.read(0, 1 << 16):
        pass
    raise BrokenPipeError
