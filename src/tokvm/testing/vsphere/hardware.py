"""VirtualMachine.config, of now or of a snapshot: hardware with its disks' backing chains, NICs, switches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pyVmomi import vim

from tokvm.testing.esxi.state import COWD, FLAT, SESPARSE, Disk, Layer, Nic, Snapshot
from tokvm.testing.vsphere.clock import moment
from tokvm.testing.vsphere.machine import Machine, controller_key, disk_key, escaped, frozen_tops, has_extents

ChangeId = Callable[[Disk], str | None]

DELTA_FORMATS = {FLAT: None, SESPARSE: "seSparseFormat", COWD: "redoLogFormat"}
CONTROLLERS: dict[str, Any] = {
    "pvscsi": vim.vm.device.ParaVirtualSCSIController,
    "lsilogic": vim.vm.device.VirtualLsiLogicController,
    "lsisas1068": vim.vm.device.VirtualLsiLogicSASController,
    "buslogic": vim.vm.device.VirtualBusLogicController,
    "ahci": vim.vm.device.VirtualAHCIController,
    "nvme": vim.vm.device.VirtualNVMEController,
    "ide": vim.vm.device.VirtualIDEController,
}
CARDS: dict[str, Any] = {
    "vmxnet3": vim.vm.device.VirtualVmxnet3,
    "e1000": vim.vm.device.VirtualE1000,
    "e1000e": vim.vm.device.VirtualE1000e,
    "vmxnet2": vim.vm.device.VirtualVmxnet2,
    "vlance": vim.vm.device.VirtualPCNet32,
}
PCI, TPM, CARD = 100, 11000, 4000


def config(
    machine: Machine, snapshot: Snapshot | None, *, change_version: str, tracking: bool, extra: Mapping[str, str], ids: ChangeId
) -> Any:
    """VirtualMachineConfigInfo. ids: the changeId of each disk, if it has one."""
    return vim.vm.ConfigInfo(
        changeVersion=change_version,
        modified=moment(0),
        name=escaped(machine.name),
        guestFullName=machine.field("guestFullName"),
        version=machine.field("version"),
        uuid=machine.uuid,
        instanceUuid=machine.instance_uuid,
        template=bool(machine.field("template")),
        guestId=machine.field("guestId"),
        alternateGuestName="",
        annotation=machine.field("annotation"),
        files=vim.vm.FileInfo(
            vmPathName=machine.vmx_path,
            snapshotDirectory=machine.bracketed(f"{machine.folder}/"),
            logDirectory=machine.bracketed(f"{machine.folder}/"),
        ),
        flags=vim.vm.FlagInfo(snapshotDisabled=False, snapshotLocked=False),
        defaultPowerOps=vim.vm.DefaultPowerOpInfo(powerOffType="soft"),
        hardware=hardware(machine, snapshot, ids),
        extraConfig=[vim.option.OptionValue(key=key, value=value) for key, value in extra.items()],
        changeTrackingEnabled=tracking,
        firmware=machine.field("firmware"),
        bootOptions=vim.vm.BootOptions(efiSecureBootEnabled=bool(machine.field("secureBoot"))),
        keyId=vim.encryption.CryptoKeyId(keyId="00000000-0000") if machine.field("encrypted") else None,
    )


def hardware(machine: Machine, snapshot: Snapshot | None, ids: ChangeId) -> Any:
    return vim.vm.VirtualHardware(
        numCPU=machine.field("numCPU"),
        numCoresPerSocket=1,
        memoryMB=machine.field("memoryMB"),
        device=list(_devices(machine, snapshot, ids)),
    )


def _devices(machine: Machine, snapshot: Snapshot | None, ids: ChangeId) -> Iterator[Any]:
    yield vim.vm.device.VirtualPCIController(key=PCI, deviceInfo=_label("PCI controller 0"), busNumber=0)
    yield from _controllers(machine)
    for number, (disk, top) in enumerate(zip(machine.vm["disks"], frozen_tops(machine, snapshot), strict=True)):
        if top:
            yield _disk(machine, disk, top, number, ids(disk))
    for number, nic in enumerate(machine.vm["nics"]):
        yield _card(nic, number)
    if machine.field("vtpm"):
        yield vim.vm.device.VirtualTPM(key=TPM, deviceInfo=_label("Virtual TPM"))


def _controllers(machine: Machine) -> Iterator[Any]:
    for key, disk in {controller_key(one): one for one in machine.vm["disks"]}.items():
        keys = [disk_key(one) for one in machine.vm["disks"] if controller_key(one) == key]
        label = _label(f"{disk['bus'].upper()} controller {disk['bus_number']}")
        made = CONTROLLERS[disk["controller"]](key=key, deviceInfo=label, busNumber=disk["bus_number"], device=keys)
        if disk["bus"] == "scsi":
            made.sharedBus = vim.vm.device.VirtualSCSIController.Sharing(disk["shared_bus"])
            made.scsiCtlrUnitNumber, made.hotAddRemove = 7, True
        if disk["bus"] != "ide":
            made.controllerKey = PCI
        yield made


def _disk(machine: Machine, disk: Disk, top: str, number: int, change_id: str | None) -> Any:
    layers = machine.layers(top)
    backing = None
    for layer in reversed(layers):
        backing = _backing(machine, disk, layer, backing)
    if backing is not None:
        backing.changeId = change_id
    size = layers[0]["size"]
    return vim.vm.device.VirtualDisk(
        key=disk_key(disk),
        deviceInfo=_label(f"Hard disk {number + 1}", f"{size // 1024:,} KB"),
        backing=backing,
        controllerKey=controller_key(disk),
        unitNumber=disk["unit"],
        capacityInKB=size // 1024,
        capacityInBytes=size,
        diskObjectId=f"{machine.vm['vmid']}-{disk_key(disk)}",
    )


def _backing(machine: Machine, disk: Disk, layer: Layer, parent: Any) -> Any:
    name = machine.bracketed(layer["path"])
    store = datastore_ref(layer["path"].split("/")[3], machine)
    if disk["rdm"] and layer["kind"] == FLAT:
        return vim.vm.device.VirtualDisk.RawDiskMappingVer1BackingInfo(
            fileName=name,
            datastore=store,
            lunUuid="0200000000600508b1001c3f4b4f4a4b4c4d4e4f50",
            deviceName="vml.0200000000600508b1001c3f4b4f4a4b4c4d4e4f50",
            compatibilityMode=disk["rdm"],
            diskMode=disk["mode"],
            uuid=disk["uuid"],
        )
    return vim.vm.device.VirtualDisk.FlatVer2BackingInfo(
        fileName=name,
        datastore=store,
        backingObjectId="" if has_extents(machine.state, layer["path"]) else f"vsan:{disk['uuid']}",
        diskMode=disk["mode"],
        split=False,
        writeThrough=False,
        thinProvisioned=layer["thin"],
        uuid=disk["uuid"],
        contentId=f"{layer['cid']:08x}" * 4,
        deltaDiskFormat=DELTA_FORMATS[layer["kind"]],
        parent=parent,
        digestEnabled=False,
        sharing=disk["sharing"],
    )


def _card(nic: Nic, number: int) -> Any:
    return CARDS[nic["model"]](
        key=CARD + number,
        deviceInfo=_label(f"Network adapter {number + 1}", nic["network"]),
        backing=vim.vm.device.VirtualEthernetCard.NetworkBackingInfo(deviceName=nic["network"]),
        connectable=vim.vm.device.VirtualDevice.ConnectInfo(
            startConnected=nic["connected"], allowGuestControl=True, connected=nic["connected"]
        ),
        controllerKey=PCI,
        unitNumber=7 + number,
        slotInfo=vim.vm.device.VirtualDevice.PciBusSlotInfo(pciSlotNumber=192 + 32 * number),
        addressType=nic["address_type"],
        macAddress=nic["mac"],
    )


def datastore_ref(uuid: str, machine: Machine) -> Any:
    number = next(at for at, one in enumerate(machine.state["datastores"]) if one["uuid"] == uuid)
    return vim.Datastore(f"datastore-{11 + number}" if machine.vcenter else uuid, None)


def _label(label: str, summary: str = "") -> Any:
    return vim.Description(label=label, summary=summary or label)
