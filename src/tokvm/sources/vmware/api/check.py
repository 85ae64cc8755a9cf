"""What is in the way of one VM, before anything is done to it. Reads only, and fresh, whatever the caller knew before."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tokvm.core.errors import ConnectionLost, SourceError
from tokvm.core.machine import Finding, VirtualMachine
from tokvm.core.text import readable
from tokvm.sources.vmware import obstacles
from tokvm.sources.vmware import record as ssh_record
from tokvm.sources.vmware.api import faults, fence, inventory, properties, questions, record, stores, tracking
from tokvm.sources.vmware.api.client import Client
from tokvm.sources.vmware.api.datastores import split_path
from tokvm.sources.vmware.api.inventory import Facts, Machines
from tokvm.sources.vmware.api.machine import networks_of, type_name
from tokvm.sources.vmware.api.stores import Store
from tokvm.sources.vmware.api.vmomi import vim
from tokvm.sources.vmware.obstacles import blocker, warning

log = logging.getLogger(__name__)

VM_PRIVILEGES = (
    "VirtualMachine.State.CreateSnapshot",
    "VirtualMachine.State.RemoveSnapshot",
    "VirtualMachine.Interact.PowerOff",
    "VirtualMachine.Interact.PowerOn",
    "VirtualMachine.Config.AdvancedConfig",
)
FILE_PRIVILEGES = ("Datastore.Browse", "Datastore.FileManagement")
LEASE_PRIVILEGE = "VApp.Export"
TRACKING_PRIVILEGE = "VirtualMachine.Config.ChangeTracking"


@dataclass(frozen=True, slots=True)
class Means:
    """How the disks will be read. cbt: tracking of changed blocks is asked for. ssh, nbd: bytes come that way."""

    ssh: bool = False
    nbd: bool = False
    cbt: bool = False


Beside = Callable[[Facts, str], bytes]
"""All of a small file in the VM's directory, by its name. SourceError when there is none, or it may not be read."""


def findings(
    client: Client, machines: Machines, vm: VirtualMachine, own: set[str], means: Means, beside: Beside
) -> list[Finding]:
    """`own`: owners' names under which this process holds VMs."""
    try:
        facts = machines.facts(vm.uuid)
    except faults.VsphereError as failed:
        return [blocker(failed.what, failed.fix, vm.uuid)]
    places = stores.of_vm(client, facts.ref)
    return [
        *_licence(client),
        *_hardware(facts),
        *_state(facts),
        *_held(facts, vm.uuid, own),
        *_held_over_ssh(facts, beside),
        *_snapshots(facts),
        *_disks(vm, facts, places, means),
        *_tracking(facts, means),
        *_privileges(client, facts, means),
        *_cluster(client, facts),
    ]


def _licence(client: Client) -> Iterator[Finding]:
    """A free ESXi reads all through the API, and changes nothing."""
    manager = client.content.licenseManager
    if client.is_vcenter or manager is None:
        return
    found = properties.read_one(client, manager, ["licenses"], doing="reading the host's licence").values.get("licenses") or ()
    if found and all(str(one.editionKey or "") == "esxBasic" for one in found):
        yield blocker(
            "its host has the free licence, which lets nothing be changed through the API (RestrictedVersion)",
            "use SSH instead: esx://root@HOST",
        )


def _hardware(facts: Facts) -> Iterator[Finding]:
    config, kinds = facts.config, [type_name(one) for one in facts.config.hardware.device or ()]
    return obstacles.hardware(
        template=bool(config.template),
        encrypted=getattr(config, "keyId", None) is not None or any(disk.device.encrypted for disk in facts.disks),
        tpm=inventory.has_tpm(config.hardware),
        persistent_memory="VirtualNVDIMM" in kinds,
        passed_through=[kind for kind in kinds if kind in ("VirtualPCIPassthrough", "VirtualSCSIPassthrough")],
        macs=[mac for _, mac, _ in networks_of(config.hardware)],
    )


def _state(facts: Facts) -> Iterator[Finding]:
    question = facts.runtime.question
    return obstacles.state(
        power=facts.power,
        question="" if question is None else questions.text_of(question),
        fault_tolerance=str(facts.runtime.faultToleranceState or "notConfigured"),
        tools_running=facts.tools == "guestToolsRunning",
    )


def _snapshots(facts: Facts) -> Iterator[Finding]:
    needed = bool(facts.runtime.consolidationNeeded)
    return obstacles.snapshots([one.name for one in facts.snapshots], needs_consolidation=needed)


def _held(facts: Facts, uuid: str, own: set[str]) -> Iterator[Finding]:
    ours = record.parse(facts.config.extraConfig, f"VM {uuid}")
    if ours.owner and ours.owner not in own:
        yield blocker(
            f"it is claimed by another run: {readable(ours.owner)}",
            f"finish that migration; if nobody runs it, remove {record.KEY} (Edit Settings, Advanced Parameters)",
        )
    if ours.fence is not None and ours.owner not in own:
        yield blocker(
            f"it is fenced: {readable(ours.fence.reason)}",
            "it was migrated already, or a cutover is under way: `tokvm status` there, `tokvm rollback` lifts the fence",
        )


def _held_over_ssh(facts: Facts, beside: Beside) -> Iterator[Finding]:
    """Who migrates it over SSH has a file beside it."""
    try:
        raw = beside(facts, ssh_record.OWNER)
    except ConnectionLost:
        raise
    except SourceError as none:
        log.debug("no claim over SSH: %s", none.what)
        return
    yield blocker(
        f"another tokvm migrates this VM over SSH: {readable(raw.decode('utf-8', 'replace').strip(), limit=200)}",
        f"go on there, or `tokvm finish` it there; only when that state is lost: remove {ssh_record.OWNER} from its directory",
    )


def _disks(vm: VirtualMachine, facts: Facts, places: dict[str, Store], means: Means) -> Iterator[Finding]:
    if not facts.disks:
        yield obstacles.no_disk()
    if [disk.key for disk in facts.disks] != [disk.key for disk in vm.disks]:
        yield blocker("its disks changed while it was looked at", "run the same command again")
    for disk in facts.disks:
        yield from obstacles.disk(disk.device)
        if disk.layers and not disk.device.rdm:
            yield from _storage(disk.layers, places, means, f"disk {disk.node}")
    yield from _room(facts, places)


def _storage(layers: tuple[str, ...], places: dict[str, Store], means: Means, where: str) -> Iterator[Finding]:
    try:
        names = {split_path(path, lambda: places)[0] for path in layers}
    except SourceError as odd:
        yield blocker(odd.what, odd.fix, where)
        return
    for name in sorted(names):
        store = places.get(name)
        if store is None or not store.accessible:
            yield blocker(f"its datastore {readable(name)!r} cannot be reached", "connect it to the VM's host", where)
        elif not store.has_files and not means.nbd:
            yield blocker(
                f"it lies on {store.type}, where a disk is no file: what changes after the first copy cannot be read",
                "move it to VMFS or NFS (storage migration), or read it through your own NBD server (--nbd)",
                where,
            )


def _room(facts: Facts, places: dict[str, Store]) -> Iterator[Finding]:
    sizes: dict[str, int] = {}
    for disk in facts.disks:
        for path in disk.layers[:1]:
            name = next((name for name in places if path.startswith(f"[{name}] ")), "")
            sizes[name] = sizes.get(name, 0) + disk.size
    for name, size in sizes.items():
        store = places.get(name)
        if store is not None:
            yield from obstacles.room(name, free=store.free, need=size)


def _tracking(facts: Facts, means: Means) -> Iterator[Finding]:
    why = tracking.problem(facts) if means.cbt else ""
    if why:
        yield blocker(f"changed blocks cannot be tracked: {why}", "leave --enable-cbt out, or change that first")


def _privileges(client: Client, facts: Facts, means: Means) -> Iterator[Finding]:
    wanted = list(VM_PRIVILEGES)
    if not (means.ssh or means.nbd):
        wanted += [*FILE_PRIVILEGES, LEASE_PRIVILEGE]
    if means.cbt:
        wanted.append(TRACKING_PRIVILEGE)
    missing = _missing(client, facts.ref, wanted)
    if missing:
        yield blocker(
            f"the user lacks privileges on it: {', '.join(missing)}",
            "add them to its role; docs/vsphere-calls.md says what each is for",
        )


def _missing(client: Client, entity: Any, wanted: list[str]) -> list[str]:
    """Those of the privileges that the login does not have; none known where the server does not tell."""
    manager = client.content.authorizationManager
    if manager is None:
        return []
    ask: Callable[[], Any] = lambda: manager.HasPrivilegeOnEntities(  # noqa: E731
        entity=[entity], sessionId=client.session_key, privId=wanted
    )
    try:
        found = client.ask(ask, "asking for the user's privileges")
    except faults.VsphereError as failed:
        log.info("%s", failed.what)
        return []
    told = {str(one.privId): bool(one.isGranted) for each in found or () for one in each.privAvailability or ()}
    return [name for name in wanted if told.get(name) is False]


def _cluster(client: Client, facts: Facts) -> Iterator[Finding]:
    try:
        switches = fence.look(client, facts.ref)
    except SourceError as failed:
        yield warning(f"its host cannot be looked at ({failed.what})", "let the role read hosts and clusters")
        return
    if switches.cluster is not None and _missing(client, switches.cluster, ["Host.Inventory.EditCluster"]):
        yield warning(
            "its cluster's HA is on, and the user may not tell it to leave the VM alone while it is moved",
            "give the role Host.Inventory.EditCluster on the cluster, or set the VM's restart priority to disabled by hand",
        )
    if not client.is_vcenter:
        managed = properties.read_one(
            client, client.ref(vim.HostSystem, switches.host), ["summary.managementServerIp"], doing="reading the host"
        ).values.get("summary.managementServerIp")
        if managed:
            yield warning(
                f"its host is managed by the vCenter {readable(str(managed), limit=60)}, which may move or restart the VM",
                "use that instead: vpx://USER@VCENTER",
            )
