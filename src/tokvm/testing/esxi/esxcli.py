"""esxcli --formatter=xml: lists of structures, their fields in the order of their names."""

from __future__ import annotations

from tokvm.testing.esxi import paths, vmx
from tokvm.testing.esxi.state import State, present

HEAD = '<?xml version="1.0" encoding="utf-8"?>\n<output xmlns="http://www.vmware.com/Products/ESX/5.0/esxcli">\n<root>\n'
KINDS: dict[type, str] = {str: "string", int: "integer", bool: "boolean"}


def process_list(state: State) -> str:
    """VMs that have a process here: those that are on, and one that waits for an answer before it is."""
    rows: list[dict[str, object]] = [
        {
            "ConfigFile": f"{paths.directory(state, vm)}/{vm['file']}",
            "DisplayName": vm["name"],
            "ProcessID": 0,
            "UUID": vmx.spaced(vm["uuid"]),
            "VMXCartelID": vm["world"] - 1,
            "WorldID": vm["world"],
        }
        for vm in present(state)
        if vm["world"]
    ]
    return _xml("VirtualMachine", rows)


def filesystem_list(state: State) -> str:
    rows: list[dict[str, object]] = [
        {
            "Free": one["free"],
            "MountPoint": f"{paths.VOLUMES}/{one['uuid']}",
            "Mounted": True,
            "Size": one["size"],
            "Type": one["type"],
            "UUID": one["uuid"],
            "VolumeName": one["name"],
        }
        for one in state["datastores"]
    ]
    boot = "5f2c0b1e-8d3a7c44-1f00-0cc47a000001"
    rows.append(
        {
            "Free": 4_122_804_224,
            "MountPoint": f"{paths.VOLUMES}/{boot}",
            "Mounted": True,
            "Size": 4_293_591_040,
            "Type": "vfat",
            "UUID": boot,
            "VolumeName": "BOOTBANK1",
        }
    )
    return _xml("FileSystem", rows)


def escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _xml(kind: str, rows: list[dict[str, object]]) -> str:
    lines = ['   <list type="structure">']
    for row in rows:
        lines.append(f'      <structure typeName="{kind}">')
        for name, value in row.items():
            text = str(value).lower() if isinstance(value, bool) else escape(str(value))
            tag = KINDS[type(value)]
            lines += [f'         <field name="{name}">', f"            <{tag}>{text}</{tag}>", "         </field>"]
        lines.append("      </structure>")
    return HEAD + "\n".join([*lines, "   </list>", "</root>", "</output>"]) + "\n"
