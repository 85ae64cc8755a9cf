"""What vim-cmd says of the VMs and the host."""

from __future__ import annotations

import time
from collections.abc import Sequence

from tokvm.testing.esxi import paths
from tokvm.testing.esxi.dump import UNSET, Many, Null, Object, Ref, Value, dump, zulu
from tokvm.testing.esxi.state import OFF, ON, SUSPENDED, Snapshot, State, Vm, present

COLUMNS = ("Vmid", "Name", "File", "Guest OS", "Version", "Annotation")
POWER = {ON: "Powered on", OFF: "Powered off", SUSPENDED: "Suspended"}


def all_vms(state: State) -> str:
    """A table as wide as what is in it, titles in the middle."""
    rows: list[Sequence[str]] = [COLUMNS]
    for vm in [one for one in present(state) if not one["fields"]["invalid"]]:
        fields = vm["fields"]
        path = paths.bracketed(state, f"{paths.directory(state, vm)}/{vm['file']}")
        rows.append(
            (str(vm["vmid"]), vm["name"], path, str(fields["guestId"]), str(fields["version"]), str(fields["annotation"]))
        )
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    titles = (" " * ((width - len(title)) // 2) + title for title, width in zip(COLUMNS, widths, strict=True))
    lines = [list(titles), *rows[1:]]
    skipped = [f"Skipping invalid VM '{vm['vmid']}'" for vm in present(state) if vm["fields"]["invalid"]]
    table = ["   ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "".join(f"{line}\n" for line in [*skipped, *table])


def power_state(vm: Vm) -> str:
    return f"Retrieved runtime info\n{POWER[vm['state']]}\n"


def summary(state: State, vm: Vm) -> str:
    fields = vm["fields"]
    ip = ("ipAddress", UNSET)
    whole = Object(
        "vim.vm.Summary",
        [
            ("vm", Ref(f"vim.VirtualMachine:{vm['vmid']}")),
            ("runtime", _runtime(vm)),
            (
                "guest",
                Object(
                    "vim.vm.Summary.GuestSummary",
                    [
                        ("guestId", str(fields["guestId"]) if fields["tools"] == "guestToolsRunning" else UNSET),
                        ("toolsStatus", _tools_status(vm)),
                        ("toolsVersionStatus", "guestToolsUnmanaged" if fields["toolsInstalled"] else "guestToolsNotInstalled"),
                        (
                            "toolsVersionStatus2",
                            "guestToolsUnmanaged" if fields["toolsInstalled"] else "guestToolsNotInstalled",
                        ),
                        ("toolsRunningStatus", _tools_running(vm)),
                        ("hostName", UNSET),
                        ip,
                        ("hwVersion", UNSET),
                    ],
                ),
            ),
            ("config", _summary_config(state, vm)),
            ("storage", _storage(state, vm)),
            ("quickStats", Object("vim.vm.Summary.QuickStats", [("guestHeartbeatStatus", "gray"), ("uptimeSeconds", UNSET)])),
            ("overallStatus", "green"),
            ("customValue", UNSET),
        ],
    )
    return "Listsummary:\n\n" + dump(whole, style=state["options"]["dumps"])


def _runtime(vm: Vm) -> Value:
    fields = vm["fields"]
    return Object(
        "vim.vm.RuntimeInfo",
        [
            ("host", Ref("vim.HostSystem:ha-host")),
            ("connectionState", str(fields["connectionState"])),
            ("powerState", vm["state"]),
            ("faultToleranceState", str(fields["faultTolerance"])),
            ("toolsInstallerMounted", False),
            ("suspendTime", UNSET),
            ("bootTime", zulu(vm["since"]) if vm["state"] == ON else UNSET),
            ("suspendInterval", 0),
            ("question", _question(vm)),
            ("memoryOverhead", UNSET),
            ("maxCpuUsage", 2400),
            ("maxMemoryUsage", int(str(fields["memoryMB"]))),
            ("numMksConnections", 0),
            ("recordReplayState", "inactive"),
            ("cleanPowerOff", UNSET),
            ("needSecondaryReason", UNSET),
            ("onlineStandby", False),
            ("minRequiredEVCModeKey", UNSET),
            ("consolidationNeeded", bool(fields["consolidationNeeded"])),
        ],
    )


def _question(vm: Vm) -> Value:
    if not vm["question"]:
        return Null("vim.vm.QuestionInfo")
    choices = Many(
        "vim.ElementDescription",
        [
            Object("vim.ElementDescription", [("label", label), ("summary", label), ("key", str(key))])
            for key, label in enumerate(("button.uuid.cancel", "button.uuid.movedTheVM", "button.uuid.copiedTheVM"))
        ],
    )
    option = Object("vim.option.ChoiceOption", [("valueIsReadonly", UNSET), ("choiceInfo", choices), ("defaultIndex", 2)])
    return Object("vim.vm.QuestionInfo", [("id", "_vmx1"), ("text", vm["question"]), ("choice", option)])


def message(vm: Vm) -> str:
    if not vm["question"]:
        return "No message.\n"
    return (
        f"Virtual machine message _vmx1:\n{vm['question']}\n   0. button.uuid.cancel (Cancel)\n   1. button.uuid.movedTheVM "
        "(I Moved It)\n   2. button.uuid.copiedTheVM (I Copied It) [default]\n"
    )


def _tools_status(vm: Vm) -> str:
    if not vm["fields"]["toolsInstalled"]:
        return "toolsNotInstalled"
    return "toolsOk" if _tools_running(vm) == "guestToolsRunning" else "toolsNotRunning"


def _tools_running(vm: Vm) -> str:
    return str(vm["fields"]["tools"]) if vm["state"] == ON else "guestToolsNotRunning"


def _summary_config(state: State, vm: Vm) -> Value:
    fields = vm["fields"]
    return Object(
        "vim.vm.Summary.ConfigSummary",
        [
            ("name", vm["name"]),
            ("template", bool(fields["template"])),
            ("vmPathName", paths.bracketed(state, f"{paths.directory(state, vm)}/{vm['file']}")),
            ("memorySizeMB", int(str(fields["memoryMB"]))),
            ("cpuReservation", UNSET),
            ("memoryReservation", UNSET),
            ("numCpu", int(str(fields["numCPU"]))),
            ("numEthernetCards", len(vm["nics"])),
            ("numVirtualDisks", len(vm["disks"])),
            ("uuid", vm["uuid"]),
            ("instanceUuid", vm["instance"]),
            ("guestId", str(fields["guestId"])),
            ("guestFullName", str(fields["guestFullName"])),
            ("annotation", str(fields["annotation"])),
            ("product", Null("vim.vApp.ProductInfo")),
            ("installBootRequired", UNSET),
            ("ftInfo", Null("vim.vm.FaultToleranceConfigInfo")),
            ("managedBy", Null("vim.ext.ManagedByInfo")),
            ("tpmPresent", bool(fields["vtpm"])),
            ("numVmiopBackings", 0),
            ("hwVersion", str(fields["version"])),
        ],
    )


def _storage(state: State, vm: Vm) -> Value:
    used = sum(layer["size"] for layer in state["layers"].values() if layer["guest"] == vm["guest"])
    numbers: list[tuple[str, Value]] = [
        ("committed", used),
        ("uncommitted", 0),
        ("unshared", used),
        ("timestamp", zulu(time.time())),
    ]
    return Object("vim.vm.Summary.StorageSummary", numbers)


def snapshots(vm: Vm) -> str:
    """`Desciption` is VMware's spelling."""
    lines = ["Get Snapshot:"]

    def add(one: Snapshot, dashes: str) -> None:
        lines.extend(
            [
                f"{dashes}Snapshot Name        : {one['name']}",
                f"{dashes}Snapshot Id        : {one['id']}",
                f"{dashes}Snapshot Desciption  : {one['description']}",
                f"{dashes}Snapshot Created On  : {_american(one['created'])}",
                f"{dashes}Snapshot State       : {one['state']}",
            ]
        )
        for child in [other for other in vm["snapshots"] if other["parent"] == one["id"]]:
            lines.append(f"{dashes}|-CHILD")
            add(child, f"{dashes}--")

    for root in [one for one in vm["snapshots"] if not one["parent"]]:
        lines.append("|-ROOT")
        add(root, "--")
    return "\n".join(lines) + "\n"


def _american(seconds: float) -> str:
    now = time.gmtime(seconds)
    return f"{now.tm_mon}/{now.tm_mday}/{now.tm_year} {now.tm_hour}:{now.tm_min}:{now.tm_sec}"


def autostart(state: State) -> str:
    entries = []
    for vm in present(state):
        if vm["autostart"] is not None:
            fields: list[tuple[str, Value]] = [("key", Ref(f"vim.VirtualMachine:{vm['vmid']}"))]
            fields += [(name, value) for name, value in vm["autostart"].items() if isinstance(value, str | int)]
            entries.append(Object("vim.host.AutoStartManager.AutoPowerInfo", fields))
    return dump(Many("vim.host.AutoStartManager.AutoPowerInfo", entries), style=state["options"]["dumps"])


def host_summary(state: State) -> str:
    options = state["options"]
    about = Object(
        "vim.AboutInfo",
        [
            ("name", "VMware ESXi"),
            ("fullName", f"VMware ESXi {options['version']} build-{options['build']}"),
            ("vendor", "VMware, Inc."),
            ("version", options["version"]),
            ("build", options["build"]),
            ("osType", "vmnix-x86"),
            ("productLineId", "embeddedEsx"),
            ("apiType", "HostAgent"),
            ("apiVersion", f"{options['version']}.0"),
            ("licenseProductName", "VMware ESX Server"),
        ],
    )
    hardware: list[tuple[str, Value]] = [("vendor", "Dell Inc."), ("model", "PowerEdge R740"), ("memorySize", 137_000_000_000)]
    whole = Object(
        "vim.host.Summary",
        [
            ("host", Ref("vim.HostSystem:ha-host")),
            ("hardware", Object("vim.host.Summary.HardwareSummary", [*hardware, ("cpuMhz", 2394), ("numCpuCores", 32)])),
            (
                "runtime",
                Object(
                    "vim.host.RuntimeInfo",
                    [("connectionState", "connected"), ("powerState", "poweredOn"), ("inMaintenanceMode", False)],
                ),
            ),
            (
                "config",
                Object("vim.host.Summary.ConfigSummary", [("name", options["name"]), ("port", 902), ("product", about)]),
            ),
            ("overallStatus", "green"),
            ("rebootRequired", False),
            ("managementServerIp", options["vcenter"] or UNSET),
            ("maxEVCModeKey", UNSET),
        ],
    )
    return dump(whole, style=options["dumps"])
