"""What `vim-cmd` prints of an object, taken apart.

    (vim.vm.Summary) {                                    a title line and blank lines may come first
       vm = 'vim.VirtualMachine:3',                       a reference
       runtime = (vim.vm.RuntimeInfo) {                   an object; (Type) null, <unset>: none; old hosts print what is unset
          powerState = "poweredOn",
          question = (vim.vm.QuestionInfo) null,
       },
       device = (vim.vm.device.VirtualDevice) [           a list; the comma before } and ] may be there or not
          (vim.vm.device.VirtualDisk) {
             capacityInKB = 41943040,
          }
       ],
    }

Strings are not escaped: quotes and newlines stand in them as they are (a real fault says `corresponding to "23"",`). So a
string ends at the first quote that only a comma and blanks follow on its line, and a text may imitate fields. What it then
says:

    a name for the second time    refused: nothing that the host says is replaced, only added to
    what does not parse           refused: the rest of a text that broke out and did not come back in
    a name that was not there     believed; so what decides is read from fields that are always there

Texts that are known from elsewhere (the .vmx, where they are escaped) are given as `known` and then taken whole.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from tokvm.core.text import readable

LONGEST = 8 << 20  # characters; a VM with every device there can be prints some 200 thousand
_DEEPEST = 60  # a chain of 32 layers is nested so deep
_MOST_VALUES = 200_000

_TITLE = re.compile(r"\s*(?:[A-Za-z][A-Za-z ]{0,60}:?[ \t]*\n\s*)?(?=\()")
_SPACE = re.compile(r"\s*")
_TYPE = re.compile(r"\(([A-Za-z][A-Za-z0-9_.]{0,200})\)\s*(\{|\[|null\b)")
_NAME = re.compile(r"([A-Za-z_][A-Za-z0-9_]{0,100})\s*=\s*")
_WORD = re.compile(r"[A-Za-z0-9_.+-]{1,100}")
_NUMBER = re.compile(r"-?[0-9]{1,20}")
# One run of blanks at a time: two side by side would take quadratic time over a guest's host name of nothing but blanks.
_STRING_END = re.compile(r'"(?=[ \t]*(?:,[ \t]*)?(?:\r?\n|\Z))')
_REFERENCE_END = re.compile(r"'(?=[ \t]*(?:,[ \t]*)?(?:\r?\n|\Z))")


class Reference(str):
    """`vim.VirtualMachine:3`: a managed object."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Object:
    """`type` as printed, `vim.vm.Summary`."""

    type: str
    fields: dict[str, Value]


Value = None | bool | int | str | Object | list["Value"]


def parse(text: str, *, known: Collection[str] = ()) -> Value:
    """The one value in `text`. ValueError when it is not that, or ambiguous."""
    if len(text) > LONGEST:
        raise ValueError(f"it is longer than {LONGEST} characters")
    reader = _Reader(text, known)
    title = _TITLE.match(text)
    if title is None:
        raise ValueError(f"it begins with {readable(repr(text.strip()), limit=80)}")
    reader.at = title.end()
    found = reader.value(0)
    reader.blanks()
    if reader.at != len(text):
        raise reader.odd("the end")
    return found


class _Reader:
    def __init__(self, text: str, known: Collection[str]) -> None:
        self.text = text
        self.at = 0
        self._known = sorted({one for one in known if '"' in one}, key=len, reverse=True)
        self._count = 0

    def odd(self, wanted: str) -> ValueError:
        line = self.text.count("\n", 0, self.at) + 1
        shown = readable(repr(self.text[self.at : self.at + 60]))
        return ValueError(f"line {line}: {shown} where {wanted} was expected (a text with quotes in it may be to blame)")

    def blanks(self) -> None:
        found = _SPACE.match(self.text, self.at)
        self.at = found.end() if found else self.at

    def value(self, depth: int) -> Value:
        self._count += 1
        if depth > _DEEPEST or self._count > _MOST_VALUES:
            raise ValueError("it is nested too deep, or has too many values")
        typed = _TYPE.match(self.text, self.at)
        if typed is not None:
            self.at = typed.end()
            return self._typed(typed[1], typed[2], depth + 1)
        if self._skip("<unset>"):
            return None
        if self._skip('"'):
            return self._string()
        if self._skip("'"):
            return Reference(self._until(_REFERENCE_END, "a reference's end"))
        return self._word()

    def _typed(self, type_: str, sign: str, depth: int) -> Value:
        match sign:
            case "{":
                return Object(type_, self._fields(depth))
            case "[":
                return self._items(depth)
            case _:
                return None

    def _skip(self, sign: str) -> bool:
        if not self.text.startswith(sign, self.at):
            return False
        self.at += len(sign)
        return True

    def _string(self) -> str:
        for known in self._known:
            if self.text.startswith(known, self.at) and _STRING_END.match(self.text, self.at + len(known)):
                self.at += len(known) + 1
                return known
        return self._until(_STRING_END, "a string's end")

    def _until(self, end: re.Pattern[str], wanted: str) -> str:
        found = end.search(self.text, self.at)
        if found is None:
            raise self.odd(wanted)
        start, self.at = self.at, found.end()
        return self.text[start : found.start()]

    def _word(self) -> bool | int | str:
        found = _WORD.match(self.text, self.at)
        if found is None:
            raise self.odd("a value")
        self.at = found.end()
        word = found[0]
        if word in ("true", "false"):
            return word == "true"
        return int(word) if _NUMBER.fullmatch(word) else word

    def _ends(self, sign: str) -> bool:
        self.blanks()
        if self._skip(sign):
            return True
        if self.at >= len(self.text):
            raise self.odd(sign)
        return False

    def _fields(self, depth: int) -> dict[str, Value]:
        found: dict[str, Value] = {}
        while not self._ends("}"):
            name = _NAME.match(self.text, self.at)
            if name is None:
                raise self.odd("a field")
            if name[1] in found:
                raise self.odd(f"another field than {name[1]}, which was said before,")
            self.at = name.end()
            found[name[1]] = self.value(depth)
            self.blanks()
            self._skip(",")
        return found

    def _items(self, depth: int) -> list[Value]:
        found: list[Value] = []
        while not self._ends("]"):
            found.append(self.value(depth))
            self.blanks()
            self._skip(",")
        return found
