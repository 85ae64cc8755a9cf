"""What `esxcli --formatter=xml` prints: a list of structures.

    <output xmlns="http://www.vmware.com/Products/ESX/5.0/esxcli"><root><list type="structure">
      <structure typeName="VirtualMachine">
        <field name="DisplayName"><string>web</string></field>
        <field name="WorldID"><integer>2098</integer></field>

XML without DOCTYPE and entities of its own: with them a kilobyte becomes gigabytes, or a file of this machine.
"""

from __future__ import annotations

from xml.etree import ElementTree

LONGEST = 4 << 20
_MOST = 10_000

Row = dict[str, str]


def parse_rows(text: str) -> list[Row]:
    """The structures' fields by name. ValueError when it is no such list."""
    if len(text) > LONGEST:
        raise ValueError(f"it is longer than {LONGEST} characters")
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise ValueError("it has a DOCTYPE, which esxcli does not write")
    try:
        root = ElementTree.fromstring(text.strip().encode("utf-8", "replace"))
    except ElementTree.ParseError as exc:
        raise ValueError(f"it is no XML: {exc}") from exc
    rows = [_row(one) for one in root.iter() if _name(one) == "structure"]
    if len(rows) > _MOST:
        raise ValueError(f"it has more than {_MOST} rows")
    return rows


def _row(structure: ElementTree.Element) -> Row:
    found: Row = {}
    for field in structure:
        name = field.get("name")
        if _name(field) != "field" or name is None:
            continue
        if name in found:
            raise ValueError(f"a row has two fields {name}")
        found[name] = "".join(field.itertext()).strip("\n ") if len(field) else (field.text or "")
    return found


def _name(element: ElementTree.Element) -> str:
    """Without its namespace, which differs between versions."""
    return element.tag.rpartition("}")[2]
