"""A stand-in for an ESXi host at the seam of SshHost: one VM whose state the answers come from, worded as real hosts print them
(7.0: unset fields are printed, strings are not escaped), and scripted answers for what goes wrong. Its files are real ones."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

from tokvm.core.errors import ConnectionLost, ImageError
from tokvm.core.units import MiB
from tokvm.remote.process import Completed
from tokvm.remote.sftp import Attributes, RemoteFileError, SftpClient
from tokvm.remote.sftp_wire import Status
from tokvm.sources.vmware.source import EsxSource
from tokvm.testing.sesparse_writer import write_sesparse
from tokvm.testing.vmdk_descriptor import Identity
from tokvm.testing.vmdk_flat_writer import write_flat

VM = "564d379a-5654-a8b9-daab-2ed352d83be0"
OTHER = "564d379a-5654-a8b9-daab-2ed352d83bff"
MOUNT = "/vmfs/volumes/4ee1d386-5b79612c-d9b1-1cc1de17e90e"
STORE = "Store [1]"
DIR = f"{MOUNT}/web"
KEY = f"scsi0:0:[{STORE}] web/web.vmdk"
SIZE = 32 * MiB
LOST = ConnectionLost("the connection broke", where="ssh://root@esx1")
CID = 0x1234_ABCD

Words = tuple[str, ...]
Said = tuple[int, str, str]
Answer = str | Said | Exception | Callable[[Words], "str | Said"]
_TAGGED = re.compile(r"(.*?); echo (tokvm-[0-9a-f]{16}) \$\?(?:; |\Z)", re.DOTALL)


def fault(name: str, message: str = "Something is wrong.", *, title: str = "") -> str:
    head = f"{title}\n" if title else ""
    return (
        f"{head}(vim.fault.{name}) {{\n   faultCause = (vmodl.MethodFault) null, \n   faultMessage = <unset>, \n"
        f'   msg = "{message}"\n}}\n'
    )


def printed(text: str) -> str:
    """A blank follows each comma at a line's end."""
    return text.replace(",\n", ", \n")


def escaped(text: str) -> str:
    """As .vmx and .vmsd have it."""
    return "".join(f"|{ord(sign):02X}" if sign in '"|' or sign < " " else sign for sign in text)


class FakeEsx:
    """Implements what EsxSource needs of SshHost. `script`: answers by verb (`snapshot.create`, `cat`, …), used up one by one;
    an exception there breaks the connection, before the command or, from a function, after it."""

    where = "ssh://root@esx1"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log: list[Words] = []
        self.lines: list[str] = []
        self.script: dict[str, list[Answer]] = {}
        self.vmid, self.uuid, self.name, self.annotation = 12, VM, "web", ""
        self.state, self.boot, self.question, self.tools = "poweredOn", "2026-10-04T19:00:52.000000Z", "", "guestToolsRunning"
        self.consolidation_needed, self.template, self.fault_tolerance = False, False, "notConfigured"
        self.guest_name = "web.example.org"
        self.chains: dict[str, list[str]] = {"scsi0:0": ["web.vmdk"]}  # top first
        self.backing: dict[str, str] = {}
        self.controller = ""
        self.devices = ""
        self.slot = 192
        self.settings: dict[str, str] = {}
        self.snapshots: list[tuple[int, str, dict[str, str]]] = []
        self.last_uid = 0
        self.needs_consolidate = False
        self.autostart: dict[str, str] | None = None
        self.vcenter = "<unset>"
        self.store_type, self.free = "VMFS-6", 1 << 40
        self.now = 1_790_000_000
        self.obeys = True
        self.tasks: dict[str, str] = {}
        self.texts: dict[str, str] = {}
        self.others: list[tuple[int, str, str]] = []  # Vmid, uuid, name of more VMs
        self.sftp_server = FakeSftp(self)
        self.processes: bool | None = None

    # ---- SshHost

    def run_line(self, command: str, *, timeout_s: float = 60.0, check: bool = True) -> Completed:
        assert timeout_s > 0
        assert not check
        self.lines.append(command)
        found = list(_TAGGED.finditer(command))
        if found:
            assert "".join(one[0] for one in found) == command
            output, errors = "", ""
            for one in found:
                code, said, wrong = self.answer(tuple(shlex.split(one[1])))
                output += f"{said}{one[2]} {code}\n"
                errors += wrong
            return _completed(0, output, errors)
        return _completed(*self._change(command))

    def sftp(self) -> SftpClient:
        return self.sftp_server.sftp()

    def fingerprint(self) -> str:
        return "SHA256:x (RSA)"

    def close(self) -> None:
        """Nothing is open."""

    # ---- commands

    def _change(self, line: str) -> Said:
        words = shlex.split(line)
        if words[:2] == ["set", "-C;"]:
            assert words[2:4] == ["printf", "%s"]
            return self._scripted(("claim",), lambda: self._make(words[4], words[5].removeprefix(">")))
        if words[:2] == ["printf", "%s"]:
            assert words[4:6] == ["&&", "mv"]
            return self._scripted(("write",), lambda: self._put(words[2], words[-1]))
        return self.answer(tuple(words))

    def answer(self, words: Words) -> Said:
        self.log.append(words)
        verb = words[1].partition("/")[2] if words[0] == "vim-cmd" else words[0]
        if words[0] == "esxcli":
            verb = words[2]
        if verb.startswith("autostartmanager/"):
            verb = verb.partition("/")[2]
        name = verb.replace(".", "_")
        return self._scripted((verb, *words[2:]), lambda: _said(getattr(self, f"do_{name}")(words)))

    def _scripted(self, words: Words, really: Callable[[], Said]) -> Said:
        waiting = self.script.get(words[0])
        if not waiting:
            return really()
        answer = waiting.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return _said(answer(words) if callable(answer) else answer)

    def sent(self, verb: str) -> list[Words]:
        return [words for words in self.log if verb in (words[0], words[1].partition("/")[2].rpartition("/")[2])]

    def after(self, verb: str, error: Exception) -> None:
        """The next `verb` is done, then the connection breaks."""

        def lost(words: Words) -> str:
            getattr(self, f"do_{verb.replace('.', '_')}")(("vim-cmd", f"vmsvc/{verb}", *words[1:]))
            raise error

        self.script.setdefault(verb, []).append(lost)

    # ---- reads

    def do_getallvms(self, _: Words) -> str:
        rows = [(self.vmid, self.name, f"[{STORE}] web/web.vmx", self.annotation)]
        rows += [(vmid, name, f"[{STORE}] {name}/{name}.vmx", "") for vmid, _, name in self.others]
        head = "Vmid      Name                File               Guest OS      Version   Annotation\n"
        return head + "".join(f"{n}     {name}   {path}   debian11_64Guest   vmx-19   {text}\n" for n, name, path, text in rows)

    def do_get_summary(self, words: Words) -> str:
        vmid = int(words[2])
        other = next(((uuid, name) for number, uuid, name in self.others if number == vmid), None)
        if other is not None:
            return self.summary(vmid, other[0], other[1], f"[{STORE}] {other[1]}/{other[1]}.vmx")
        if vmid != self.vmid:
            return fault("NotFound", f'Unable to find a VM corresponding to "{vmid}"')
        return self.summary(vmid, self.uuid, self.name, f"[{STORE}] web/web.vmx")

    def summary(self, vmid: int, uuid: str, name: str, vmx: str) -> str:
        question = f'(vim.vm.QuestionInfo) {{\n         id = "1", \n         text = "{self.question}"\n      }}'
        boot = f'"{self.boot}"' if self.state == "poweredOn" else "<unset>"
        return printed(f"""Listsummary:

(vim.vm.Summary) {{
   vm = 'vim.VirtualMachine:{vmid}',
   runtime = (vim.vm.RuntimeInfo) {{
      device = <unset>,
      host = 'vim.HostSystem:ha-host',
      connectionState = "connected",
      powerState = "{self.state}",
      faultToleranceState = "{self.fault_tolerance}",
      bootTime = {boot},
      question = {question if self.question else "(vim.vm.QuestionInfo) null"},
      memoryOverhead = 203325440,
      cleanPowerOff = <unset>,
      consolidationNeeded = {str(self.consolidation_needed).lower()},
   }},
   guest = (vim.vm.Summary.GuestSummary) {{
      guestId = <unset>,
      toolsRunningStatus = "{self.tools}",
      hostName = "{self.guest_name}",
      ipAddress = "192.0.2.31",
   }},
   config = (vim.vm.Summary.ConfigSummary) {{
      name = "{name}",
      template = {str(self.template).lower()},
      vmPathName = "{vmx}",
      memorySizeMB = 4096,
      uuid = "{uuid}",
      instanceUuid = "52021751-e075-9a50-934d-e23419b1a06f",
      annotation = "{self.annotation}",
      product = (vim.vApp.ProductInfo) null,
   }},
   overallStatus = "green",
   customValue = (vim.CustomFieldsManager.Value) [],
}}
""")

    def do_device_getdevices(self, _: Words) -> str:
        disks = "".join(self._disk(number, node, chain) for number, (node, chain) in enumerate(self.chains.items()))
        return printed(f"""Devices:

(vim.vm.VirtualHardware) {{
   numCPU = 2,
   numCoresPerSocket = 2,
   memoryMB = 4096,
   device = (vim.vm.device.VirtualDevice) [
      (vim.vm.device.VirtualIDEController) {{
         key = 200,
         backing = (vim.vm.device.VirtualDevice.BackingInfo) null,
         controllerKey = <unset>,
         busNumber = 0
      }},
      (vim.vm.device.ParaVirtualSCSIController) {{
         key = 1000,
         controllerKey = 100,
         unitNumber = 3,
         busNumber = 0,
         device = (int) [
            2000
         ],
         sharedBus = "{self.controller or "noSharing"}",
      }},
{disks}      (vim.vm.device.VirtualVmxnet3) {{
         key = 4000,
         deviceInfo = (vim.Description) {{
            label = "Network adapter 1",
            summary = "LAN, the "first""
         }},
         backing = (vim.vm.device.VirtualEthernetCard.NetworkBackingInfo) {{
            deviceName = "LAN, the "first"",
            network = 'vim.Network:HaNetwork-LAN',
         }},
         slotInfo = (vim.vm.device.VirtualDevice.PciBusSlotInfo) {{
            pciSlotNumber = {self.slot}
         }},
         addressType = "assigned",
         macAddress = "00:50:56:AA:BB:CC",
      }}{self.devices}
   ],
}}
""")

    def _disk(self, number: int, node: str, chain: Sequence[str]) -> str:
        bus, unit = (int(part) for part in node.removeprefix("scsi").split(":"))
        assert bus == 0
        nested = ""
        for depth in reversed(range(len(chain))):
            layer = "            " + "   " * depth
            parent = nested or "(vim.vm.device.VirtualDisk.FlatVer2BackingInfo) null"
            kind = "SeSparseBackingInfo" if depth < len(chain) - 1 else "FlatVer2BackingInfo"
            extra = self.backing.get(node, 'diskMode = "persistent", \nsharing = "sharingNone", ')
            nested = (
                f'(vim.vm.device.VirtualDisk.{kind}) {{\n{layer}fileName = "[{STORE}] web/{chain[depth]}", \n{layer}{extra}\n'
                f"{layer}parent = {parent}, \n{layer}}}"
            )
        return f"""      (vim.vm.device.VirtualDisk) {{
         key = {2000 + number},
         backing = {nested},
         controllerKey = 1000,
         unitNumber = {unit},
         capacityInKB = {SIZE // 1024},
      }},
"""

    def do_power_getstate(self, _: Words) -> str:
        said = {"poweredOn": "Powered on", "poweredOff": "Powered off", "suspended": "Suspended"}[self.state]
        return f"Retrieved runtime info\n{said}\n"

    def do_snapshot_get(self, _: Words) -> str:
        found, dashes = "Get Snapshot:\n", "--"
        for number, (uid, name, _frozen) in enumerate(self.snapshots):
            found += f"{dashes[2:]}|-{'CHILD' if number else 'ROOT'}\n"
            found += f"{dashes}Snapshot Name        : {name}\n{dashes}Snapshot Id        : {uid}\n"
            found += f"{dashes}Snapshot Desciption  : tokvm\n{dashes}Snapshot Created On  : 10/4/2026 19:0:52\n"
            found += f"{dashes}Snapshot State       : powered off\n"
            dashes += "--"
        return found

    def do_get_tasklist(self, _: Words) -> str:
        if not self.tasks:
            return "(ManagedObjectReference) []\n"
        listed = ", \n".join(f"   'vim.Task:{name}'" for name in self.tasks)
        return f"(ManagedObjectReference) [\n{listed}\n]\n"

    def do_task_info(self, words: Words) -> str:
        """A running task is over the second time it is looked at."""
        state, self.tasks[words[2]] = self.tasks[words[2]], "success"
        return f'(vim.TaskInfo) {{\n   key = "{words[2]}", \n   task = \'vim.Task:{words[2]}\', \n   state = "{state}"\n}}\n'

    def do_message(self, _: Words) -> str:
        return (
            f"Virtual machine message 3:\nmsg.uuid.altered:{self.question}\n   0. Cancel\n"
            if self.question
            else "No message.\n"
        )

    def do_get_autostartseq(self, _: Words) -> str:
        if self.autostart is None:
            return "(vim.host.AutoStartManager.AutoPowerInfo) [\n]\n"
        fields = ", \n".join(f"      {name} = {value}" for name, value in self.autostart.items())
        kind = "vim.host.AutoStartManager.AutoPowerInfo"
        return f"({kind}) [\n   ({kind}) {{\n      key = 'vim.VirtualMachine:{self.vmid}', \n{fields}\n   }}\n]\n"

    def do_hostsummary(self, _: Words) -> str:
        host = "host = 'vim.HostSystem:ha-host'"
        return f"Listsummary:\n\n(vim.host.Summary) {{\n   {host}, \n   managementServerIp = {self.vcenter}, \n}}\n"

    def do_vm(self, _: Words) -> str:
        running = self.state == "poweredOn" if self.processes is None else self.processes
        plain = self.uuid.replace("-", "")
        pairs = " ".join(plain[at : at + 2] for at in range(0, 16, 2)), " ".join(plain[at : at + 2] for at in range(16, 32, 2))
        row = {"ConfigFile": f"{DIR}/web.vmx", "DisplayName": "web & <co>", "UUID": "-".join(pairs), "WorldID": "2098"}
        return esxcli("VirtualMachine", [row] if running else [])

    def do_storage(self, _: Words) -> str:
        row = {
            "Free": str(self.free), "MountPoint": MOUNT, "Mounted": "true", "Size": str(1 << 42), "Type": self.store_type,
            "UUID": MOUNT.rpartition("/")[2], "VolumeName": STORE,
        }  # fmt: skip
        away = {**row, "MountPoint": "", "Mounted": "false", "VolumeName": "unplugged", "Size": "", "Free": ""}
        return esxcli("FilesystemVolume", [row, away])

    def do_date(self, _: Words) -> str:
        return f"{self.now}\n"

    def do_cat(self, words: Words) -> str | Said:
        path = words[1]
        if path == f"{DIR}/web.vmx":
            return self.vmx()
        if path == f"{DIR}/web.vmsd" and (self.snapshots or self.needs_consolidate):
            return self.vmsd()
        if path in self.texts:
            return self.texts[path]
        return 1, "", f"cat: can't open '{path}': No such file or directory\n"

    def do_ls(self, words: Words) -> str | Said:
        found = sorted(path.name for path in self.local(words[2]).glob("*"))
        return "".join(f"{name}\n" for name in found) if found else (1, "", f"ls: {words[2]}: No such file or directory\n")

    def do_dd(self, words: Words) -> Said:
        if words[1].removeprefix("if=") in self.sftp_server.locked:
            return 1, "", f"dd: can't open '{words[1][3:]}': Device or resource busy\n"
        return 0, "", "1+0 records in\n1+0 records out\n"

    def vmx(self) -> str:
        plain = self.uuid.replace("-", "")
        bios = " ".join(plain[at : at + 2] for at in range(0, 32, 2))
        said = {
            ".encoding": "UTF-8", "displayName": self.name, "annotation": self.annotation,
            "uuid.bios": f"{bios[:23]}-{bios[24:]}",
            "guestOS": "debian11-64", "virtualHW.version": "19", "ide0:0.present": "TRUE", "ide0:0.deviceType": "cdrom-image",
            "ide0:0.fileName": "/vmfs/volumes/x/install.iso",
        }  # fmt: skip
        for node, chain in self.chains.items():
            said |= {f"{node}.present": "TRUE", f"{node}.fileName": chain[0], f"{node}.deviceType": "scsi-hardDisk"}
        return "".join(f'{key} = "{escaped(value)}"\n' for key, value in (said | self.settings).items())

    def vmsd(self) -> str:
        said = {".encoding": "UTF-8", "snapshot.lastUID": str(self.last_uid), "snapshot.numSnapshots": str(len(self.snapshots))}
        if self.needs_consolidate:
            said["snapshot.needConsolidate"] = "TRUE"
        for number, (uid, name, frozen) in enumerate(self.snapshots):
            said |= {f"snapshot{number}.uid": str(uid), f"snapshot{number}.displayName": name}
            said[f"snapshot{number}.numDisks"] = str(len(frozen))
            for disk, (node, file) in enumerate(frozen.items()):
                said |= {f"snapshot{number}.disk{disk}.fileName": file, f"snapshot{number}.disk{disk}.node": node}
        return "".join(f'{key} = "{escaped(value)}"\n' for key, value in said.items())

    # ---- changes

    def do_snapshot_create(self, words: Words) -> str:
        assert words[4:] == ("tokvm", "0", "0")
        self.freeze(words[3])
        return "Create Snapshot:\n"

    def freeze(self, name: str) -> int:
        self.last_uid += 1
        self.snapshots.append((self.last_uid, name, {node: chain[0] for node, chain in self.chains.items()}))
        for chain in self.chains.values():
            stem = re.sub(r"(-[0-9]{6})?\.vmdk$", "", chain[-1])
            chain.insert(0, f"{stem}-{self.last_uid:06}.vmdk")
        return self.last_uid

    def do_snapshot_remove(self, words: Words) -> str:
        """The file that it froze takes in the layer above; whoever named that layer names this file then."""
        assert words[2] == str(self.vmid)
        uid = int(words[3])
        if uid not in {one for one, _, _ in self.snapshots}:
            return fault("NotFound", "Snapshot not found", title="Remove Snapshot:")
        number = next(at for at, (one, _, _) in enumerate(self.snapshots) if one == uid)
        _, _, frozen = self.snapshots.pop(number)
        for node, file in frozen.items():
            at = self.chains[node].index(file)
            child = self.chains[node][at - 1]
            self.chains[node].pop(at - 1)
            for _, _, others in self.snapshots:
                if others.get(node) == child:
                    others[node] = file
            if at == 1:
                self.chains[node][0] = file
        return "Remove Snapshot:\n"

    def do_power_shutdown(self, _: Words) -> str:
        if self.tools != "guestToolsRunning":
            return fault("ToolsUnavailable", "Cannot complete operation because VMware Tools is not running.")
        if self.obeys:
            self.state = "poweredOff"
        return ""

    def do_power_off(self, _: Words) -> str:
        if self.state != "poweredOn":
            return "Powering off VM:\n" + fault("InvalidPowerState", "in the current state (Powered off).")
        self.state = "poweredOff"
        return "Powering off VM:\n"

    def do_power_on(self, _: Words) -> str:
        if not self.question:
            self.state, self.boot = "poweredOn", "2026-10-05T08:00:00.000000Z"
        return "Powering on VM:\n"

    def do_update_autostartentry(self, words: Words) -> str:
        assert words[2:4] == ("--", str(self.vmid))
        names = ("startAction", "startDelay", "startOrder", "stopAction", "stopDelay", "waitForHeartbeat")
        numbers = {"startDelay", "startOrder", "stopDelay"}
        pairs = zip(names, words[4:], strict=True)
        self.autostart = {name: word if name in numbers else f'"{word}"' for name, word in pairs}
        return "Updated AutoStart entry.\n"

    def do_rm(self, words: Words) -> str:
        self.texts.pop(words[2], None)
        return ""

    def do_mkdir(self, words: Words) -> str:
        self.local(words[2]).mkdir(parents=True, exist_ok=True)
        return ""

    def do_rmdir(self, words: Words) -> str | Said:
        try:
            self.local(words[1]).rmdir()
        except OSError:
            return 1, "", "rmdir: Directory not empty\n"
        return ""

    def do_vmkfstools(self, words: Words) -> str | Said:
        if words[1] == "-U":
            stem = self.local(words[2])
            stem.unlink()
            stem.with_name(f"{stem.stem}-flat.vmdk").unlink()
            return ""
        assert words[1] == "-i"
        assert words[4:] == ("-d", "thin")
        source, made = self.local(words[2]), self.local(words[3])
        write_flat(made, size=SIZE, runs=[(0, source.with_name(f"{source.stem}-flat.vmdk").read_bytes())])
        return "Destination disk format: VMFS thin-provisioned\nCloning disk...\rClone: 100% done.\n"

    def _make(self, text: str, path: str) -> Said:
        if path in self.texts:
            return 1, "", f"-sh: can't create {path}: File exists\n"
        self.texts[path] = text
        return 0, "", ""

    def _put(self, text: str, path: str) -> Said:
        self.texts[path] = text
        return 0, "", ""

    # ---- files

    def local(self, path: str) -> Path:
        assert path.startswith(f"{DIR}/"), path
        return self.folder / path.removeprefix(f"{DIR}/")

    def write_base(self, runs: list[tuple[int, bytes]], *, name: str = "web.vmdk") -> None:
        write_flat(self.folder / name, size=SIZE, runs=runs, identity=Identity(cid=CID))

    def write_delta(self, name: str, parent: str, runs: list[tuple[int, bytes]], *, cid: int = CID) -> None:
        """As a running VM's: with its parent's CID."""
        write_sesparse(self.folder / name, size=SIZE, runs=runs, identity=Identity(cid=cid, parent_cid=CID, parent_hint=parent))


class FakeFile:
    """An open file of the fake server."""

    def __init__(self, server: FakeSftp, path: str) -> None:
        self._server = server
        self._path = path
        self.size = server.size(path)
        server.handles.append(path)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self._server.before_read(self._path, offset)
        with self._server.host.local(self._path).open("rb") as file:
            file.seek(offset)
            data = file.read(len(buffer))
        if len(data) < len(buffer):
            raise ImageError("the file ends here", where=self._path)
        buffer[:] = data

    def close(self) -> None:
        self._server.handles.remove(self._path)


class FakeSftp:
    """The files of a FakeEsx. locked: paths that say `Failure`. handles: paths that are open now. opened: all there were."""

    def __init__(self, host: FakeEsx) -> None:
        self.host = host
        self.locked: set[str] = set()
        self.handles: list[str] = []
        self.opened: list[str] = []
        self.before_read: Callable[[str, int], None] = lambda _path, _offset: None

    def size(self, path: str) -> int:
        if path in self.locked:
            raise RemoteFileError("the server says only that it failed (Failure)", status=Status.FAILURE, where=path)
        try:
            return self.host.local(path).stat().st_size
        except FileNotFoundError as exc:
            raise RemoteFileError("there is no such file", status=Status.NO_SUCH_FILE, where=path) from exc

    def sftp(self) -> SftpClient:
        return cast("SftpClient", FakeClient(self))


class FakeClient:
    def __init__(self, server: FakeSftp) -> None:
        self._server = server
        self.read_size = 0

    def open(self, path: str) -> FakeFile:
        self._server.opened.append(path)
        return FakeFile(self._server, path)

    def stat(self, path: str) -> Attributes:
        return Attributes(size=self._server.size(path))

    def close(self) -> None:
        """Nothing is open."""


def esxcli(kind: str, rows: list[dict[str, str]]) -> str:
    """As `--formatter=xml` prints them."""

    def plain(text: str) -> str:
        return text.replace("&", "&amp;").replace("<", "&lt;")

    def field(name: str, value: str) -> str:
        return f'         <field name="{name}">\n            <string>{plain(value)}</string>\n         </field>\n'

    body = "".join(
        f'      <structure typeName="{kind}">\n{"".join(field(*pair) for pair in row.items())}      </structure>\n'
        for row in rows
    )
    return (
        '<?xml version="1.0" encoding="utf-8"?>\n<output xmlns="http://www.vmware.com/Products/ESX/5.0/esxcli">\n<root>\n'
        f'   <list type="structure">\n{body}   </list>\n</root>\n</output>\n'
    )


def connect(host: FakeEsx, *, clone_base: bool = False) -> EsxSource:
    return EsxSource(host, clone_base=clone_base)


def _said(answer: str | Said) -> Said:
    return (0, answer, "") if isinstance(answer, str) else answer


def _completed(code: int, output: str, errors: str) -> Completed:
    return Completed(code, output.encode("utf-8", "surrogateescape"), errors.encode())
