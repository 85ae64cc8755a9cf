"""A stand-in for SshHost whose answers are written down: state that reads answer from, and scripts for what goes wrong."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence

import pytest

from tokvm.core.errors import ConnectionLost
from tokvm.images.base import ByteStream
from tokvm.remote.process import Completed
from tokvm.remote.ssh import RemoteCommandError
from tokvm.sources.xenserver import power, snapshots, xe
from tokvm.sources.xenserver.source import XenServerSource
from tokvm.sources.xenserver.xe import DIVIDER

VM = "11111111-1111-4111-8111-111111111111"
DISK = "dddddddd-0000-4000-8000-000000000000"
OTHER_DISK = "dddddddd-0000-4000-8000-000000000001"
SNAPSHOT = "55555555-0000-4000-8000-000000000001"
FROZEN = "ffffffff-0000-4000-8000-000000000000"
SR = "aaaaaaaa-0000-4000-8000-000000000000"

Words = tuple[str, ...]
Answer = str | Exception | Callable[[Words], str]


def refusal(stderr: str, code: int = 1) -> RemoteCommandError:
    return RemoteCommandError("xe …", Completed(code, b"", stderr.encode()), where="ssh://root@xen")


UUID_INVALID = "The uuid you supplied was invalid.\ntype: VM\nuuid: x"
VDI_IN_USE = "This operation cannot be performed because this VDI is in use by some other operation\nvdi: x\noperation: destroy"
LOST = ConnectionLost("the connection broke", where="ssh://root@xen")


class ScriptedHost:
    """`script` holds answers for the exact words, used up one by one; then `actions` by command name; then the tables."""

    where = "ssh://root@xen"

    def __init__(self) -> None:
        self.log: list[Words] = []
        self.script: dict[Words, list[Answer]] = {}
        self.actions: dict[str, Callable[[Words], str]] = {}
        self.values: dict[tuple[str, str], str] = {}
        self.maps: dict[str, dict[str, str]] = {"other-config": {}, "blocked-operations": {}}
        self.tables: dict[Words, list[dict[str, str]]] = {}
        self.closed = False

    def run(self, args: Sequence[str], *, timeout_s: float = 60.0, check: bool = True) -> Completed:
        assert args[0] == "xe"
        assert timeout_s > 0
        words = tuple(args[1:])
        self.log.append(words)
        return Completed(0, (self._answer(words) + "\n").encode("utf-8", "surrogateescape"), b"")

    def run_line(self, command: str, *, timeout_s: float = 60.0, check: bool = True) -> Completed:
        """A batch: what fails has an exit code and no answer; a connection that breaks takes all of it down."""
        output = b""
        for one in command.split(f"; {DIVIDER}")[:-1]:
            try:
                output += self.run(shlex.split(one.removeprefix("; ")), timeout_s=timeout_s).stdout + b"\0" + b"0" + b"\0"
            except RemoteCommandError as failed:
                output += b"\0%d\0" % failed.code
        return Completed(0, output, b"")

    def _answer(self, words: Words) -> str:
        waiting = self.script.get(words)
        if waiting:
            answer = waiting.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer if isinstance(answer, str) else answer(words)
        if words[0] in self.actions:
            return self.actions[words[0]](words)
        if words[-1] == "--minimal":
            column = words[-2].removeprefix("params=")
            return ",".join(_escape(row[column]) for row in self.tables[words[:-2]])
        return self._param(words)

    def _param(self, words: Words) -> str:
        uuid = words[1].removeprefix("uuid=")
        match words[0], words[2:]:
            case "vm-param-get", (name, key):
                found = self.maps[name.removeprefix("param-name=")].get(key.removeprefix("param-key="))
                if found is None:
                    raise refusal(f"Error: Key {key} not found in map")
                return found
            case "vm-param-remove", (name, key):
                self.maps[name.removeprefix("param-name=")].pop(key.removeprefix("param-key="), None)
                return ""
            case "vm-param-set", (assignment,):
                name, _, value = assignment.partition("=")
                if ":" in name:
                    self.maps[name.split(":")[0]][name.split(":")[1]] = value
                else:
                    self.values[uuid, name] = value
                return ""
            case "vm-param-add", (name, assignment):
                key, _, value = assignment.partition("=")
                if key in self.maps[name.removeprefix("param-name=")]:
                    raise refusal("You tried to add a key-value pair to a map, but that key is already there.")
                self.maps[name.removeprefix("param-name=")][key] = value
                return ""
            case (("vm-param-get" | "vdi-param-get" | "sr-param-get"), (name,)):
                if (uuid, name.removeprefix("param-name=")) not in self.values:
                    raise refusal(UUID_INVALID)
                return self.values[uuid, name.removeprefix("param-name=")]
        raise AssertionError(f"nothing is scripted for {words}")

    def stream(self, command: str, *, first_byte_s: float = 0.0) -> ByteStream:
        raise AssertionError(f"no stream was expected: {command}")

    def fingerprint(self) -> str:
        return "SHA256:x (ED25519)"

    def close(self) -> None:
        self.closed = True

    def sent(self, name: str) -> list[Words]:
        """The commands with this name, in order."""
        return [words for words in self.log if words[0] == name]

    def set_vm(self, uuid: str = VM, **changed: str) -> None:
        """Parameters of a VM, `_` for `-`."""
        for name, value in changed.items():
            self.values[uuid, name.replace("_", "-")] = value


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace(",", "\\,")


def add_disk(host: ScriptedHost, *, vm: str = VM, vdi: str = DISK, userdevice: str = "0", **changed: str) -> None:
    """A VBD of `vm` and its VDI."""
    rows = host.tables.setdefault(("vbd-list", f"vm-uuid={vm}", "type=Disk"), [])
    number = sum(len(rows) for rows in host.tables.values())
    row = {"uuid": f"bbbbbbbb-0000-4000-8000-{number:012d}", "userdevice": userdevice, "device": "", "bootable": "true"}
    rows.append({**row, "vdi-uuid": vdi, "mode": "RW", "currently-attached": "true", **changed})
    values = {"virtual-size": "1048576", "sr-uuid": SR, "name-label": "disk", "sharable": "false", "sm-config": ""}
    for name, value in {**values, "snapshot-of": "<not in database>"}.items():
        host.values.setdefault((vdi, name), value)


def make_vm(host: ScriptedHost) -> None:
    """A running HVM guest with nothing special about it."""
    host.set_vm(
        name_label="web",
        name_description="",
        power_state="running",
        VCPUs_max="2",
        memory_static_max="1073741824",
        HVM_boot_policy="BIOS order",
        HVM_boot_params="order: cd; firmware: bios",
        platform="device-model: qemu-upstream-compat; acpi: 1",
        PV_bootloader="",
        ha_restart_priority="",
        current_operations="",
        dom_id="7",
    )
    listing = ("vm-list", "is-control-domain=false", "is-a-template=false", "is-a-snapshot=false")
    host.tables[listing] = [{"uuid": VM, "name-label": "web", "power-state": "running"}]
    host.tables["vif-list", f"vm-uuid={VM}"] = [
        {"uuid": SR, "device": "0", "MAC": "02:16:3E:AA:00:01", "network-name-label": "LAN"}
    ]
    host.tables["vtpm-list", f"vm-uuid={VM}"] = []
    host.tables["snapshot-list", f"snapshot-of={VM}"] = []
    for name, value in {
        "type": "ext",
        "name-label": "local",
        "physical-size": "1000000000",
        "physical-utilisation": "0",
    }.items():
        host.values[SR, name] = value


def add_snapshot(host: ScriptedHost, mark: str, *, uuid: str = SNAPSHOT, frozen: str = FROZEN, disk: str = DISK) -> None:
    host.tables["snapshot-list", f"snapshot-of={VM}"].append({"uuid": uuid, "name-label": mark})
    add_disk(host, vm=uuid, vdi=frozen)
    host.values[frozen, "snapshot-of"] = disk


@pytest.fixture
def host() -> ScriptedHost:
    scripted = ScriptedHost()
    make_vm(scripted)
    add_disk(scripted)
    return scripted


@pytest.fixture
def source(host: ScriptedHost, monkeypatch: pytest.MonkeyPatch) -> Iterator[XenServerSource]:
    for module, name, value in (
        (power, "POLL_S", 0.01),
        (snapshots, "POLL_S", 0.01),
        (xe, "_TABLE_WAIT_S", 0.0),
        (snapshots, "LANDING_S", 0.5),
        (snapshots, "BUSY_S", 0.2),
        (power, "FORCED_S", 0.3),
        (power, "START_S", 0.3),
    ):
        monkeypatch.setattr(module, name, value)
    made = XenServerSource(host)
    yield made
    made.close()
