"""What a tree of virtio-win drivers has for one Windows.

    ISO       viostor/2k22/amd64/viostor.{inf,sys,cat}      guest-agent/qemu-ga-x86_64.msi
    package   drivers/by-driver/viostor/2k22/amd64/…        drivers/by-os/amd64/2k22/viostor.inf      drivers/amd64/Win2012R2/…

A driver is an .inf with the .sys and .cat beside it; the folders above it say the version and the architecture, in any order
and case, as virt-v2v reads them. No folder is "near enough": a driver for another version may not be signed for this one.

Known traps: EL9's virtio-win 1.9.40 has nothing for Server 2025; 0.1.285's smbus driver makes Server 2025 restart for ever
(apache/cloudstack-documentation 657), so that driver is never taken.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokvm.core.machine import Finding, Severity
from tokvm.core.text import readable
from tokvm.guest.base import GuestError, GuestFacts
from tokvm.guest.windows.certificates import Signer, signers
from tokvm.guest.windows.tree_files import TreeFiles, open_tree

STORAGE = ("viostor", "vioscsi")
NETWORK = ("netkvm",)
WANTED = (
    *STORAGE,
    *NETWORK,
    "balloon",
    "vioser",
    "qemufwcfg",
    "fwcfg",
    "pvpanic",
    "pvpanic-pci",
    "qxldod",
    "viogpudo",
    "viorng",
)
"""Stems of the .inf files, lower case."""
AGENTS = {"x86_64": ("qemu-ga-x86_64.msi", "qemu-ga-x64.msi"), "i386": ("qemu-ga-i386.msi", "qemu-ga-x86.msi")}
MAX_DRIVER_FILES = 24
NEWER = "get a newer virtio-win, one that has a folder for this version, and name it by --virtio-win"

_ARCH = {"x86_64": ("amd64", "x64"), "i386": ("x86", "i386"), "aarch64": ("arm64",)}
# By build: the last of each line that is not above the guest's. (Server builds: LTSC releases only.)
_SERVER = (
    *((7600, "2k8r2", "win2008r2"), (9200, "2k12", "win2012"), (9600, "2k12r2", "win2012r2"), (14393, "2k16", "win2016")),
    *((17763, "2k19", "win2019"), (20348, "2k22", "win2022"), (26100, "2k25", "win2025")),
)
_CLIENT = (
    *((7600, "w7", "win7"), (9200, "w8", "win8"), (9600, "w8.1", "win8.1"), (10240, "w10", "win10")),
    (22000, "w11", "win11"),
)
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}")
_RELEASE = re.compile(r"(\d+)\.(\d+)\.(\d+)")
SMBUS_LOOP = (0, 1, 285)


@dataclass(frozen=True, slots=True)
class Target:
    """folders: names of the folders that hold drivers for this version, lower case."""

    product: str
    folders: tuple[str, ...]
    arch: str

    @property
    def is_2025(self) -> bool:
        return "2k25" in self.folders

    def fits(self, name: str) -> bool:
        above = {part.lower() for part in name.split("/")[:-1]}
        return bool(above & set(self.folders)) and bool(above & set(_ARCH.get(self.arch, ())))


@dataclass(frozen=True, slots=True)
class Driver:
    """files: name → content, as the tree spells the names; signers: of its catalogue."""

    name: str
    files: dict[str, bytes]
    signers: tuple[Signer, ...]

    def file(self, suffix: str) -> bytes | None:
        return next((data for name, data in self.files.items() if name.lower() == f"{self.name}{suffix}"), None)


@dataclass(frozen=True, slots=True)
class DriverSet:
    """What was found for a guest. agent: the guest agent's MSI, or None. findings: what is missing or a trap."""

    where: str
    drivers: tuple[Driver, ...]
    agent: bytes | None
    findings: tuple[Finding, ...]

    @property
    def storage(self) -> tuple[Driver, ...]:
        return tuple(one for one in self.drivers if one.name in STORAGE)


def target_of(facts: GuestFacts) -> Target:
    """GuestError when this is no Windows that virtio drivers are known for."""
    windows = facts.windows
    if windows is None:
        raise GuestError("this guest is no Windows", fix="drivers are for Windows only")
    server = windows.edition.lower().startswith("server") or "server" in facts.product.lower()
    fitting = [row for row in (_SERVER if server else _CLIENT) if row[0] <= windows.build]
    product = readable(facts.product or "this Windows", limit=80)
    if not fitting or facts.arch not in _ARCH:
        raise GuestError(
            f"{product} (build {windows.build}, {facts.arch or 'unknown architecture'}) has no virtio drivers",
            fix="boot it on compatible hardware, or update Windows first",
        )
    return Target(product, fitting[-1][1:], facts.arch)


def find_drivers(path: Path, target: Target) -> DriverSet:
    """Everything for this guest, read and with its signatures checked. GuestError: the tree cannot be read, or a file in it is
    damaged. What is not there is a finding: without storage drivers a blocker."""
    with open_tree(path) as tree:
        chosen = _chosen(tree.names, target)
        drivers = tuple(_read(tree, name, inf) for name, inf in chosen.items())
        agent = next((tree.read(name) for name in tree.names if _is_agent(name, target.arch)), None)
        findings = [*_missing(chosen, target, tree), *_agent_finding(agent, tree), *_smbus(tree, target)]
        return DriverSet(tree.where, drivers, agent, tuple(findings))


def _chosen(names: Iterable[str], target: Target) -> dict[str, str]:
    """Driver → its .inf. The stub qemufwcfg conflicts with the real fwcfg (Red Hat bug 2151752)."""
    found: dict[str, str] = {}
    for name in names:
        stem, suffix = posixpath.splitext(posixpath.basename(name).lower())
        if suffix == ".inf" and stem in WANTED and target.fits(name):
            found.setdefault(stem, name)
    if "fwcfg" in found:
        found.pop("qemufwcfg", None)
    return {name: found[name] for name in WANTED if name in found}


def _read(tree: TreeFiles, name: str, inf: str) -> Driver:
    folder = posixpath.dirname(inf)
    beside = [one for one in tree.names if posixpath.dirname(one) == folder and _belongs(posixpath.basename(one), name)]
    odd = [one for one in beside if not _FILE.fullmatch(posixpath.basename(one))]
    if odd or len(beside) > MAX_DRIVER_FILES:
        shown = readable(posixpath.basename(odd[0])) if odd else f"{len(beside)} files"
        raise GuestError(f"the driver {name} has a file of an odd name or too many: {shown}", where=f"{tree.where}/{folder}")
    files = {posixpath.basename(one): tree.read(one) for one in beside}
    catalogue = next((file for file in files if file.lower() == f"{name}.cat"), None)
    if catalogue is None:
        raise GuestError(f"the driver {name} has no catalogue (.cat)", where=f"{tree.where}/{folder}", fix=NEWER)
    return Driver(name, files, signers(files[catalogue], f"{tree.where}/{folder}/{catalogue}"))


def _belongs(file: str, driver: str) -> bool:
    """In by-driver trees all that lies there; in by-os trees drivers lie together, and symbols (.pdb) stay behind."""
    stem, suffix = posixpath.splitext(file.lower())
    return suffix in {".inf", ".sys", ".cat", ".dll", ".exe"} and (stem.startswith(driver) or stem not in WANTED)


def _is_agent(name: str, arch: str) -> bool:
    return posixpath.basename(name).lower() in AGENTS.get(arch, ())


def _missing(chosen: dict[str, str], target: Target, tree: TreeFiles) -> Sequence[Finding]:
    what = f"{readable(tree.label or tree.where)} has no {{}} driver for {target.product} ({target.folders[0]}, {target.arch})"
    if not any(name in chosen for name in STORAGE):
        return [Finding(Severity.BLOCKER, what.format("virtio storage"), NEWER, tree.where)]
    return [
        Finding(Severity.WARNING, what.format(name), NEWER, tree.where) for name in (*STORAGE, *NETWORK) if name not in chosen
    ]


def _agent_finding(agent: bytes | None, tree: TreeFiles) -> Sequence[Finding]:
    if agent is not None:
        return []
    return [
        Finding(Severity.WARNING, "the tree has no guest agent for this guest", "install qemu-ga after the move", tree.where)
    ]


def _smbus(tree: TreeFiles, target: Target) -> Sequence[Finding]:
    release = _RELEASE.search(tree.label) or _RELEASE.search(Path(tree.where).name)
    bad = release is None or tuple(int(part) for part in release.groups()) >= SMBUS_LOOP
    if not target.is_2025 or not bad or not any("smbus" in name.lower().split("/") for name in tree.names):
        return []
    what = "this tree's smbus driver can make Server 2025 restart for ever (seen with 0.1.285); tokvm leaves it out"
    return [Finding(Severity.WARNING, what, "do not run the tree's own installer in this guest", tree.where)]
