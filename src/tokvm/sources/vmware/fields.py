"""Fields of a parsed dump, each of the kind that is needed; anything else is a SourceError that names it."""

from __future__ import annotations

from collections.abc import Collection
from typing import TypeVar

from tokvm.core.errors import SourceError
from tokvm.core.text import readable
from tokvm.sources.vmware.vimcmd import Object, Reference, Value, parse

T = TypeVar("T")


class Fields:
    """One object. `what`: where in which answer it stands, for messages. A field that is unset is as good as absent."""

    def __init__(self, found: Object, where: str, what: str) -> None:
        self._found = found
        self.where = where
        self.what = what

    @classmethod
    def of(cls, text: str, where: str, what: str, *, known: Collection[str] = ()) -> Fields:
        """The object that a command's answer `what` is."""
        value = value_of(text, where, what, known=known)
        if not isinstance(value, Object):
            raise confused(where, what, "it is no object")
        return cls(value, where, what)

    @property
    def type(self) -> str:
        """The last word of it: `VirtualDisk`."""
        return self._found.type.rpartition(".")[2]

    def refuse(self, why: str) -> SourceError:
        return confused(self.where, self.what, why)

    def raw(self, name: str) -> Value:
        return self._found.fields.get(name)

    def text_or_none(self, name: str) -> str | None:
        value = self.raw(name)
        if value is not None and not isinstance(value, str):
            raise self.refuse(f"its {name} is no text")
        return value

    def text(self, name: str) -> str:
        return self._there(name, self.text_or_none(name))

    def reference(self, name: str) -> str:
        value = self.raw(name)
        if not isinstance(value, Reference):
            raise self.refuse(f"its {name} is no reference")
        return value

    def number_or_none(self, name: str, *, least: int = 0, most: int = 1 << 62) -> int | None:
        value = self.raw(name)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise self.refuse(f"its {name} is {readable(repr(value), limit=40)}, no number from {least} to {most}")
        return value

    def number(self, name: str, *, least: int = 0, most: int = 1 << 62) -> int:
        return self._there(name, self.number_or_none(name, least=least, most=most))

    def truth(self, name: str) -> bool:
        """False when it is not there."""
        value = self.raw(name)
        if value is not None and not isinstance(value, bool):
            raise self.refuse(f"its {name} is neither true nor false")
        return bool(value)

    def item_or_none(self, name: str) -> Fields | None:
        value = self.raw(name)
        if value is None:
            return None
        if not isinstance(value, Object):
            raise self.refuse(f"its {name} is no object")
        return Fields(value, self.where, f"{self.what}, {name}")

    def item(self, name: str) -> Fields:
        return self._there(name, self.item_or_none(name))

    def items(self, name: str) -> list[Fields]:
        value = self.raw(name)
        if value is None:
            return []
        return items_of(value, self.where, f"{self.what}, {name}")

    def _there(self, name: str, value: T | None) -> T:
        if value is None:
            raise self.refuse(f"it has no {name}")
        return value


def value_of(text: str, where: str, what: str, *, known: Collection[str] = ()) -> Value:
    try:
        return parse(text, known=known)
    except ValueError as exc:
        raise confused(where, what, str(exc)) from exc


def items_of(value: Value, where: str, what: str) -> list[Fields]:
    """The objects of a list."""
    if not isinstance(value, list):
        raise confused(where, what, "it is no list")
    objects = [one for one in value if isinstance(one, Object)]
    if len(objects) != len(value):
        raise confused(where, what, "it holds something else than objects")
    return [Fields(one, where, f"{what} {number}") for number, one in enumerate(objects)]


def confused(where: str, what: str, why: str) -> SourceError:
    """An answer that makes no sense."""
    return SourceError(
        f"`{readable(what, limit=160)}` was answered with something tokvm does not understand: {why}",
        where=where,
        fix="run that command by hand on the host and look at what it prints; quotes in the VM's name, notes or file names may "
        "be the reason",
    )
