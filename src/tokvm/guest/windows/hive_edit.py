"""The registry keys that make Windows start from a disk on KVM. All of them are in the SYSTEM hive.

    Services\\viostor, vioscsi      boot-start (Start 0), in group "SCSI miniport"
    which device they drive        Windows 8 and later: DriverDatabase\\{DriverInfFiles, DriverPackages, DeviceIds\\PCI}
                                   before: Control\\CriticalDeviceDatabase\\PCI#…
    Services\\storahci …            StartOverride removed and Start 0: Windows turns drivers off that it did not boot from

Keys and values are virt-v2v's (convert/windows_virtio.ml, 2.2 and later), which are tried on real Windows; virt-v2v 2.2 does
it for viostor only. Every edit can be done twice.

hivex reads a hive's base file and knows nothing of its logs (SYSTEM.LOG1, .LOG2). After a full shutdown they hold nothing that
the hive has not; a hive whose two sequence numbers differ was not written out, and is refused (Suhanov, "Windows registry file
format specification", 2019). Windows does not replay an older log over the edited hive, whose numbers are higher and equal.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

from tokvm.guest.base import GuestError
from tokvm.guest.windows.registry import Expand, Hive, Value

SCSI_CLASS = "{4D36E97B-E325-11CE-BFC1-08002BE10318}"
DEVICES = {
    "viostor": ("VEN_1AF4&DEV_1001&SUBSYS_00021AF4&REV_00", "VEN_1AF4&DEV_1042&SUBSYS_11001AF4&REV_01"),
    "vioscsi": ("VEN_1AF4&DEV_1004&SUBSYS_00081AF4&REV_00", "VEN_1AF4&DEV_1048&SUBSYS_11001AF4&REV_01"),
}
"""PCI ids of the legacy and the modern device. virtio-blk is viostor's, virtio-scsi vioscsi's."""

INBOX = ("storahci", "stornvme", "intelide", "atapi", "msahci", "lsi_sas", "pvscsi", "megasas")
"""Drivers of hardware that QEMU has too. Only those that the guest has are touched."""

# The package's version record: without it Windows 10's and Server 2016's PnP ignores the package. Ends with the class GUID.
_VERSION = bytes.fromhex("00ff0900000000007be9364d25e3ce11bfc108002be10318") + bytes(24)
_MATCHES = b"\x01\xff\x00\x00"
BASE_BLOCK = 512


def check_base_block(head: bytes, where: str) -> None:
    """`head`: the hive's first 512 bytes. GuestError: no hive, damaged, or not written out."""
    if len(head) < BASE_BLOCK or head[:4] != b"regf":
        raise GuestError("this is no registry hive", where=where)
    checksum = 0
    for (word,) in struct.iter_unpack("<I", head[:508]):
        checksum ^= word
    checksum = {0: 1, 0xFFFFFFFF: 0xFFFFFFFE}.get(checksum, checksum)
    primary, secondary, kept = *struct.unpack_from("<II", head, 4), struct.unpack_from("<I", head, 508)[0]
    if primary != secondary or checksum != kept:
        raise GuestError(
            "Windows has not written its registry out: part of it is only in the hive's logs",
            where=where,
            fix="start the guest and shut it down for good: shutdown /s /f /t 0",
        )


def make_boot_start(hive: Hive, current: str, drivers: Iterable[str]) -> None:
    """Services and device ids for `drivers` (keys of DEVICES). current: the name of the current control set."""
    database = has_database(hive)
    for driver in drivers:
        service = (current, "Services", driver)
        hive.put(
            service,
            {
                "Type": 1,
                "Start": 0,
                "ErrorControl": 1,
                "Group": "SCSI miniport",
                "ImagePath": Expand(f"system32\\drivers\\{driver}.sys"),
            },
        )
        hive.drop((*service, "StartOverride"))
        for path, values in (_in_database(driver) if database else _critical(current, driver)).items():
            hive.put(path, values)


def has_database(hive: Hive) -> bool:
    return bool(hive.find(("DriverDatabase",)))


def enable_inbox(hive: Hive, current: str) -> tuple[str, ...]:
    """Let the guest's own drivers for other controllers start at boot; the names of those it has. Windows starts a boot driver
    without its hardware without complaint."""
    services = hive.find((current, "Services"))
    found = tuple(name for name in INBOX if services and hive.find((name,), services))
    for name in found:
        hive.drop((name, "StartOverride"), services)
        hive.put((name,), {"Start": 0}, services)
    return found


def _critical(current: str, driver: str) -> dict[tuple[str, ...], dict[str, Value]]:
    values: dict[str, Value] = {"Service": driver, "ClassGUID": SCSI_CLASS}
    return {(current, "Control", "CriticalDeviceDatabase", f"PCI#{device}"): values for device in DEVICES[driver]}


def _in_database(driver: str) -> dict[tuple[str, ...], dict[str, Value]]:
    """An installed package as PnP sees it; the name is ours, so that it is not taken for a real oem*.inf."""
    inf, conf = f"tokvm_{driver}.inf", f"tokvm_{driver}_conf"
    label, root = f"{inf}_tmp", "DriverDatabase"
    package = (root, "DriverPackages", label)
    keys: dict[tuple[str, ...], dict[str, Value]] = {
        (root, "DriverInfFiles", inf): {"": [label], "Active": label, "Configurations": [conf]},
        package: {"Version": _VERSION},
        (*package, "Configurations", conf): {"ConfigFlags": 0, "Service": driver},
    }
    for device in DEVICES[driver]:
        keys[(root, "DeviceIds", "PCI", device)] = {inf: _MATCHES}
        keys[(*package, "Descriptors", "PCI", device)] = {"Configuration": conf}
    return keys
