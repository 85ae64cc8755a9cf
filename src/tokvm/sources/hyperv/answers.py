"""Taking a script's answer apart: each field of the type and within the bounds it must have, or the answer is refused whole."""

from __future__ import annotations

import re
from collections.abc import Mapping

from tokvm.core.text import readable
from tokvm.sources.hyperv.faults import HyperVError
from tokvm.sources.hyperv.powershell import Value, confused

GUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_LONE = re.compile(r"[\ud800-\udfff]")  # half a character: .NET never writes one as UTF-8, and it names no file
_MOST_ITEMS = 100_000


def is_guid(text: str) -> bool:
    return GUID.fullmatch(text) is not None


class Fields:
    """An object of an answer. `place` names it in messages: `inspect: disks[0]`."""

    def __init__(self, value: Mapping[str, object], where: str, script: str, place: str = "") -> None:
        self._value = value
        self._where = where
        self._script = script
        self._place = place

    @classmethod
    def of(cls, value: Value, where: str, script: str) -> Fields:
        return cls(value, where, script)

    def text(self, name: str) -> str:
        found = self._value.get(name)
        if not isinstance(found, str) or _LONE.search(found):
            raise self._wrong(name, "a text")
        return found

    def text_or_none(self, name: str) -> str | None:
        return None if self._value.get(name) is None else self.text(name)

    def guid(self, name: str) -> str:
        found = self.text(name).lower().strip("{}")
        if not is_guid(found):
            raise self._wrong(name, "a GUID")
        return found

    def number(self, name: str, *, least: int = 0, most: int = 1 << 62) -> int:
        found = self._value.get(name)
        if not isinstance(found, int) or isinstance(found, bool) or not least <= found <= most:
            raise self._wrong(name, f"a whole number from {least} to {most}")
        return found

    def number_or_none(self, name: str, *, least: int = 0, most: int = 1 << 62) -> int | None:
        return None if self._value.get(name) is None else self.number(name, least=least, most=most)

    def truth(self, name: str) -> bool:
        found = self._value.get(name)
        if not isinstance(found, bool):
            raise self._wrong(name, "true or false")
        return found

    def truth_or_none(self, name: str) -> bool | None:
        return None if self._value.get(name) is None else self.truth(name)

    def numbers(self, name: str) -> tuple[int, ...]:
        found = self._list(name)
        if not all(isinstance(one, int) and not isinstance(one, bool) for one in found):
            raise self._wrong(name, "whole numbers")
        return tuple(one for one in found if isinstance(one, int))

    def item(self, name: str) -> Fields:
        found = self.item_or_none(name)
        if found is None:
            raise self._wrong(name, "an object")
        return found

    def item_or_none(self, name: str) -> Fields | None:
        found = self._value.get(name)
        return None if found is None else self._inside(found, name)

    def items(self, name: str) -> list[Fields]:
        return [self._inside(one, f"{name}[{number}]") for number, one in enumerate(self._list(name))]

    def raw(self, name: str) -> object:
        return self._value.get(name)

    def refuse(self, what: str) -> HyperVError:
        """The error for an answer that contradicts itself."""
        return confused(self._where, self._script, f"{self._place or 'it'} {what}")

    def _list(self, name: str) -> list[object]:
        found = self._value.get(name)
        if not isinstance(found, list) or len(found) > _MOST_ITEMS:
            raise self._wrong(name, "a list")
        return found

    def _inside(self, found: object, name: str) -> Fields:
        if not isinstance(found, dict):
            raise self._wrong(name, "an object")
        return Fields(found, self._where, self._script, f"{self._place}.{name}" if self._place else name)

    def _wrong(self, name: str, wanted: str) -> HyperVError:
        place = f"{self._place}.{name}" if self._place else name
        return confused(
            self._where, self._script, f"{place} is {readable(repr(self._value.get(name)), limit=80)}, not {wanted}"
        )
