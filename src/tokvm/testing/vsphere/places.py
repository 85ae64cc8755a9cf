"""Properties of everything but VMs: datacenter, hosts, cluster, datastores, networks, managers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pyVmomi import vim

from tokvm.testing.vsphere.inventory import HOST, IDS, OTHER_HOST

if TYPE_CHECKING:
    from tokvm.testing.esxi.state import Datastore
    from tokvm.testing.vsphere.inventory import Inventory

GREEN = vim.ManagedEntity.Status.green
MAX_FILE = 64 << 40


def about(inventory: Inventory) -> Any:
    options = inventory.world.state["options"]
    vcenter = inventory.vcenter
    product = "VMware vCenter Server" if vcenter else "VMware ESXi"
    return vim.AboutInfo(
        name=product,
        fullName=f"{product} {options['version']} build-{options['build']}",
        vendor="VMware, Inc.",
        version=options["version"],
        patchLevel="0",
        build=options["build"],
        osType="linux-x64" if vcenter else "vmnix-x86",
        productLineId="vpx" if vcenter else "embeddedEsx",
        apiType="VirtualCenter" if vcenter else "HostAgent",
        apiVersion=f"{options['version']}.0",
        instanceUuid="0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0" if vcenter else None,
        licenseProductName="VMware VirtualCenter Server" if vcenter else "VMware ESX Server",
        licenseProductVersion="8.0",
    )


# Hosts


def is_here(this: Any) -> bool:
    """Whether it is the host that we play, and not the one that VMs go away to."""
    return this._moId in IDS[HOST]


def autostart_config(inventory: Inventory, this: Any) -> Any:
    entries = [
        vim.host.AutoStartManager.AutoPowerInfo(key=one.ref, **one.vm["autostart"])
        for one in inventory.machines()
        if one.vm["autostart"] is not None
    ]
    defaults = vim.host.AutoStartManager.SystemDefaults(
        enabled=inventory.world.state["options"]["autostart"],
        startDelay=120,
        stopDelay=120,
        waitForHeartbeat=False,
        stopAction="powerOff",
    )
    here = this._moId in (*IDS[HOST], *IDS["autostart"])
    return vim.host.AutoStartManager.Config(defaults=defaults, powerInfo=entries if here else [])


def host_config(inventory: Inventory, this: Any) -> Any:
    product = about(inventory)
    product.name, product.apiType, product.productLineId = "VMware ESXi", "HostAgent", "embeddedEsx"
    return vim.host.ConfigInfo(host=this, product=product, autoStart=autostart_config(inventory, this))


def host_runtime(_inventory: Inventory, _this: Any) -> Any:
    return vim.host.RuntimeInfo(connectionState="connected", powerState="poweredOn", inMaintenanceMode=False)


def host_summary(inventory: Inventory, this: Any) -> Any:
    config = vim.host.Summary.ConfigSummary(
        name=inventory.node(this).name,
        port=443,
        sslThumbprint=inventory.endpoint.thumbprint,
        vmotionEnabled=inventory.vcenter,
        faultToleranceEnabled=False,
        product=host_config(inventory, this).product,
    )
    return vim.host.Summary(
        host=this,
        config=config,
        runtime=host_runtime(inventory, this),
        quickStats=vim.host.Summary.QuickStats(),
        overallStatus=GREEN,
        rebootRequired=False,
        managementServerIp=inventory.world.state["options"]["vcenter"] or None,
    )


def host_managers(inventory: Inventory, this: Any) -> Any:
    name = "autostart" if is_here(this) else "other autostart"
    return vim.host.ConfigManager(autoStartManager=inventory.ref(vim.host.AutoStartManager, name))


def host_machines(inventory: Inventory, this: Any) -> list[Any]:
    return [one.ref for one in inventory.machines() if one.vm["away"] != is_here(this)]


def machine_host(inventory: Inventory, away: bool) -> Any:  # noqa: FBT001
    return inventory.ref(vim.HostSystem, OTHER_HOST if away else HOST)


# The cluster


def cluster_configuration(inventory: Inventory, _this: Any) -> Any:
    """Of its VMs only those that do not follow it are named."""
    own = inventory.world.own
    refs = {one.vm["guest"]: one.ref for one in inventory.machines()}
    das, drs = [], []
    for guest, override in own["overrides"].items():
        if guest in refs and override["restart_priority"]:
            settings = vim.cluster.DasVmSettings(restartPriority=override["restart_priority"])
            das.append(vim.cluster.DasVmConfigInfo(key=refs[guest], dasSettings=settings))
        if guest in refs and override["drs"]:
            enabled = override["drs"] != "disabled"
            behavior = override["drs"] if enabled else None
            drs.append(vim.cluster.DrsVmConfigInfo(key=refs[guest], enabled=enabled, behavior=behavior))
    return vim.cluster.ConfigInfoEx(
        vmSwapPlacement="vmDirectory",
        dasConfig=vim.cluster.DasConfigInfo(
            enabled=own["options"]["ha"], defaultVmSettings=vim.cluster.DasVmSettings(restartPriority="medium")
        ),
        dasVmConfig=das,
        drsConfig=vim.cluster.DrsConfigInfo(
            enabled=own["options"]["drs"], enableVmBehaviorOverrides=True, defaultVmBehavior="fullyAutomated", vmotionRate=3
        ),
        drsVmConfig=drs,
    )


def cluster_hosts(inventory: Inventory, this: Any) -> list[Any]:
    return [one for one in inventory.children(this) if isinstance(one, vim.HostSystem)]


def pool(inventory: Inventory, _this: Any) -> Any:
    return inventory.ref(vim.ResourcePool, "pool")


# Datastores and networks


def datastore_refs(inventory: Inventory, _this: Any) -> list[Any]:
    return inventory.children(inventory.ref(vim.Folder, "datastores"))


def network_refs(inventory: Inventory, _this: Any) -> list[Any]:
    return inventory.children(inventory.ref(vim.Folder, "networks"))


def store_of(inventory: Inventory, this: Any) -> Datastore:
    number = [one._moId for one in datastore_refs(inventory, this)].index(this._moId)
    return inventory.world.state["datastores"][number]


def datastore_summary(inventory: Inventory, this: Any) -> Any:
    store = store_of(inventory, this)
    return vim.Datastore.Summary(
        datastore=this,
        name=store["name"],
        url=f"ds:///vmfs/volumes/{store['uuid']}/",
        capacity=store["size"],
        freeSpace=store["free"],
        uncommitted=0,
        accessible=True,
        multipleHostAccess=inventory.vcenter,
        type="VMFS" if store["type"].startswith("VMFS") else store["type"],
        maintenanceMode="normal",
    )


def datastore_info(inventory: Inventory, this: Any) -> Any:
    store = store_of(inventory, this)
    common = {
        "name": store["name"],
        "url": f"/vmfs/volumes/{store['uuid']}",
        "freeSpace": store["free"],
        "maxFileSize": MAX_FILE,
        "maxMemoryFileSize": MAX_FILE,
    }
    if not store["type"].startswith("VMFS"):
        return vim.host.NasDatastoreInfo(**common)
    major = int(store["type"].removeprefix("VMFS-"))
    volume = vim.host.VmfsVolume(
        type="VMFS",
        name=store["name"],
        capacity=store["size"],
        blockSizeMb=1,
        maxBlocks=MAX_FILE >> 20,
        majorVersion=major,
        version=f"{major}.82",
        uuid=store["uuid"],
        extent=[vim.host.ScsiDisk.Partition(diskName="mpx.vmhba0:C0:T0:L0", partition=1)],
        vmfsUpgradable=False,
    )
    return vim.host.VmfsDatastoreInfo(**common, maxPhysicalRDMFileSize=MAX_FILE, maxVirtualRDMFileSize=MAX_FILE, vmfs=volume)


def datastore_machines(inventory: Inventory, this: Any) -> list[Any]:
    uuid = store_of(inventory, this)["uuid"]
    return [one.ref for one in inventory.machines() if one.vm["datastore"] == uuid]


# Managers


def current_session(inventory: Inventory, _this: Any) -> Any:
    return inventory.endpoint.caller().described()


def licences(inventory: Inventory, _this: Any) -> list[Any]:
    free = inventory.world.own["options"]["free_licence"]
    name, edition = ("VMware vSphere 8 Hypervisor", "esxBasic") if free else ("VMware vSphere 8 Enterprise Plus", "esx.ent")
    key = "00000-00000-00000-00000-00000"
    return [vim.LicenseManager.LicenseInfo(licenseKey=key, editionKey=edition, name=name, total=0, costUnit="cpuPackage")]


def recent_tasks(inventory: Inventory, this: Any) -> list[Any]:
    entity = this if isinstance(this, vim.ManagedEntity) else None
    return [vim.Task(key, None) for key in inventory.endpoint.tasks.keys_of(entity)]
