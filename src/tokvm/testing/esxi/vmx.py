"""A VM's `.vmx` and `.vmsd`, and what else lies in its directory.

    name = "value"       `|XX` for what a value cannot hold as it is: |22 a quote, |7C itself, |0A a line's end, |23 #

Keys and their order as ESXi 6.5 to 8.0 write them; `.vmsd` is empty until the first snapshot. Times in it are microseconds, in
two signed halves of 32 bits.
"""

from __future__ import annotations

from tokvm.testing.esxi import paths
from tokvm.testing.esxi.paths import directory
from tokvm.testing.esxi.state import NO_RDM, ON, Disk, State, Store, Vm

ESCAPED = frozenset('"|#')
ADAPTERS = {"sata": "sata-hardDisk", "nvme": "nvme-hardDisk", "ide": "ata-hardDisk"}


def write(store: Store, state: State, vm: Vm) -> None:
    """All that is derived from the state, anew."""
    folder = directory(state, vm)
    stem = f"{folder}/{vm['file'].removesuffix('.vmx')}"
    here = paths.local(store.folder, folder)
    here.mkdir(parents=True, exist_ok=True)
    texts = {
        f"{folder}/{vm['file']}": _text(_vmx(state, vm)),
        f"{stem}.vmsd": _text(_vmsd(state, vm, folder)) if vm["last_uid"] else "",
        f"{stem}.nvram": "",
        f"{folder}/vmware.log": "",
    }
    for path, text in texts.items():
        paths.local(store.folder, path).write_bytes(text.encode("utf-8", "surrogateescape"))
    names = {f"{vm['file']}.lck", f"{vm['file'].removesuffix('.vmx')}.vswp"}
    for name in names:
        lock = here / name
        if vm["state"] == ON:
            lock.touch()
        else:
            lock.unlink(missing_ok=True)
    snapshots = {f"{paths.name_of(stem)}-Snapshot{one['id']}.vmsn" for one in vm["snapshots"]}
    for old in here.glob("*.vmsn"):
        if old.name not in snapshots:
            old.unlink()
    for name in snapshots:
        (here / name).touch()


def node_of(disk: Disk) -> str:
    return f"{disk['bus']}{disk['bus_number']}:{disk['unit']}"


def escaped(value: str) -> str:
    return "".join(
        f"|{ord(letter):02X}" if letter in ESCAPED or letter < " " or letter == "\x7f" else letter for letter in value
    )


def _text(pairs: list[tuple[str, str]]) -> str:
    return "".join(f'{name} = "{escaped(value)}"\n' for name, value in pairs)


def _vmx(state: State, vm: Vm) -> list[tuple[str, str]]:
    fields = vm["fields"]
    found = [
        (".encoding", "UTF-8"),
        ("config.version", "8"),
        ("virtualHW.version", str(fields["version"]).removeprefix("vmx-")),
        ("displayName", vm["name"]),
        ("guestOS", str(fields["guestId"]).removesuffix("Guest").replace("64", "-64").replace("_-", "-")),
        ("numvcpus", str(fields["numCPU"])),
        ("memSize", str(fields["memoryMB"])),
        ("uuid.bios", spaced(vm["uuid"])),
        ("vc.uuid", spaced(vm["instance"])),
        ("nvram", f"{vm['file'].removesuffix('.vmx')}.nvram"),
    ]
    if fields["annotation"]:
        found.append(("annotation", str(fields["annotation"])))
    if fields["firmware"] == "efi":
        found.append(("firmware", "efi"))
    if fields["secureBoot"]:
        found.append(("uefi.secureBoot.enabled", "TRUE"))
    if fields["vtpm"]:
        found.append(("vtpm.present", "TRUE"))
    if fields["encrypted"]:
        found.append(("encryption.keySafe", "vmware:key/list/(pair/(fqid/<VMWARE-NULL>/key))"))
    if state["options"]["version"] >= "6":
        found.append(("sched.swap.derivedName", f"{directory(state, vm)}/{vm['file'].removesuffix('.vmx')}-1234abcd.vswp"))
    return [*found, *_disks(state, vm), *_nics(vm)]


def _disks(state: State, vm: Vm) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    buses: set[str] = set()
    for disk in vm["disks"]:
        bus = f"{disk['bus']}{disk['bus_number']}"
        if bus not in buses and disk["bus"] != "ide":
            buses.add(bus)
            model = [(f"{bus}.virtualDev", disk["controller"])] if disk["bus"] == "scsi" else []
            sharing = (
                [(f"{bus}.sharedBus", disk["shared_bus"].removesuffix("Sharing"))] if disk["shared_bus"] != "noSharing" else []
            )
            found += [*model, *sharing, (f"{bus}.present", "TRUE")]
        node = node_of(disk)
        found += [
            (f"{node}.deviceType", ADAPTERS.get(disk["bus"], "scsi-hardDisk")),
            (f"{node}.fileName", named(state, vm, disk["top"])),
        ]
        if disk["mode"] != "persistent":
            found.append((f"{node}.mode", disk["mode"].replace("_", "-")))
        if disk["sharing"] != "sharingNone":
            found.append((f"{node}.sharing", "multi-writer"))
        if disk["rdm"] != NO_RDM:
            found.append((f"{node}.deviceType", "rdm"))
        found += [(f"{node}.present", "TRUE"), (f"{node}.redo", "")]
    return found


def _nics(vm: Vm) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    kinds = {"generated": "generated", "assigned": "vpx", "manual": "static"}
    for number, nic in enumerate(vm["nics"]):
        name = f"ethernet{number}"
        address = "address" if nic["address_type"] == "manual" else "generatedAddress"
        found += [
            (f"{name}.virtualDev", nic["model"]),
            (f"{name}.networkName", nic["network"]),
            (f"{name}.addressType", kinds[nic["address_type"]]),
            (f"{name}.{address}", nic["mac"]),
        ]
        if not nic["connected"]:
            found.append((f"{name}.startConnected", "FALSE"))
        found.append((f"{name}.present", "TRUE"))
    return found


def _vmsd(state: State, vm: Vm, folder: str) -> list[tuple[str, str]]:
    found = [(".encoding", "UTF-8"), ("snapshot.lastUID", str(vm["last_uid"]))]
    found.append(("snapshot.current", str(vm["current"])))
    for number, one in enumerate(vm["snapshots"]):
        name = f"snapshot{number}"
        micro = int(one["created"] * 1e6)
        low = micro & 0xFFFF_FFFF
        found += [
            (f"{name}.uid", str(one["id"])),
            (f"{name}.filename", f"{vm['file'].removesuffix('.vmx')}-Snapshot{one['id']}.vmsn"),
        ]
        found += [(f"{name}.parent", str(one["parent"]))] if one["parent"] else []
        found += [
            (f"{name}.displayName", one["name"]),
            (f"{name}.description", one["description"]),
            (f"{name}.createTimeHigh", str(micro >> 32)),
            (f"{name}.createTimeLow", str(low - (1 << 32) if low >> 31 else low)),
        ]
        frozen = [(disk, path) for disk, path in zip(vm["disks"], one["paths"], strict=True) if path]
        found.append((f"{name}.numDisks", str(len(frozen))))
        for place, (disk, path) in enumerate(frozen):
            found += [(f"{name}.disk{place}.fileName", named(state, vm, path)), (f"{name}.disk{place}.node", node_of(disk))]
    return [*found, ("snapshot.numSnapshots", str(len(vm["snapshots"])))]


def named(state: State, vm: Vm, path: str) -> str:
    """As .vmx and .vmsd name a file: bare in the VM's own directory, whole anywhere else."""
    return paths.name_of(path) if paths.folder_of(path) == directory(state, vm) else path


def spaced(uuid: str) -> str:
    """`56 4d 37 9a 56 54 a8 b9-da ab 2e d3 52 d8 3b e0`"""
    raw = bytes.fromhex(uuid.replace("-", ""))
    return f"{raw[:8].hex(' ')}-{raw[8:].hex(' ')}"
