"""What stands in the registry of the lab's phony Windows: enough for libguestfs, virt-v2v and tokvm to take it for one.

Keys and values are those of real installations, as far as anybody looks at them; the versions' numbers are Microsoft's
(Windows Server release information; "Windows 11" calls itself Windows 10 in ProductName).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from tokvm.guest.windows.registry import Expand, Hive, Value

NET_CLASS = "{4D36E972-E325-11CE-BFC1-08002BE10318}"
NIC_GUID = "{0F2C8B4A-6D1E-4C7B-9A55-1B7D2E90C3F1}"
MAC = bytes.fromhex("005056a1b2c3")
DISK_ID = 0x34333231
FILETIME = 0x01D00000_00000000

Keys = dict[tuple[str, ...], dict[str, Value]]


@dataclass(frozen=True, slots=True)
class Release:
    """database: drivers are in SYSTEM\\DriverDatabase (Windows 8 and later), not in Control\\CriticalDeviceDatabase."""

    product: str
    build: int
    edition: str
    server: bool = True
    number: str = "6.3"
    database: bool = True

    @property
    def ten(self) -> bool:
        return self.build >= 10240


RELEASES = {
    "win2k8r2": Release("Windows Server 2008 R2 Standard", 7601, "ServerStandard", number="6.1", database=False),
    "win2k12r2": Release("Windows Server 2012 R2 Standard", 9600, "ServerStandard"),
    "win2k16": Release("Windows Server 2016 Standard", 14393, "ServerStandard"),
    "win2k19": Release("Windows Server 2019 Standard", 17763, "ServerStandard"),
    "win2k22": Release("Windows Server 2022 Standard", 20348, "ServerStandard"),
    "win2k25": Release("Windows Server 2025 Standard", 26100, "ServerStandard"),
    "win10": Release("Windows 10 Pro", 19045, "Professional", server=False),
    "win11": Release("Windows 10 Pro", 22631, "Professional", server=False),
}

TOOLS = {
    "vmware": ("VMware Tools", "12.3.0.22234872", "MsiExec.exe /I{F32C4E7B-2BF8-4788-8408-824C6896E1BB}"),
    "xen": ("XenServer VM Tools", "9.3.3", "MsiExec.exe /X{AC81AD0D-CD2F-4B3E-B0C9-8C5B4F1B2A11}"),
}


def software(release: Release, tools: str) -> Keys:
    """The SOFTWARE hive."""
    windows, nt = ("Microsoft", "Windows", "CurrentVersion"), ("Microsoft", "Windows NT", "CurrentVersion")
    version: dict[str, Value] = {
        "CurrentBuild": str(release.build),
        "CurrentBuildNumber": str(release.build),
        "CurrentVersion": release.number,
        "EditionID": release.edition,
        "InstallationType": "Server" if release.server else "Client",
        "ProductName": release.product,
        "SystemRoot": "C:\\Windows",
    }
    if release.ten:
        version |= {"CurrentMajorVersionNumber": 10, "CurrentMinorVersionNumber": 0}
    keys: Keys = {
        windows: {"DevicePath": Expand("%SystemRoot%\\inf"), "ProgramFilesDir": "C:\\Program Files"},
        (*windows, "Uninstall"): {},
        (*windows, "RunOnce"): {},
        nt: version,
    }
    if tools:
        name, number, command = TOOLS[tools]
        guid = command[command.index("{") :]
        entry: dict[str, Value] = {"DisplayName": name, "DisplayVersion": number, "UninstallString": command}
        keys[(*windows, "Uninstall", guid)] = entry
    return keys


def system(release: Release, *, tools: str, static_ip: bool, fast_startup: bool, uefi: bool) -> Keys:
    """The SYSTEM hive, with one control set."""
    now, services = ("ControlSet001",), ("ControlSet001", "Services")
    control = (*now, "Control")
    keys: Keys = {
        ("Select",): {"Current": 1, "Default": 1, "Failed": 0, "LastKnownGood": 1},
        ("Setup",): {"SystemSetupInProgress": 0, "CmdLine": ""},
        ("MountedDevices",): {} if uefi else {"\\DosDevices\\C:": struct.pack("<IQ", DISK_ID, 1 << 20)},
        (*control, "Class"): {},
        (*control, "Session Manager", "Power"): {"HiberbootEnabled": int(fast_startup)},
        (*control, "TimeZoneInformation"): {"TimeZoneKeyName": "W. Europe Standard Time"},
        (*now, "Enum"): {},
        (*services, "LSI_SAS"): _driver("lsi_sas", start=0),
        (*services, "storahci"): _driver("storahci", start=0),
        (*services, "storahci", "StartOverride"): {"0": 3},
        (*services, "disk"): _driver("disk", start=0),
        (*services, "Tcpip", "Parameters"): {"Hostname": "phony", "NV Hostname": "phony"},
    }
    keys[("DriverDatabase",) if release.database else (*control, "CriticalDeviceDatabase")] = {}
    if tools == "vmware":
        keys[(*services, "pvscsi")] = _driver("pvscsi", start=0)
        keys[(*services, "VMTools")] = {
            "Type": 16,
            "Start": 2,
            "ImagePath": Expand('"C:\\Program Files\\VMware\\vmtoolsd.exe"'),
        }
    return keys | _network(static_ip=static_ip, release=release)


def _network(*, static_ip: bool, release: Release) -> Keys:
    interface: dict[str, Value] = {"EnableDHCP": 0 if static_ip else 1}
    if static_ip:
        interface |= {
            "IPAddress": ["192.0.2.10"],
            "SubnetMask": ["255.255.255.0"],
            "DefaultGateway": ["192.0.2.1"],
            "DefaultGatewayMetric": ["0"],
            "NameServer": "192.0.2.53,198.51.100.53",
        }
    control = ("ControlSet001", "Control")
    keys: Keys = {
        (*control, "Class", NET_CLASS, "0001"): {"DriverDesc": "vmxnet3 Ethernet Adapter", "NetCfgInstanceId": NIC_GUID},
        (*control, "Network", NET_CLASS, NIC_GUID, "Connection"): {"Name": "Ethernet0"},
        ("ControlSet001", "Services", "Tcpip", "Parameters", "Interfaces", NIC_GUID): interface,
    }
    if release.ten:
        keys[(*control, "NetworkSetup2", "Interfaces", NIC_GUID, "Kernel")] = {"PermanentAddress": MAC, "CurrentAddress": MAC}
    return keys


def _driver(file: str, *, start: int) -> dict[str, Value]:
    return {"Type": 1, "Start": start, "ErrorControl": 1, "ImagePath": Expand(f"System32\\drivers\\{file}.sys")}


def fill(hive: Hive, keys: Keys) -> None:
    for path, values in keys.items():
        hive.put(path, values)
    hive.commit()


def empty_hive() -> bytes:
    """A hive with nothing but its root: base block and one bin with the root key and its security cell; 8 KiB.

    hivex gives the root's security cell to every key that it makes. Layout: Maxim Suhanov, "Windows registry file format
    specification" (2019).
    """
    root_at, name = 0x20, b"$$$PROTO.HIV"
    root = _key_cell(name, security_at=0)
    security_at = root_at + len(root)
    body = _key_cell(name, security_at=security_at) + _security_cell(security_at)
    free = 4096 - 32 - len(body)
    filled = struct.pack("<4sIIQQI", b"hbin", 0, 4096, 0, FILETIME, 0) + body + struct.pack("<i", free) + bytes(free - 4)
    base = struct.pack("<4sIIQIIIIIII", b"regf", 1, 1, FILETIME, 1, 3, 0, 1, root_at, 4096, 1).ljust(508, b"\0")
    checksum = 0
    for (word,) in struct.iter_unpack("<I", base):
        checksum ^= word
    return (base + struct.pack("<I", checksum)).ljust(4096, b"\0") + filled


def _cell(content: bytes) -> bytes:
    size = -(-(len(content) + 4) // 8) * 8
    return struct.pack("<i", -size) + content.ljust(size - 4, b"\0")


def _key_cell(name: bytes, *, security_at: int) -> bytes:
    none = 0xFFFFFFFF
    fields = (0x2C, FILETIME, 0, 0, 0, 0, none, none, 0, none, security_at, none, 0, 0, 0, 0, 0, len(name), 0)
    return _cell(struct.pack("<2sHQIIIIIIIIIIIIIIIHH", b"nk", *fields) + name)


def _security_cell(at: int) -> bytes:
    """Owner and group Administrators, no DACL."""
    sid = struct.pack("<BB6sII", 1, 2, b"\0\0\0\0\0\x05", 32, 544)
    descriptor = struct.pack("<BBHIIII", 1, 0, 0x8000, 20, 20 + len(sid), 0, 0) + sid + sid
    return _cell(struct.pack("<2sHIIII", b"sk", 0, at, at, 1, len(descriptor)) + descriptor)
