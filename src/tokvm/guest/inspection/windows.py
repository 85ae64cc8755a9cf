"""A mounted Windows guest → WindowsFacts. The registry is read by hivex inside the appliance."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tokvm.core.units import SECTOR
from tokvm.guest.base import GuestError, WindowsFacts
from tokvm.guest.inspection import ntfs
from tokvm.guest.inspection.disks import BootPlace
from tokvm.guest.inspection.tree import Tree, word
from tokvm.guest.windows.registry import Hive, control_set, texts

SERVICES_LIMIT = 3000
"""Windows 11 has about 700, a busy server twice that."""
PROGRAMS_LIMIT = 1000
TOOLS = (
    "VMware Tools",
    "Hyper-V Integration",
    "XenServer",
    "Citrix VM Tools",
    "XCP-ng",
    "Citrix Hypervisor",
    "VirtualBox",
)
HIBERNATED = {b"hibr", b"rstr"}
"""First bytes of hiberfil.sys, in either case, while a memory image waits in it (or is being read). `wake` stays behind after
a resume and means nothing, as zeros do: ntfs-3g 2022.10.3, libntfs-3g/volume.c, ntfs_volume_check_hiberfile."""
_NT = ("Microsoft", "Windows NT", "CurrentVersion")
_UNINSTALL = (("Microsoft",), ("Wow6432Node", "Microsoft"))
_POLICY_HISTORY = ("Microsoft", "Windows", "CurrentVersion", "Group Policy", "History")


def look_at_windows(tree: Tree, place: BootPlace, root: str) -> WindowsFacts:
    """`root`: libguestfs' name of the system volume, mounted at /."""
    g = tree.appliance.g
    systemroot = str(tree.ask(g.inspect_get_windows_systemroot, root, default="/Windows"))
    software = _Software()
    system = _System()
    with _readable(tree, "SOFTWARE"), Hive.open(tree.appliance, _hive_path(tree, systemroot, root, "software")) as hive:
        software = _software(hive)
    with _readable(tree, "SYSTEM"), Hive.open(tree.appliance, _hive_path(tree, systemroot, root, "system")) as hive:
        system = _system(hive)
    return WindowsFacts(
        systemroot=word(systemroot),
        control_set=system.control_set,
        version=software.version,
        build=software.build,
        edition=software.edition,
        hibernated=is_hibernated(tree.head("/hiberfil.sys", 4)),
        fast_startup=system.fast_startup,
        dirty=_is_dirty(tree, root),
        bitlocker=bool(place.bitlocker),
        boot_start=system.boot_start,
        drivers=_driver_files(tree, systemroot),
        tools=software.tools,
        static_ip=system.static_ip,
        group_policy=software.group_policy or _has_policy_file(tree, systemroot),
    )


class _Software:
    """What the SOFTWARE hive says."""

    version = edition = ""
    build = 0
    tools: tuple[str, ...] = ()
    group_policy = False


class _System:
    """What the SYSTEM hive says."""

    control_set = ""
    boot_start: frozenset[str] = frozenset()
    fast_startup = static_ip = False


def is_hibernated(head: bytes) -> bool:
    return head[:4].lower() in HIBERNATED


def _software(hive: Hive) -> _Software:
    found, node = _Software(), hive.find(_NT)
    if node:
        major, minor = hive.number(node, "CurrentMajorVersionNumber"), hive.number(node, "CurrentMinorVersionNumber")
        # 8.1 and older have no numbers; 10 and newer say 6.3 in CurrentVersion, for programs that know no better.
        found.version = word(f"{major}.{minor or 0}" if major is not None else hive.string(node, "CurrentVersion"))
        build = hive.string(node, "CurrentBuildNumber") or hive.string(node, "CurrentBuild") or ""
        found.build = int(build) if build.isascii() and build.isdigit() and len(build) < 10 else 0
        found.edition = word(hive.string(node, "EditionID"))
    found.tools = tuple(dict.fromkeys(_installed_tools(hive)))
    history = hive.find(_POLICY_HISTORY)
    found.group_policy = bool(history and hive.children(history))
    return found


def _installed_tools(hive: Hive) -> Iterator[str]:
    for start in _UNINSTALL:
        node = hive.find((*start, "Windows", "CurrentVersion", "Uninstall"))
        for _, program in (hive.children(node) if node else [])[:PROGRAMS_LIMIT]:
            name = hive.string(program, "DisplayName") or ""
            if any(one.lower() in name.lower() for one in TOOLS):
                yield word(name)


def _system(hive: Hive) -> _System:
    found = _System()
    found.control_set = control_set(hive)
    current = hive.find((found.control_set,))
    found.boot_start = frozenset(_boot_start(hive, hive.find(("Services",), current)))
    power = hive.find(("Control", "Session Manager", "Power"), current)
    found.fast_startup = bool(power and hive.number(power, "HiberbootEnabled"))
    found.static_ip = _has_static_ip(hive, hive.find(("Services", "Tcpip", "Parameters", "Interfaces"), current))
    return found


def _boot_start(hive: Hive, services: int) -> Iterator[str]:
    """Services that really start at boot: Start = 0, and no StartOverride that says otherwise (Windows 8 and newer write one
    for storage drivers that the machine did not boot from)."""
    for name, node in (hive.children(services) if services else [])[:SERVICES_LIMIT]:
        if hive.number(node, "Start") == 0:
            override = hive.find(("StartOverride",), node)
            if not override or not hive.number(override, "0"):
                yield word(name).lower()


def _has_static_ip(hive: Hive, adapters: int) -> bool:
    for _, node in (hive.children(adapters) if adapters else [])[:200]:
        addresses = texts(hive.value(node, "IPAddress") or b"")
        if hive.number(node, "EnableDHCP") == 0 and any(one != "0.0.0.0" for one in addresses):
            return True
    return False


def _hive_path(tree: Tree, systemroot: str, root: str, name: str) -> str:
    g = tree.appliance.g
    ask = g.inspect_get_windows_software_hive if name == "software" else g.inspect_get_windows_system_hive
    return str(tree.ask(ask, root, default=f"{systemroot}/System32/config/{name.upper()}"))


def _driver_files(tree: Tree, systemroot: str) -> frozenset[str]:
    folder = tree.ask(tree.appliance.g.case_sensitive_path, f"{systemroot}/system32/drivers", default="")
    return frozenset(name.lower() for name in tree.names(str(folder))) if folder else frozenset()


def _has_policy_file(tree: Tree, systemroot: str) -> bool:
    path = f"{systemroot}/System32/GroupPolicy/Machine/Registry.pol"
    return tree.is_file(str(tree.ask(tree.appliance.g.case_sensitive_path, path, default=path)))


def _is_dirty(tree: Tree, volume: str) -> bool:
    """From the raw volume: mounted or not makes no difference to a read-only look."""
    read = tree.appliance.g.pread_device
    place = ntfs.volume_record_place(bytes(tree.ask(read, volume, SECTOR, 0, default=b"")))
    return place is not None and ntfs.is_dirty(bytes(tree.ask(read, volume, place.size, place.offset, default=b"")))


@contextmanager
def _readable(tree: Tree, name: str) -> Iterator[None]:
    """A hive that cannot be read is a problem, not the end; an appliance that ended is."""
    try:
        yield
    except UnicodeDecodeError:
        tree.problem(f"the registry hive {name} has names that are no text")
    except GuestError as failed:
        if not tree.appliance.g.is_ready():
            raise
        tree.problem(failed.what, where=failed.where, fix="start the guest once, and look for a damaged registry")
