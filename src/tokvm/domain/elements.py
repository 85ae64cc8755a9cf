"""Small words for writing domain XML."""

from __future__ import annotations

import xml.etree.ElementTree as ET

from tokvm.core.errors import DomainError
from tokvm.domain.names import is_xml_text

QEMU = "http://libvirt.org/schemas/domain/qemu/1.0"

ET.register_namespace("qemu", QEMU)


def add(parent: ET.Element, tag: str, text: str | None = None, **attributes: str) -> ET.Element:
    child = ET.SubElement(parent, tag, attributes)
    child.text = text
    return child


def override(root: ET.Element, alias: str, name: str, value: str, *, kind: str = "string") -> None:
    """Change one property of the QEMU device that libvirt makes for `alias` (libvirt 8.2 and newer)."""
    overrides = root.find(f"{{{QEMU}}}override")
    if overrides is None:
        overrides = ET.SubElement(root, f"{{{QEMU}}}override")
    frontend = add(add(overrides, f"{{{QEMU}}}device", alias=alias), f"{{{QEMU}}}frontend")
    add(frontend, f"{{{QEMU}}}property", name=name, type=kind, value=value)


def give_qemu(root: ET.Element, *arguments: str) -> None:
    """Arguments for QEMU that libvirt has no words for."""
    line = ET.SubElement(root, f"{{{QEMU}}}commandline")
    for argument in arguments:
        add(line, f"{{{QEMU}}}arg", value=argument)


def checked_path(path: str, what: str) -> str:
    """`path`; DomainError when libvirt could not be told it."""
    if not path.startswith("/") or not is_xml_text(path):
        raise DomainError(f"{what} needs an absolute path of printable text", where=repr(path), fix="choose another path")
    return path
