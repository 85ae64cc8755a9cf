"""ESXi's sftp-server: OpenSSH's, on files of VMFS. What a VM has open for itself is `Failure`.

Files that no configuration and no snapshot lists, and anything that is no disk, are none of a reader's business: a violation.
"""

from __future__ import annotations

import os

from tokvm.testing.esxi import contract, locks, paths
from tokvm.testing.esxi.hostd import Hostd, with_state
from tokvm.testing.esxi.state import State
from tokvm.testing.persona import sftp
from tokvm.testing.persona.sftp import Forbidden, packed_attributes


class SftpServer(sftp.SftpServer):
    def __init__(self, hostd: Hostd) -> None:
        super().__init__(hostd.store)
        self.hostd = hostd

    def find(self, raw: bytes) -> str:
        path = paths.canonical(self.store.read(), os.fsdecode(raw))
        return str(paths.local(self.store.folder, path))

    def open_file(self, raw: bytes, handle: str) -> tuple[str, int | None]:
        opened: list[int] = []
        path = paths.canonical(self.store.read(), os.fsdecode(raw))
        here = paths.local(self.store.folder, path)

        def act(state: State) -> None:
            if path not in locks.locked(state):
                opened.append(os.open(here, os.O_RDONLY))
                self.hold(handle, path)

        with_state(self.hostd, act)
        if path not in locks.may_be_read(self.store.read()) and not _is_clone(path):
            self._forget(handle, opened)
            raise Forbidden(f"{path!r} is no file of a VM's disks")
        return path, opened[0] if opened else None

    def _forget(self, handle: str, opened: list[int]) -> None:
        for file in opened:
            os.close(file)
            del self.holder["paths"][handle]

    def real_path(self, raw: bytes) -> bytes:
        return b"/" if raw in (b"", b".") else raw

    def names_in(self, raw: bytes) -> list[str]:
        raise Forbidden(f"nobody lists {raw!r} by sftp")

    def attributes(self, said: os.stat_result) -> bytes:
        return packed_attributes(said, owner=0, mode=said.st_mode & ~0o077)


def _is_clone(path: str) -> bool:
    return paths.name_of(paths.folder_of(path)) == contract.CLONES and path.endswith(".vmdk")
