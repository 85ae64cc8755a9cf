"""A VM's hardware as vim-cmd prints it: device.getdevices."""

from __future__ import annotations

from tokvm.testing.esxi import paths
from tokvm.testing.esxi.dump import UNSET, Many, Null, Object, Ref, Value, dump
from tokvm.testing.esxi.state import COWD, FLAT, NO_RDM, Disk, Layer, Nic, State, Vm, chain

FIRST_CONTROLLER = {"ide": 200, "scsi": 1000, "sata": 15000, "nvme": 31000}
FIRST_DISK = {"ide": (3000, 2), "scsi": (2000, 16), "sata": (16000, 30), "nvme": (32000, 15)}
CONTROLLERS = {
    "ide": ("VirtualIDEController", "IDE"),
    "pvscsi": ("ParaVirtualSCSIController", "VMware paravirtual SCSI"),
    "lsilogic": ("VirtualLsiLogicController", "LSI Logic"),
    "lsisas1068": ("VirtualLsiLogicSASController", "LSI Logic SAS"),
    "buslogic": ("VirtualBusLogicController", "BusLogic"),
    "ahci": ("VirtualAHCIController", "AHCI"),
    "nvme": ("VirtualNVMEController", "NVME Controller"),
}
CARDS = {"vmxnet3": "VirtualVmxnet3", "e1000e": "VirtualE1000e", "e1000": "VirtualE1000", "vmxnet2": "VirtualVmxnet2"}
NO_BACKING = Null("vim.vm.device.VirtualDevice.BackingInfo")
NO_CONNECTION = Null("vim.vm.device.VirtualDevice.ConnectInfo")
NO_SLOT = Null("vim.vm.device.VirtualDevice.BusSlotInfo")
KiB = 1 << 10


def devices(state: State, vm: Vm) -> str:
    return "Devices:\n\n" + dump(_hardware(state, vm), style=state["options"]["dumps"])


def _hardware(state: State, vm: Vm) -> Object:
    fields = vm["fields"]
    found: list[Value] = [_device("VirtualPCIController", 100, "PCI controller 0", "PCI controller 0", busNumber=0)]
    found += _controllers(vm)
    found += [_disk(state, vm, disk, number) for number, disk in enumerate(vm["disks"], start=1)]
    found += [_cdrom()]
    found += [_nic(nic, number) for number, nic in enumerate(vm["nics"])]
    if fields["vtpm"]:
        found.append(
            _device(
                "VirtualTPM", 11000, "Virtual TPM", "Trusted Platform Module", endorsementKeyCertificateSigningRequest=UNSET
            )
        )
    return Object(
        "vim.vm.VirtualHardware",
        [
            ("numCPU", int(str(fields["numCPU"]))),
            ("numCoresPerSocket", 1),
            ("memoryMB", int(str(fields["memoryMB"]))),
            ("virtualICH7MPresent", False),
            ("virtualSMCPresent", False),
            ("device", Many("vim.vm.device.VirtualDevice", found)),
        ],
    )


def _device(
    type_: str,
    key: int,
    label: str,
    summary: str,
    *,
    backing: Value = NO_BACKING,
    connectable: Value = NO_CONNECTION,
    slot: Value = NO_SLOT,
    **more: Value,
) -> Value:
    info = Object("vim.Description", [("label", label), ("summary", summary)])
    fields: list[tuple[str, Value]] = [("key", key), ("deviceInfo", info), ("backing", backing), ("connectable", connectable)]
    fields += [("slotInfo", slot)]
    if "controllerKey" not in more:
        fields += [("controllerKey", UNSET), ("unitNumber", UNSET)]
    return Object(f"vim.vm.device.{type_}", [*fields, *more.items()])


def _controllers(vm: Vm) -> list[Value]:
    found: list[Value] = [
        _device("VirtualIDEController", 200 + bus, f"IDE {bus}", f"IDE {bus}", busNumber=bus) for bus in (0, 1)
    ]
    done: set[tuple[str, int]] = {("ide", 0), ("ide", 1)}
    for disk in vm["disks"]:
        bus = (disk["bus"], disk["bus_number"])
        if bus in done:
            continue
        done.add(bus)
        type_, summary = CONTROLLERS[disk["controller"]]
        keys = Many("int", [disk_key(one) for one in vm["disks"] if (one["bus"], one["bus_number"]) == bus])
        more: dict[str, Value] = {"controllerKey": 100, "unitNumber": 3, "busNumber": bus[1], "device": keys}
        if disk["bus"] == "scsi":
            more |= {"hotAddRemove": True, "sharedBus": disk["shared_bus"], "scsiCtlrUnitNumber": 7}
        label = f"{disk['bus'].upper()} controller {bus[1]}"
        found.append(_device(type_, controller_key(disk), label, summary, **more))
    return found


def controller_key(disk: Disk) -> int:
    return FIRST_CONTROLLER[disk["bus"]] + disk["bus_number"]


def disk_key(disk: Disk) -> int:
    first, units = FIRST_DISK[disk["bus"]]
    return first + units * disk["bus_number"] + disk["unit"]


def _disk(state: State, vm: Vm, disk: Disk, number: int) -> Value:
    layers = chain(state, disk["top"])
    size = layers[0]["size"]
    return _device(
        "VirtualDisk",
        disk_key(disk),
        f"Hard disk {number}",
        f"{size // KiB:,} KB",
        backing=_raw_backing(state, disk, layers) if disk["rdm"] != NO_RDM else _backing(state, vm, disk, layers),
        controllerKey=controller_key(disk),
        unitNumber=disk["unit"],
        capacityInKB=size // KiB,
        capacityInBytes=size,
        shares=Object("vim.SharesInfo", [("shares", 1000), ("level", "normal")]),
        diskObjectId=f"{vm['vmid']}-{disk_key(disk)}",
        nativeUnmanagedLinkedClone=UNSET,
    )


def _backing(state: State, vm: Vm, disk: Disk, layers: list[Layer]) -> Value:
    """The whole chain, each file inside of the one above. Deltas are FlatVer2 too: what they are is in deltaDiskFormat."""
    type_ = "vim.vm.device.VirtualDisk.FlatVer2BackingInfo"
    top, below = layers[0], layers[1:]
    key = Object("vim.encryption.CryptoKeyId", [("keyId", "b2f3"), ("providerId", Null("vim.encryption.KeyProviderId"))])
    formats: dict[str, Value] = {FLAT: UNSET, COWD: "redoLogFormat"}
    return Object(
        type_,
        [
            ("fileName", paths.bracketed(state, top["path"])),
            ("datastore", Ref(f"vim.Datastore:{top['path'].split('/')[3]}")),
            ("backingObjectId", ""),
            ("diskMode", disk["mode"]),
            ("split", False),
            ("writeThrough", False),
            ("thinProvisioned", top["thin"] or top["kind"] != FLAT),
            ("eagerlyScrub", UNSET),
            ("uuid", disk["uuid"]),
            ("contentId", f"{top['cid']:032x}"),
            ("changeId", UNSET),
            ("parent", _backing(state, vm, disk, below) if below else Null(type_)),
            ("deltaDiskFormat", formats.get(top["kind"], "seSparseFormat")),
            ("digestEnabled", False),
            ("deltaGrainSize", UNSET),
            ("deltaDiskFormatVariant", UNSET),
            ("sharing", disk["sharing"]),
            ("keyId", key if vm["fields"]["encrypted"] else Null("vim.encryption.CryptoKeyId")),
        ],
    )


def _raw_backing(state: State, disk: Disk, layers: list[Layer]) -> Value:
    type_ = "vim.vm.device.VirtualDisk.RawDiskMappingVer1BackingInfo"
    top, below = layers[0], layers[1:]
    return Object(
        type_,
        [
            ("fileName", paths.bracketed(state, top["path"])),
            ("datastore", Ref(f"vim.Datastore:{top['path'].split('/')[3]}")),
            ("lunUuid", "0200000000600508b1001c577e11dd042e142a583f4c4f47"),
            ("deviceName", "vml.0200000000600508b1001c577e11dd042e142a583f4c4f47"),
            ("compatibilityMode", disk["rdm"]),
            ("diskMode", disk["mode"]),
            ("uuid", disk["uuid"]),
            ("contentId", f"{top['cid']:032x}"),
            ("changeId", UNSET),
            ("parent", _raw_backing(state, disk, below) if below else Null(type_)),
            ("sharing", disk["sharing"]),
        ],
    )


def _cdrom() -> Value:
    backing = Object("vim.vm.device.VirtualCdrom.RemotePassthroughBackingInfo", [("deviceName", ""), ("useAutoDetect", False)])
    return _device("VirtualCdrom", 3002, "CD/DVD drive 1", "Remote device", backing=backing, controllerKey=201, unitNumber=0)


def _nic(nic: Nic, number: int) -> Value:
    network = "vim.vm.device.VirtualEthernetCard.NetworkBackingInfo"
    backing = Object(
        network,
        [("deviceName", nic["network"]), ("useAutoDetect", False), ("network", Ref(f"vim.Network:HaNetwork-{nic['network']}"))],
    )
    connected: list[tuple[str, Value]] = [("startConnected", nic["connected"]), ("allowGuestControl", True)]
    connect = Object("vim.vm.device.VirtualDevice.ConnectInfo", [*connected, ("connected", False), ("status", "untried")])
    return _device(
        CARDS[nic["model"]],
        4000 + number,
        f"Network adapter {number + 1}",
        nic["network"],
        backing=backing,
        connectable=connect,
        controllerKey=100,
        unitNumber=7 + number,
        slot=Object("vim.vm.device.VirtualDevice.PciBusSlotInfo", [("pciSlotNumber", 192 + 32 * number)]),
        addressType=nic["address_type"],
        macAddress=nic["mac"],
        wakeOnLanEnabled=True,
    )
