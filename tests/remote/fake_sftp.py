"""An SFTP v3 server on stdin and stdout with faults, to be run as the subsystem of a real sshd.

fake_sftp.py FAULTS.json     read anew by each session

cap N          a READ brings at most N bytes             extensions false   no limits@openssh.com
limits N       what the limits reply says                shuffle true       replies in any order
stall_after N  bytes of DATA, then silence               die_after N        bytes of DATA, then exit 1
damage KIND    how the first READ's reply is broken      status CODE        every READ from byte 4096 on gets it
greeting TEXT  instead of the protocol                   version N          what VERSION says
"""

from __future__ import annotations

import json
import os
import random
import select
import struct
import sys
from pathlib import Path
from typing import Any

PARENT = os.getppid()


class Faulty:
    def __init__(self, faults: dict[str, Any]) -> None:
        self.faults = faults
        self.handles: dict[bytes, int] = {}
        self.sent = 0
        self.queue: list[bytes] = []
        self.pending = bytearray()

    def serve(self) -> None:
        if "greeting" in self.faults:
            self.write(self.faults["greeting"].encode())
        while self.fill():
            waiting = self.queue
            self.queue = []
            if self.faults.get("shuffle"):
                random.shuffle(waiting)
            for request in waiting:
                self.answer(request)

    def fill(self) -> bool:
        """Take whatever requests are there; wait a little so that shuffling has something to shuffle."""
        while True:
            while len(self.pending) >= 4 and len(self.pending) >= 4 + (size := struct.unpack_from(">I", self.pending)[0]):
                self.queue.append(bytes(self.pending[4 : 4 + size]))
                del self.pending[: 4 + size]
            patience = None if not self.queue else 0.002 if self.faults.get("shuffle") else 0.0
            if not select.select([0], [], [], patience)[0]:
                return True
            piece = os.read(0, 1 << 20)
            if not piece:
                return False
            self.pending += piece

    def write(self, data: bytes) -> None:
        while data:
            data = data[os.write(1, data) :]

    def out(self, kind: int, body: bytes) -> None:
        self.write(struct.pack(">IB", len(body) + 1, kind) + body)

    def status(self, number: int, code: int, text: str) -> None:
        said = text.encode()
        self.out(101, struct.pack(">III", number, code, len(said)) + said + bytes(4))

    def answer(self, request: bytes) -> None:
        kind = request[0]
        if kind == 1:
            name = b"limits@openssh.com"
            known = struct.pack(">I", len(name)) + name + struct.pack(">I", 1) + b"1"
            version = int(self.faults.get("version", 3))
            self.out(2, struct.pack(">I", version) + (known if self.faults.get("extensions", True) else b""))
            return
        (number,) = struct.unpack_from(">I", request, 1)
        try:
            self.act(kind, number, request)
        except FileNotFoundError:
            self.status(number, 2, "No such file")
        except PermissionError:
            self.status(number, 3, "Permission denied")
        except (OSError, KeyError):
            self.status(number, 4, "Failure")

    def act(self, kind: int, number: int, request: bytes) -> None:
        (size,) = struct.unpack_from(">I", request, 5)
        text = request[9 : 9 + size]
        rest = request[9 + size :]
        if kind == 3:
            handle = b"%d" % (len(self.handles) + 1)
            self.handles[handle] = os.open(text, os.O_RDONLY)
            self.out(102, struct.pack(">II", number, len(handle)) + handle)
        elif kind == 4:
            os.close(self.handles.pop(text))
            self.status(number, 0, "Success")
        elif kind == 5:
            self.read(number, text, *struct.unpack(">QI", rest))
        elif kind == 8:
            self.out(105, struct.pack(">IIQ", number, 1, os.fstat(self.handles[text]).st_size))
        elif kind == 11:
            self.out(102, struct.pack(">II", number, 3) + b"dir")
        elif kind == 12:
            self.out(104, struct.pack(">II", number, 0x7FFFFFFF) + bytes(64))
        elif kind == 200:
            limit = int(self.faults.get("limits", 262144))
            self.out(201, struct.pack(">IQQQQ", number, 262144, limit, limit, 100))
        else:
            self.status(number, 8, "Operation unsupported")

    def read(self, number: int, handle: bytes, offset: int, length: int) -> None:
        if "status" in self.faults and offset >= 4096:
            self.status(number, int(self.faults["status"]), "as told")
            return
        data = os.pread(self.handles[handle], min(length, int(self.faults.get("cap", 1 << 30))), offset)
        if not data:
            self.status(number, 1, "End of file")
            return
        self.sent += len(data)
        if self.sent > int(self.faults.get("die_after", 1 << 60)):
            sys.exit(1)
        if self.sent > int(self.faults.get("stall_after", 1 << 60)):
            while select.select([], [], [], 0.1) and os.getppid() == PARENT:
                pass
            sys.exit(1)
        head = struct.pack(">II", number, len(data))
        match self.faults.pop("damage", ""):
            case "oversize":
                self.write(struct.pack(">IB", 0x7FFFFFFF, 103) + head + data)
            case "undersize":
                self.write(struct.pack(">IB", 3, 103) + head + data)
            case "count":
                self.out(103, struct.pack(">II", number, len(data) - 1) + data)
            case "more":
                self.out(103, struct.pack(">II", number, length + 1) + bytes(length + 1))
            case "empty":
                self.out(103, struct.pack(">II", number, 0))
            case "twice":
                self.out(103, head + data)
                self.out(103, head + data)
            case "stranger":
                self.out(103, struct.pack(">II", number + 1000, len(data)) + data)
            case "kind":
                self.out(102, head + data)
            case _:
                self.out(103, head + data)


if __name__ == "__main__":
    Faulty(json.loads(Path(sys.argv[1]).read_text())).serve()
