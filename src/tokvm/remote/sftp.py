"""placeholder"""

from __future__ import annotations
from tokvm.remote.process import Child
from tokvm.remote.ssh_config import SshConfig


class SftpClient:
    def __init__(self, child: Child, config: SshConfig, *, deadline_s: float) -> None:
        self.child = child
