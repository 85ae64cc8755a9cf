"""A stand-in for a Hyper-V host at the seam of `powershell.Asking`: a VM whose state the scripts' answers come from, and
scripted answers for what goes wrong. And files over SFTP without SSH."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import cast
from uuid import UUID

from tokvm.core.errors import ConnectionLost, ImageError
from tokvm.core.units import GiB, MiB
from tokvm.remote.conversation import Conversation
from tokvm.remote.sftp import Attributes, RemoteFileError, SftpClient
from tokvm.sources.hyperv.faults import Failure, HyperVError, explain
from tokvm.sources.hyperv.powershell import Value
from tokvm.sources.hyperv.source import HyperVSource
from tokvm.testing.vhdx_writer import write_vhdx

VM = "11111111-1111-4111-8111-111111111111"
BASE_ID = "8a5a0c5f-0000-4000-8000-00000000000a"
KEY = f"SCSI:0:0:{BASE_ID}"
FOLDER = "C:\\VMs\\a b"
SLOT: Value = {"controller": "SCSI", "number": 0, "location": 0}
LOST = ConnectionLost("the connection broke", where="ssh://Administrator@hv1")
Answer = Value | Exception | Callable[[Value], Value]


def failure(
    error_id: str = "X", *, hresult: int = -2146233088, kind: str = "System.Exception", script: str = "x"
) -> HyperVError:
    return explain(Failure(kind, "Allgemeiner Fehler", hresult, error_id), script=script, where="ssh://Administrator@hv1")


IN_USE = failure(hresult=-2147024864, kind="System.IO.IOException")
GONE = failure("InvalidParameter,Microsoft.HyperV.PowerShell.Commands.GetVM")


def guid(number: int) -> str:
    return str(UUID(int=number, version=4))


class FakeShell:
    """`script` holds answers by script name, used up one by one; without one, `vm` answers."""

    where = "ssh://Administrator@hv1"

    def __init__(self) -> None:
        self.log: list[tuple[str, Value]] = []
        self.script: dict[str, list[Answer]] = {}
        self.vm = FakeVm()

    def ask(self, script: str, data: Value, *, timeout_s: float = 1.0) -> Value:
        return self.act(script, data, timeout_s=timeout_s)

    def act(self, script: str, data: Value, *, timeout_s: float = 1.0) -> Value:
        assert timeout_s > 0
        self.log.append((script, data))
        waiting = self.script.get(script)
        if waiting:
            answer = waiting.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer(data) if callable(answer) else answer
        assert data.get("vm", VM) == VM
        answered: Value = getattr(self.vm, {"list": "list_"}.get(script, script.replace("-", "_")))(data)
        return cast("Value", json.loads(json.dumps(answered)))

    def sent(self, name: str) -> list[Value]:
        return [data for script, data in self.log if script == name]


class FakeVm:
    """A running VM with one disk, and what each script does to it. Merges are over at once unless `merging`."""

    def __init__(self) -> None:
        self.state = 2
        self.operational = [2]
        self.uptime, self.now = 86400, 1_790_000_000
        self.notes = "a person's words\r\nin two lines"
        self.line: str | None = None
        self.switches: Value = {"checkpointType": "Production", "automaticCheckpoints": False, "autoStart": "StartIfRunning"}
        self.cluster: Value | None = None
        self.chain = [f"{FOLDER}\\d.vhdx"]  # base first
        self.checks: list[Value] = []
        self.merging = False
        self.obeys = True
        self.held: list[str] = []
        self.extra: Value = {}
        self.made = 0

    def _switches(self) -> Value:
        cluster = self.cluster
        return {**self.switches, "clustered": cluster is not None, "cluster": cluster}

    def power(self, _: Value) -> Value:
        known = {"state": self.state, "operational": self.operational, "status": "Normaler Betrieb"}
        return {**known, "uptime": self.uptime, "now": self.now, "record": self.line, **self._switches()}

    def record(self, data: Value) -> Value:
        swapped = self.line == data["expect"]
        if swapped:
            self.line = cast("str | None", data["write"])
        return {"swapped": swapped, "record": self.line, "now": self.now}

    def settings(self, data: Value) -> Value:
        self.switches |= {key: data[key] for key in self.switches if data.get(key) is not None}
        if self.cluster is not None:
            self.cluster |= {key: data[key] for key in ("priority", "restartAction") if data.get(key) is not None}
        return self._switches()

    def list_(self, _: Value) -> Value:
        return {"host": "HV1", "machines": [{"id": VM, "name": "web", "state": self.state}]}

    def _layer(self, index: int) -> Value:
        parent = self.chain[index - 1] if index else ""
        known: Value = {
            "path": self.chain[index],
            "parent": parent,
            "format": "VHDX",
            "size": 64 * MiB,
            "diskId": BASE_ID.upper(),
        }
        more: Value = {"type": "Dynamic", "fileSize": MiB, "logicalSector": 512, "physicalSector": 4096, "error": None}
        return {**known, **more}

    def disks(self) -> list[Value]:
        layers = [self._layer(index) for index in reversed(range(len(self.chain)))]
        return [{**SLOT, "path": self.chain[-1], "layers": layers}]

    def layers(self, _: Value) -> Value:
        return {"state": self.state, "operational": self.operational, "disks": self.disks(), "checkpoints": self.checks}

    def checkpoints(self, _: Value) -> Value:
        return {"checkpoints": self.checks}

    def freeze(self, name: str, kind: str = "Standard") -> Value:
        self.made += 1
        frozen = [{**SLOT, "path": self.chain[-1]}]
        made: Value = {"id": guid(self.made), "name": name, "type": kind, "parent": None, "disks": frozen}
        self.checks.append(made)
        self.chain.append(f"{FOLDER}\\d_{self.made}.avhdx")
        return made

    def checkpoint(self, data: Value) -> Value:
        kind = self.switches["checkpointType"]
        found = [one for one in self.checks if one["name"] == data["mark"]]
        if not found and (kind in cast("list[str]", data["types"]) or (self.state == 3 and kind != "Disabled")):
            found = [self.freeze(cast("str", data["mark"]))]
        automatic = self.switches["automaticCheckpoints"]
        return {"checkpointType": kind, "automaticCheckpoints": automatic, "state": self.state, "checkpoints": found}

    def remove_checkpoint(self, data: Value) -> Value:
        found = next((one for one in self.checks if one["id"] == data["id"]), None)
        if found is None:
            return {"found": False, "name": None, "removed": False}
        if found["name"] != data["mark"]:
            return {"found": True, "name": found["name"], "removed": False}
        self.checks.remove(found)
        if self.merging:
            self.operational = [2, 32772]
        else:
            self.merge(cast("str", cast("list[Value]", found["disks"])[0]["path"]))
        return {"found": True, "name": found["name"], "removed": True}

    def merge(self, frozen: str) -> None:
        """What lies above this file goes into it."""
        above = self.chain[self.chain.index(frozen) + 1]
        for one in self.checks:
            for disk in cast("list[Value]", one["disks"]):
                disk["path"] = frozen if disk["path"] == above else disk["path"]
        self.chain.remove(above)

    def shutdown(self, data: Value) -> Value:
        if data["ask"] and self.obeys:
            self.state = 3
        return {"answer": 0 if data["ask"] else None, "state": self.state}

    def turn_off(self, _: Value) -> Value:
        self.state = 3
        return {"state": 3}

    def start(self, _: Value) -> Value:
        self.state, self.uptime = 2, 0
        return {"state": 2}

    def evidence(self, _: Value) -> Value:
        held = [self.chain[-1]] if self.state != 3 else self.held
        files = [{"path": path, "free": path not in held, "hresult": -2147024864, "message": ""} for path in [self.chain[-1]]]
        return {"state": self.state, "operational": self.operational, "files": files}

    def leftovers(self, _: Value) -> Value:
        return {"processes": []}

    def inspect(self, _: Value) -> Value:
        known: Value = {
            "host": "HV1",
            "id": VM.upper(),
            "name": "web",
            "notes": self.notes if self.line is None else f"#tokvm {self.line}\n{self.notes}",
            "version": "9.0",
            "state": self.state,
            "operational": self.operational,
            "status": "Normaler Betrieb",
            "generation": 2,
            "processors": 2,
            "memory": {"startup": GiB, "dynamic": False, "maximum": 1 << 40},
            "replication": {"state": 0, "mode": 0},
            "firmware": {"secureBoot": "On", "bootDrive": {"number": 0, "location": 0}},
            "security": {"tpm": False, "shielded": False, "encryptedState": False},
            "disks": [
                {**disk, "passThrough": None, "shared": False, "volume": volume()}
                for disk in cast("tuple[Value]", self.disks())
            ],
            "nics": [nic()],
            "checkpoints": self.checks,
            "services": [{"component": "9F8233AC-BE49-4C79-8EE3-E7E1985B2077", "enabled": True, "status": 2}],
            **self._switches(),
        }
        if self.cluster is not None:
            known["cluster"] = {**self.cluster, "error": None}
        return copy.deepcopy(known | self.extra)


def volume(free: int = 1 << 40) -> Value:
    return {"id": "\\\\?\\Volume{1}\\", "fileSystem": "NTFS", "size": 1 << 41, "free": free}


def nic(mac: str = "00155D010101", **changed: object) -> Value:
    return {"id": "Microsoft:1", "name": "Netzwerkkarte", "mac": mac, "dynamic": True, "switch": "LAN", "vlan": None, **changed}


class FakeFile:
    """An open file of the fake server."""

    def __init__(self, server: FakeSftp, path: str) -> None:
        self._server = server
        self._path = path
        self.size = len(server.content(path))
        server.handles.append(path)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self._server.before_read(self._path, offset)
        data = self._server.content(self._path)[offset : offset + len(buffer)]
        if len(data) < len(buffer):
            raise ImageError("the file ends here", where=self._path)
        buffer[:] = data

    def close(self) -> None:
        self._server.handles.remove(self._path)


class FakeSftp:
    """The host's files in `folder`, which stands for FOLDER. `handles`: paths that are open now."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.handles: list[str] = []
        self.connections = 0
        self.before_read: Callable[[str, int], None] = lambda _path, _offset: None

    def local(self, path: str) -> Path:
        assert path.startswith("/C:/VMs/a b/"), path
        return self.folder / path.removeprefix("/C:/VMs/a b/")

    def content(self, path: str) -> bytes:
        try:
            return self.local(path).read_bytes()
        except FileNotFoundError as exc:
            raise RemoteFileError("there is no such file", status=2, where=path) from exc

    def sftp(self) -> SftpClient:
        self.connections += 1
        return cast("SftpClient", FakeClient(self))


class FakeClient:
    def __init__(self, server: FakeSftp) -> None:
        self._server = server
        self.read_size = 0
        self.closed = False

    def open(self, path: str) -> FakeFile:
        assert 0 < self.read_size <= 64 * 1024
        return FakeFile(self._server, path)

    def stat(self, path: str) -> Attributes:
        return Attributes(size=len(self._server.content(path)))

    def close(self) -> None:
        self.closed = True


class FakeHost:
    """What HyperVSource needs of SshHost, but for PowerShell."""

    where = "ssh://Administrator@hv1"

    def __init__(self, server: FakeSftp | None = None) -> None:
        self._server = server

    def sftp(self) -> SftpClient:
        assert self._server is not None, "no file was to be read"
        return self._server.sftp()

    def converse(self, command: str) -> Conversation:
        raise AssertionError(f"not through the shell: {command}")

    def fingerprint(self) -> str:
        return "SHA256:x (ED25519)"

    def close(self) -> None:
        """Nothing is open."""


def connect(shell: FakeShell, server: FakeSftp | None = None) -> HyperVSource:
    return HyperVSource(FakeHost(server), shell=shell)


def write_layer(folder: Path, name: str, number: int, runs: list[tuple[int, bytes]], *, parent: int | None = None) -> None:
    """Layer `number` of a disk of 64 MiB: its DataWriteGuid is UUID(int=number)."""
    write_vhdx(
        folder / name,
        size=64 * MiB,
        kind="dynamic" if parent is None else "differencing",
        data_write_guid=UUID(int=number),
        runs=runs,
        block_size=MiB,
        parent_linkage=None if parent is None else UUID(int=parent),
        locator=None if parent is None else {"relative_path": ".\\x.vhdx"},
    )
