"""Win32-OpenSSH's sftp-server: a READ brings at most 100 KiB, names are the same in any case, and what a VM or a merge has open
is not shared with anybody."""

from __future__ import annotations

import os
import stat as modes

from tokvm.testing.hyperv import handles, paths
from tokvm.testing.hyperv.paths import key
from tokvm.testing.hyperv.state import State
from tokvm.testing.hyperv.vmms import Vmms, with_state
from tokvm.testing.persona import sftp
from tokvm.testing.persona.sftp import packed_attributes


class SftpServer(sftp.SftpServer):
    def __init__(self, vmms: Vmms) -> None:
        super().__init__(vmms.store)
        self.vmms = vmms

    def find(self, raw: bytes) -> str:
        return str(paths.find(self.store.folder, paths.from_sftp(raw)))

    def open_file(self, raw: bytes, handle: str) -> tuple[str, int | None]:
        windows = paths.from_sftp(raw)
        opened: list[int] = []

        def act(state: State) -> None:
            if not state["options"]["locks"] or key(windows) not in handles.locked(state):
                opened.append(os.open(paths.find(self.store.folder, windows), os.O_RDONLY))
                self.hold(handle, windows)

        with_state(self.vmms, act)
        return windows, opened[0] if opened else None

    def attributes(self, said: os.stat_result) -> bytes:
        """Windows has no owners' numbers and no modes; Win32-OpenSSH makes them up."""
        mode = (modes.S_IFDIR | 0o777) if modes.S_ISDIR(said.st_mode) else (modes.S_IFREG | 0o666)
        return packed_attributes(said, owner=0, mode=mode)
