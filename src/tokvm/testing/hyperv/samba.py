"""A real SMB server on loopback: Debian's smbd as a private instance, with a user database, shares and a port of its own.

    folder/  smb.conf  private/ lock/ state/ cache/ run/  users  smbd.log  smbd.pid

Nothing of the machine's own Samba is read or written. smbd changes its user, so this needs root (`unavailable` says so).
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from tokvm.testing import pids

USER = "Administrator"
PASSWORD = "pa ß'w\"ord$(x)"
START_TIMEOUT_S = 15.0


def unavailable() -> str:
    """Why there can be no Samba here; "" when there can."""
    if shutil.which("smbd", path=_PATH) is None or shutil.which("pdbedit", path=_PATH) is None:
        return "smbd is not installed (Debian: samba)"
    return "" if os.geteuid() == 0 else "smbd needs root"


_PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


class Samba:
    """shares: name → folder. settings: more of smb.conf's [global], the last word for a name."""

    def __init__(self, folder: Path, shares: Mapping[str, Path], settings: Mapping[str, str] | None = None) -> None:
        self.folder = folder.absolute()
        self.host = "127.0.0.1"
        self._shares = dict(shares)
        self._settings = dict(settings or {})
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0

    def start(self) -> Self:
        for name in ("private", "lock", "state", "cache", "run"):
            (self.folder / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        self.port = self.port or _free_port(self.host)
        (self.folder / "users").write_text(f'root = "{USER}"\n')
        (self.folder / "smb.conf").write_text(self._config(), encoding="utf-8")
        secret = f"{PASSWORD}\n{PASSWORD}\n".encode()
        subprocess.run([*self._argv("pdbedit"), "-a", "-u", "root", "-t"], input=secret, capture_output=True, check=True)
        log = (self.folder / "smbd.out").open("wb")
        argv = [*self._argv("smbd"), "--foreground", "--no-process-group"]
        self._process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        log.close()
        self._await()
        return self

    def stop(self) -> None:
        """Kill it and every connection."""
        if self._process is not None:
            pids.kill_tree(self._process.pid)
            self._process.wait()
            self._process = None

    def cut_connections(self) -> int:
        """Kill what serves connections but not the listener. Returns how many processes."""
        return self._signal(signal.SIGKILL)

    def freeze_connections(self) -> int:
        return self._signal(signal.SIGSTOP)

    def thaw_connections(self) -> int:
        return self._signal(signal.SIGCONT)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def _signal(self, number: signal.Signals) -> int:
        """Those that hold a connection to our port: smbd has other children as well."""
        assert self._process is not None
        family = [pid for pid in pids.descendants(self._process.pid) if _serves(pid, self.port)]
        for pid in family:
            pids.kill(pid, number)
        return len(family)

    def _argv(self, program: str) -> list[str]:
        return [shutil.which(program, path=_PATH) or program, f"--configfile={self.folder / 'smb.conf'}"]

    def _config(self) -> str:
        settings = {
            "workgroup": "WINHOST",
            "netbios name": "HV1",
            "server role": "standalone server",
            "smb ports": str(self.port),
            "interfaces": "lo",
            "bind interfaces only": "yes",
            "disable netbios": "yes",
            "load printers": "no",
            "disable spoolss": "yes",
            "private dir": str(self.folder / "private"),
            "lock directory": str(self.folder / "lock"),
            "state directory": str(self.folder / "state"),
            "cache directory": str(self.folder / "cache"),
            "pid directory": str(self.folder / "run"),
            "ncalrpc dir": str(self.folder / "run" / "ncalrpc"),
            "passdb backend": f"tdbsam:{self.folder / 'private' / 'passdb.tdb'}",
            "username map": str(self.folder / "users"),
            "log file": str(self.folder / "smbd.log"),
            "server min protocol": "SMB3_00",
            "map to guest": "never",
            **self._settings,
        }
        parts = ["[global]", *(f"{name} = {value}" for name, value in settings.items())]
        for name, path in self._shares.items():
            parts += [f"[{name}]", f"path = {path}", "read only = no"]
        return "\n".join([*parts, ""])

    def _await(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and self._process is not None and self._process.poll() is None:
            try:
                socket.create_connection((self.host, self.port), timeout=1).close()
            except OSError:
                time.sleep(0.05)
            else:
                return
        self.stop()
        raise RuntimeError(f"smbd did not start: {(self.folder / 'smbd.out').read_text(errors='replace')[-1500:]}")


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _serves(pid: int, port: int) -> bool:
    """It has an established connection whose local port is this (/proc/net/tcp, state 01)."""
    wanted = {
        line.split()[9]
        for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]
        if line.split()[3] == "01" and int(line.split()[1].partition(":")[2], 16) == port
    }
    found = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.add(str(link.readlink()))
        except OSError:
            continue
    return any(f"socket:[{inode}]" in found for inode in wanted)
