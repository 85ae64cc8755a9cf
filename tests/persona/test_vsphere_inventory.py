"""The played vSphere's inventory: pages, traversals, searches, and every property of every kind of object."""

from __future__ import annotations

from typing import Any

import pytest
from pyVmomi import vim, vmodl
from tests.persona.conftest import BuildVSphere, MiB
from tests.persona.vsphere_client import all_of, connected, disks, machine, read, snapshot

from tokvm.testing.esxi.host import AutostartSpec, DatastoreSpec, DiskSpec, MachineSpec, NicSpec

pytestmark = pytest.mark.slow

KINDS = [
    vim.VirtualMachine,
    vim.HostSystem,
    vim.ComputeResource,
    vim.Datastore,
    vim.Network,
    vim.Datacenter,
    vim.Folder,
    vim.ResourcePool,
]
MANY = [MachineSpec(f"vm {number}", disks=[DiskSpec(MiB)], running=False) for number in range(7)]


def _names(contents: list[Any]) -> list[str]:
    return [prop.val for one in contents for prop in one.propSet if prop.name == "name"]


@pytest.mark.parametrize(("asked", "forced"), [(None, 0), (2, 0), (None, 2), (100, 3), (3, 100), (1, 1)])
def test_small_pages_hold_every_vm_once(build_vsphere: BuildVSphere, asked: int | None, forced: int) -> None:
    vsphere = build_vsphere(*MANY, page=forced)
    with connected(vsphere) as instance:
        assert _names(all_of(instance, vim.VirtualMachine, page=asked, paths=["name"])) == [one.name for one in MANY]
        pages = vsphere.calls().count("ContinueRetrievePropertiesEx") + 1
        assert pages == -(-len(MANY) // min([size for size in (asked, forced) if size], default=len(MANY)))


def test_a_token_is_good_once_and_for_its_own_session(build_vsphere: BuildVSphere) -> None:
    vsphere = build_vsphere(*MANY)
    spec = vmodl.query.PropertyCollector
    with connected(vsphere) as instance, connected(vsphere) as other:
        content = instance.content
        view = content.viewManager.CreateContainerView(content.rootFolder, [vim.VirtualMachine], True)
        start = spec.ObjectSpec(obj=view, skip=True, selectSet=[spec.TraversalSpec(type=vim.view.ContainerView, path="view")])
        wanted = spec.FilterSpec(objectSet=[start], propSet=[spec.PropertySpec(type=vim.VirtualMachine, pathSet=["name"])])
        first = content.propertyCollector.RetrievePropertiesEx([wanted], spec.RetrieveOptions(maxObjects=3))
        with pytest.raises(vmodl.fault.InvalidArgument):
            other.content.propertyCollector.ContinueRetrievePropertiesEx(first.token)
        assert len(content.propertyCollector.ContinueRetrievePropertiesEx(first.token).objects) == 3
        with pytest.raises(vmodl.fault.InvalidArgument):
            content.propertyCollector.ContinueRetrievePropertiesEx(first.token)


@pytest.mark.parametrize("vcenter", [True, False])
def test_every_property_that_is_played_can_be_sent(build_vsphere: BuildVSphere, vcenter: bool) -> None:
    """What pyVmomi's tables do not allow cannot be serialised, and what is left out is not noted as unplayed."""
    disks_ = [
        DiskSpec(MiB),
        DiskSpec(MiB, bus="sata"),
        DiskSpec(MiB, bus="nvme"),
        DiskSpec(MiB, bus="ide"),
        DiskSpec(MiB, rdm="physicalMode"),
        DiskSpec(MiB, mode="independent_persistent"),
    ]
    nics = [NicSpec(model=model) for model in ("vmxnet3", "e1000", "e1000e")]
    spec = MachineSpec("web", disks=disks_, nics=nics, autostart=AutostartSpec(), fields={"vtpm": True, "encrypted": True})
    stores = (DatastoreSpec(), DatastoreSpec("nfs 1%", type="NFS"))
    vsphere = build_vsphere(spec, vcenter=vcenter, esxi={"datastores": stores})
    with connected(vsphere) as instance:
        snapshot(machine(instance, vsphere))
        for kind in KINDS:
            contents = all_of(instance, kind)
            assert contents or kind is vim.Folder
            assert all(prop.val is not None for one in contents for prop in one.propSet)
        for manager, name in (
            ("sessionManager", "currentSession"),
            ("licenseManager", "licenses"),
            ("taskManager", "recentTask"),
        ):
            assert read(getattr(instance.content, manager), name)
        taken = machine(instance, vsphere).snapshot.currentSnapshot
        assert taken.config.name == "web"
    assert vsphere.violations() == []


def test_a_vcenter_has_a_path_from_the_root_to_a_vm(build_vsphere: BuildVSphere) -> None:
    vsphere = build_vsphere(MachineSpec("a/b%", disks=[DiskSpec(MiB)]))
    with connected(vsphere) as instance:
        vm = machine(instance, vsphere, "a/b%")
        names = []
        at = vm
        while at is not None:
            names.append(at.name)
            at = at.parent
        assert names == ["a%2fb%25", "vm", "DC 1", "Region+Süd", "Datacenters"]
        assert vm.config.name == "a%2fb%25"
        assert instance.content.searchIndex.FindByInventoryPath("Region+Süd/DC 1/vm/a%2fb%25") == vm
        assert isinstance(vm.runtime.host.parent, vim.ClusterComputeResource)


def test_an_esxi_host_is_a_datacenter_of_its_own(build_vsphere: BuildVSphere) -> None:
    vsphere = build_vsphere(vcenter=False)
    with connected(vsphere) as instance:
        vm = machine(instance, vsphere)
        assert vm._moId == "1"  # the Vmid
        assert vm.parent.parent._moId == "ha-datacenter"
        assert vm.runtime.host._moId == "ha-host"
        assert instance.content.rootFolder._moId == "ha-folder-root"


def test_a_vm_that_went_away_has_another_host_in_vcenter_and_stays_the_same_vm(build_vsphere: BuildVSphere) -> None:
    vsphere = build_vsphere()
    with connected(vsphere) as instance:
        vm = machine(instance, vsphere)
        before = vm.runtime.host
        assert vsphere.drs_moves("web")
        assert vm.runtime.host != before
        assert vm in vm.runtime.host.vm
        assert vm not in before.vm
        vsphere.host.vmotion_back("web")
        assert vm.runtime.host == before
        assert machine(instance, vsphere) == vm  # though the host calls it by another Vmid


def test_an_esxi_host_knows_nothing_of_a_vm_that_went_away(build_vsphere: BuildVSphere) -> None:
    vsphere = build_vsphere(vcenter=False)
    with connected(vsphere) as instance:
        vm = machine(instance, vsphere)
        vsphere.host.vmotion_away("web")
        with pytest.raises(vmodl.fault.ManagedObjectNotFound):
            vm.name  # noqa: B018


def test_vsan_has_descriptors_and_no_extents(build_vsphere: BuildVSphere) -> None:
    vsphere = build_vsphere(esxi={"datastores": (DatastoreSpec(type="vsan"),)})
    with connected(vsphere) as instance:
        vm = machine(instance, vsphere)
        assert vm.datastore[0].summary.type == "vsan"
        assert "diskExtent" not in {one.type for one in vm.layoutEx.file}
        assert disks(vm.config)[0].backing.backingObjectId.startswith("vsan:")


def test_traversals_by_name_select_through_the_tree(build_vsphere: BuildVSphere) -> None:
    """As govmomi and virt-v2v walk: folders within folders, by a spec that names itself."""
    vsphere = build_vsphere(*MANY)
    spec = vmodl.query.PropertyCollector
    again = spec.SelectionSpec(name="folders")
    to_vms = spec.TraversalSpec(name="vms", type=vim.Datacenter, path="vmFolder", selectSet=[again])
    folders = spec.TraversalSpec(
        name="folders", type=vim.Folder, path="childEntity", selectSet=[again, to_vms, spec.SelectionSpec(name="vms")]
    )
    with connected(vsphere) as instance:
        start = spec.ObjectSpec(obj=instance.content.rootFolder, skip=False, selectSet=[folders])
        wanted = [
            spec.PropertySpec(type=vim.VirtualMachine, pathSet=["name"]),
            spec.PropertySpec(type=vim.Folder, pathSet=["name"]),
        ]
        found = instance.content.propertyCollector.RetrieveProperties([spec.FilterSpec(objectSet=[start], propSet=wanted)])
    assert sorted(_names(found)) == sorted([*(one.name for one in MANY), "Datacenters", "Region+Süd", "vm"])


def test_paths_go_into_values_and_unset_ones_are_left_out(build_vsphere: BuildVSphere) -> None:
    vsphere = build_vsphere()
    with connected(vsphere) as instance:
        vm = machine(instance, vsphere)
        assert read(vm, "runtime.powerState", "snapshot", "config.hardware.numCPU", "runtime.question.id") == {
            "runtime.powerState": "poweredOn",
            "config.hardware.numCPU": 1,
        }
        key = disks(vm.config)[1].key
        one = read(vm, f"config.hardware.device[{key}].backing.fileName")
        assert list(one.values()) == ["[datastore1] web/web_1.vmdk"]
        assert isinstance(read(vm, "runtime.powerState")["runtime.powerState"], vim.VirtualMachine.PowerState)
        for wrong in ("nothing", "runtime.nothing", "config..name", "config.hardware.device[1", "snapshot.nothing"):
            with pytest.raises(vmodl.query.InvalidProperty):
                read(vm, wrong)


def test_vms_are_found_by_their_uuids(build_vsphere: BuildVSphere) -> None:
    uuid = "4210f0f0-0102-0304-0506-070809aabbcc"
    twins = [MachineSpec(name, disks=[DiskSpec(MiB)], uuid=uuid, running=False) for name in ("one", "two")]
    vsphere = build_vsphere(*twins)
    with connected(vsphere) as instance:
        search = instance.content.searchIndex
        assert search.FindByUuid(None, uuid.upper(), True, False).name == "one"
        assert [vm.name for vm in search.FindAllByUuid(None, uuid, True, False)] == ["one", "two"]
        instance_uuid = machine(instance, vsphere, "two").config.instanceUuid
        assert search.FindByUuid(None, instance_uuid, True, True).name == "two"
        assert search.FindByUuid(None, "4210f0f0-0102-0304-0506-070809aabbcd", True, False) is None


def test_layout_lists_the_files_of_each_chain_from_the_base_up(build_vsphere: BuildVSphere) -> None:
    vsphere = build_vsphere()
    with connected(vsphere) as instance:
        vm = machine(instance, vsphere)
        snapshot(vm)
        layout = vm.layoutEx
        names = {one.key: (one.type, one.name, one.size) for one in layout.file}
        chain = [[names[key] for key in unit.fileKey] for unit in layout.disk[0].chain]
        assert [[name for _, name, _ in unit] for unit in chain] == [
            ["[datastore1] web/web.vmdk", "[datastore1] web/web-flat.vmdk"],
            ["[datastore1] web/web-000001.vmdk", "[datastore1] web/web-000001-sesparse.vmdk"],
        ]
        assert chain[0][1] == ("diskExtent", "[datastore1] web/web-flat.vmdk", 8 * MiB)
        assert len(layout.snapshot[0].disk[0].chain) == 1
        backing = disks(vm.config)[0].backing
        assert (backing.fileName, backing.parent.fileName) == ("[datastore1] web/web-000001.vmdk", "[datastore1] web/web.vmdk")
        assert (backing.deltaDiskFormat, backing.parent.deltaDiskFormat) == ("seSparseFormat", None)
