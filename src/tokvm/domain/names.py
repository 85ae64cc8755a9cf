"""What a person called the VM, and what libvirt can call it.

    vm.name        any text: newlines, control characters, slashes, `$(reboot)`, `-o`, 300 letters
    domain name    what libvirt, its file names (NAME.xml, NAME_VARS.fd), hooks and `virsh` take without surprise
    <title>        one line for people; what XML 1.0 cannot hold is shown as U+FFFD
    <metadata>     the exact name as ASCII JSON, so that nothing is lost

libvirt itself refuses `/`, newlines and empty names (src/conf/domain_conf.c); the file systems under /etc/libvirt/qemu stop at
255 bytes; `virsh` takes a leading dash for an option and bare digits for an id.
"""

from __future__ import annotations

import json
import re
import unicodedata

NAME_BYTES = 200
_PLAIN = frozenset(" ._+@:=,()[]-")
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def legal_name(name: str, uuid: str) -> str:
    """`name` itself where it is harmless; else its harmless part and the head of the uuid, which keeps two such names apart."""
    tame = "".join(letter if _is_plain(letter) else "_" for letter in name)
    tame = _cut(tame.strip().lstrip("-.").strip(), NAME_BYTES)
    if tame and tame == name and not tame.isdigit():
        return tame
    return f"{_cut(tame, NAME_BYTES - 9) or 'vm'}-{uuid[:8]}"


def xml_text(text: str) -> str:
    """`text` with every character that XML 1.0 cannot hold replaced by U+FFFD, line ends as XML parsers hand them back."""
    return _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text).replace("\r\n", "\n").replace("\r", "\n")


def is_xml_text(text: str) -> bool:
    """True when XML hands `text` back exactly as it was."""
    return xml_text(text) == text


def one_line(text: str) -> str:
    """`text` for a <title>, which libvirt wants without line ends; may be empty."""
    return " ".join(xml_text(text).split())


def pack(text: str) -> str:
    """Any text (lone surrogates too) as printable ASCII."""
    return json.dumps(text, ensure_ascii=True)


def unpack(packed: str) -> str:
    """What `pack` was given; ValueError when it was not made by `pack`."""
    text = json.loads(packed)
    if not isinstance(text, str):
        raise ValueError("not a packed name")  # noqa: TRY004 - the text is wrong, not its Python type
    return text


def _is_plain(letter: str) -> bool:
    return letter in _PLAIN or unicodedata.category(letter)[0] in "LMN"


def _cut(text: str, limit: int) -> str:
    """At most `limit` bytes of UTF-8, cut between characters."""
    return text.encode()[:limit].decode(errors="ignore").rstrip()
