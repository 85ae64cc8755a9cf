"""What a morphed Windows does by itself at its first boot on KVM: driver signers, drivers, addresses, agent, old tools.

    \\Windows\\tokvm-firstboot\\  first-boot.cmd, first-boot.ps1          constant text (package data)
                                certs\\SHA1.cer  drivers\\NAME\\…  addresses.csv  qemu-ga.msi  remove-tools.txt
                                first-boot.log, done.txt                 written by the guest
    Services\\tokvm-firstboot    auto start, LocalSystem, error control "ignore"; the script's last act is to delete it

No guest's name, no certificate's name and no other text from outside ever becomes part of a script: scripts are the same bytes
for every guest, and the data beside them are addresses, thumbprints and checked file names.

How the service runs the script. A service's program has to answer the service control manager within 30 s, and neither cmd.exe
nor PowerShell can. With rhsrvany.exe (virt-v2v's tool, given by the operator in $VIRT_TOOLS_DATA_DIR) the script is that
program's child. Without it the service is `cmd.exe /c start … cmd.exe /c first-boot.cmd`: the started shell is not the
service's process, so it lives on when the manager gives the service up (error 1053; events 7000, 7009 in the system log, once).
Neither was tried on a real Windows by this project: docs/field-notes.md.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path

from tokvm.core.units import MiB
from tokvm.guest.base import GuestError
from tokvm.guest.windows.addresses import Adapter, as_csv
from tokvm.guest.windows.certificates import to_import
from tokvm.guest.windows.driver_tree import DriverSet
from tokvm.guest.windows.registry import Expand, Hive, Value

FOLDER = "tokvm-firstboot"
SERVICE = "tokvm-firstboot"
SCRIPTS = ("first-boot.cmd", "first-boot.ps1")
RUNNER = "rhsrvany.exe"
MAX_RUNNER = 8 * MiB
_SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}(/[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}){0,2}")


def files(found: DriverSet, adapters: Sequence[Adapter], *, runner: bytes | None, remove_tools: bool) -> dict[str, bytes]:
    """Path below FOLDER → content, of all that the first boot needs."""
    made = {name: script(name) for name in SCRIPTS}
    signers = to_import(signer for driver in found.drivers for signer in driver.signers)
    made |= {f"certs/{signer.sha1}.cer": signer.der for signer in signers}
    for driver in found.drivers:
        made |= {f"drivers/{driver.name}/{name}": data for name, data in driver.files.items()}
    if found.agent is not None:
        made["qemu-ga.msi"] = found.agent
    if adapters:
        made["addresses.csv"] = as_csv(adapters)
    if remove_tools:
        made["remove-tools.txt"] = b"yes\r\n"
    if runner is not None:
        made[RUNNER] = runner
    check_names(made)
    return made


def check_names(names: Iterable[str]) -> None:
    """GuestError for a name that is more than letters, digits and a few signs: it would reach a command line in the guest."""
    for name in names:
        if not _SAFE.fullmatch(name) or ".." in name:
            raise GuestError(
                f"{name!r} is no file name for the first boot", fix="take the drivers from a virtio-win ISO as it is"
            )


def script(name: str) -> bytes:
    """A script as Windows reads it best: CR LF."""
    text = resources.files("tokvm.guest.windows").joinpath("data", name).read_bytes()
    return text.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")


def find_runner() -> bytes | None:
    """rhsrvany.exe from $VIRT_TOOLS_DATA_DIR, where virt-v2v looks too; None when none is given."""
    folder = os.environ.get("VIRT_TOOLS_DATA_DIR")
    path = Path(folder, RUNNER) if folder else None
    if path is None or not path.is_file():
        return None
    with path.open("rb") as file:
        data = file.read(MAX_RUNNER + 1)
    if len(data) > MAX_RUNNER or data[:2] != b"MZ":
        raise GuestError("this is no service runner", where=str(path), fix="take rhsrvany.exe from virt-v2v's windows tools")
    return data


def add_service(hive: Hive, current: str, *, with_runner: bool) -> None:
    """The service in the SYSTEM hive. current: the name of its current control set."""
    path = (current, "Services", SERVICE)
    folder = f"%SystemRoot%\\{FOLDER}"
    shell = f'"%SystemRoot%\\System32\\cmd.exe" /c "{folder}\\first-boot.cmd"'
    started = f'"%SystemRoot%\\System32\\cmd.exe" /c start "tokvm" /b {shell}'
    values: dict[str, Value] = {
        "Type": 16,
        "Start": 2,
        "ErrorControl": 0,
        "ObjectName": "LocalSystem",
        "DisplayName": "tokvm: first boot on KVM",
        "DependOnService": ["PlugPlay"],
        "ImagePath": Expand(f"{folder}\\{RUNNER} -s {SERVICE}" if with_runner else started),
    }
    hive.put(path, values)
    if with_runner:
        # A plain REG_SZ, as virt-v2v writes it: cmd.exe puts in %SystemRoot% itself.
        hive.put((*path, "Parameters"), {"CommandLine": f"cmd.exe /c {folder}\\first-boot.cmd"})
