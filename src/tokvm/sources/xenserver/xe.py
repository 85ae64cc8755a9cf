"""Asking and telling a host through `xe` over SSH.

    value:   xe vm-param-get uuid=U param-name=P          one value and a newline; the value may hold newlines itself
    column:  xe vbd-list vm-uuid=U params=P --minimal     one parameter of all rows, `,` between them, `\\,` and `\\\\` escaped
    table:   a key column, the others, the key again      rows come in the same order as long as no row came or went

xe's long format is never read: in it a name with a newline looks like another parameter. Several parameters with --minimal
print only the first. Answers are bytes from outside: undecodable ones survive as surrogates and go back out as the same bytes.
The commands and their order of words are those of docs/xenserver-commands.md.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from tokvm.core.errors import ConnectionLost, SourceError
from tokvm.core.text import readable
from tokvm.images.base import ByteStream
from tokvm.remote.process import Completed, ProgramError
from tokvm.remote.ssh import RemoteCommandError, quote
from tokvm.sources.xenserver.faults import Fault, XenServerError, explain

READ_S = 60.0  # a read takes 0.1 s; on a dom0 short of memory some seconds
ACT_S = 120.0
DIVIDER = "printf '\\0%d\\0' $?"
"""Between the commands of a batch: the exit code of the one before, between NULs."""
_AGAIN_BELOW_S = 20.0  # a read that failed sooner than this is asked once more: the connection broke, the host is not hanging
_TABLE_TRIES = 4
_TABLE_WAIT_S = 0.5
_MOST_ROWS = 100_000
NOTHING = "<not in database>"  # what xe prints for a reference to nothing

_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_EXIT = re.compile(r"[0-9]{1,3}")
_ESCAPES = re.compile(r"(\\.|,)", re.DOTALL)

T = TypeVar("T")
Command = tuple[str, ...]
Row = dict[str, str]


class Host(Protocol):
    """What is needed of `remote.ssh.SshHost`."""

    @property
    def where(self) -> str: ...

    def run(self, args: Sequence[str], *, timeout_s: float = ..., check: bool = ...) -> Completed: ...

    def run_line(self, command: str, *, timeout_s: float = ..., check: bool = ...) -> Completed: ...

    def stream(self, command: str, *, first_byte_s: float = ...) -> ByteStream: ...

    def fingerprint(self) -> str: ...

    def close(self) -> None: ...


def value_of(kind: str, uuid: str, name: str) -> Command:
    """`xe vm-param-get …`; kind is vm, vdi or sr."""
    return (f"{kind}-param-get", f"uuid={uuid}", f"param-name={name}")


def is_uuid(text: str) -> bool:
    return _UUID.fullmatch(text) is not None


class Xe:
    """One host's `xe`. Thread-safe."""

    def __init__(self, host: Host) -> None:
        self._host = host

    @property
    def where(self) -> str:
        return self._host.where

    def ask(self, *command: str) -> str:
        """The answer of a command that only reads, without its newline. Asked again when the connection just broke."""
        return self._patiently(lambda: self._run(command, READ_S))

    @staticmethod
    def _patiently(read: Callable[[], T]) -> T:
        """Once more when the connection just broke; not when the host hangs."""
        begun = time.monotonic()
        try:
            return read()
        except ConnectionLost:
            if time.monotonic() - begun > _AGAIN_BELOW_S:
                raise
            return read()

    def ask_all(self, commands: Sequence[Command]) -> list[str]:
        """The answers of several reads, in one command line: a round trip and a session for all of them."""
        answers = self._batch(commands)
        # What failed is asked again by itself: only so is its error text known to be its own.
        return [self.ask(*command) if code else text for command, (code, text) in zip(commands, answers, strict=True)]

    def _batch(self, commands: Sequence[Command]) -> list[tuple[int, str]]:
        """(exit code, answer) of each. NUL cannot occur in what xe prints, so it divides answers that hold anything else."""
        if not commands:
            return []
        line = "".join(f"{quote(['xe', *command])}; {DIVIDER}; " for command in commands).rstrip("; ")
        try:
            done = self._patiently(lambda: self._host.run_line(line, timeout_s=READ_S + len(commands), check=True))
        except RemoteCommandError as failed:
            raise explain(failed, where=self.where) from failed
        except ProgramError as failed:
            raise self.confused(commands[0], failed.what) from failed
        parts = done.text.split("\0")
        codes = parts[1::2]
        if len(parts) != 2 * len(commands) + 1 or parts[-1] or not all(_EXIT.fullmatch(code) for code in codes):
            raise self.confused(commands[0], f"{len(parts) // 2} answers to {len(commands)} questions")
        return [(int(code), text.removesuffix("\n")) for text, code in zip(parts[::2], codes, strict=False)]

    def act(self, *command: str, timeout_s: float = ACT_S) -> str:
        """The answer of a command that changes something. Never repeated: after ConnectionLost it may have worked."""
        return self._run(command, timeout_s)

    def _run(self, command: Command, timeout_s: float) -> str:
        args = ["xe", *command]
        try:
            done = self._host.run(args, timeout_s=timeout_s, check=True)
        except RemoteCommandError as failed:
            raise explain(failed, where=self.where) from failed
        except ProgramError as failed:
            raise self.confused(command, failed.what) from failed
        return done.text.removesuffix("\n")

    def values(self, kind: str, uuid: str, names: Sequence[str]) -> Row:
        """Several parameters of one object."""
        return dict(zip(names, self.ask_all([value_of(kind, uuid, name) for name in names]), strict=True))

    def key(self, uuid: str, name: str, key: str) -> str | None:
        """One key of one of a VM's maps, or None."""
        try:
            return self.ask(*value_of("vm", uuid, name), f"param-key={key}")
        except XenServerError as failed:
            if failed.fault is Fault.NO_SUCH_KEY:
                return None
            raise

    def keys(self, uuid: str, wanted: Sequence[tuple[str, str]]) -> list[str | None]:
        """Several (map, key) of one VM."""
        commands = [(*value_of("vm", uuid, name), f"param-key={key}") for name, key in wanted]
        answers = zip(wanted, self._batch(commands), strict=True)
        return [self.key(uuid, *pair) if code else text for pair, (code, text) in answers]

    def column(self, listing: Command, name: str) -> list[str]:
        """One parameter of all rows. One row with an empty value cannot be told from none: see `table`."""
        command = (*listing, f"params={name}", "--minimal")
        text = self.ask(*command)
        return self._split(command, text) if text else []

    def table(self, listing: Command, names: Sequence[str], *, key: str = "uuid") -> list[Row]:
        """Rows with `key`, which no two rows share, and `names`. Read anew when rows came or went meanwhile; SourceError when
        that does not end."""
        for attempt in range(_TABLE_TRIES):
            if attempt:
                time.sleep(_TABLE_WAIT_S)
            keys, *columns, again = self._columns(listing, [key, *names, key])
            rows = self._match(keys, columns, names)
            if rows is not None and again == keys:
                return self._keyed(listing, key, keys, rows)
        raise self.confused((*listing, "--minimal"), "the columns do not belong together; rows keep coming and going")

    def fixed_table(self, listing: Command, names: Sequence[str]) -> list[Row]:
        """The same for rows that nobody changes (a snapshot's), in one round of questions."""
        for attempt in range(_TABLE_TRIES):
            if attempt:
                time.sleep(_TABLE_WAIT_S)
            uuids, *columns = self._columns(listing, ["uuid", *names])
            rows = self._match(uuids, columns, names)
            if rows is not None:
                return self._keyed(listing, "uuid", uuids, rows)
        raise self.confused((*listing, "--minimal"), "the columns have different numbers of rows")

    def _keyed(self, listing: Command, key: str, keys: list[str], rows: list[Row]) -> list[Row]:
        if key == "uuid" and rows:
            keys = [self.uuid(one, (*listing, "params=uuid", "--minimal")) for one in keys]
        return [{**row, key: one} for row, one in zip(rows, keys if rows else [], strict=True)]

    def _columns(self, listing: Command, names: Sequence[str]) -> list[list[str]]:
        commands = [(*listing, f"params={name}", "--minimal") for name in names]
        answers = self.ask_all(commands)
        return [self._split(command, text) for command, text in zip(commands, answers, strict=True)]

    @staticmethod
    def _match(keys: list[str], columns: list[list[str]], names: Sequence[str]) -> list[Row] | None:
        """Rows, or None when the columns differ in length. An empty line is one empty value only where there is one row."""
        if keys == [""]:
            return [] if all(column == [""] for column in columns) else None
        if any(len(column) != len(keys) for column in columns):
            return None
        return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]

    def _split(self, command: Command, text: str) -> list[str]:
        try:
            return split_minimal(text)
        except ValueError as exc:
            raise self.confused(command, str(exc)) from exc

    def uuid(self, text: str, command: Command) -> str:
        """`text` if it is a uuid, as every answer must be that later becomes part of a command."""
        if not is_uuid(text):
            raise self.confused(command, f"{readable(repr(text), limit=80)} is not a uuid")
        return text

    def number(self, text: str, command: Command, *, least: int, most: int) -> int:
        """A decimal number within bounds."""
        if not re.fullmatch(r"-?[0-9]{1,20}", text) or not least <= int(text) <= most:
            raise self.confused(command, f"{readable(repr(text), limit=80)} is not a number from {least} to {most}")
        return int(text)

    def confused(self, command: Command, what: str) -> SourceError:
        """An answer that makes no sense."""
        return XenServerError(
            f"`{readable(quote(['xe', *command]), limit=160)}` was answered with something tokvm does not understand: {what}",
            where=self.where,
            fix="run that command by hand on the host and look at what it prints",
        )


def split_minimal(text: str) -> list[str]:
    r"""The values of a --minimal line: `a\,b,c\\` is `a,b` and `c\`. Always at least one. ValueError for other escapes."""
    values: list[str] = []
    value: list[str] = []
    for piece in _ESCAPES.split(text):
        if piece == ",":
            values.append("".join(value))
            value = []
        elif piece in ("\\,", "\\\\"):
            value.append(piece[1])
        elif "\\" in piece:
            raise ValueError(f"{piece[:20]!r} is no escape that xe uses")
        else:
            value.append(piece)
        if len(values) > _MOST_ROWS:
            raise ValueError(f"more than {_MOST_ROWS} rows")
    return [*values, "".join(value)]


def parse_map(text: str) -> dict[str, str]:
    """`order: cd; firmware: uefi`. Good enough for maps that hosts write (boot parameters, platform, sm-config), whose values
    hold no `; `; what people write is asked by key."""
    pairs = (entry.partition(":") for entry in text.split("; ") if entry.strip())
    return {key.strip(): value.strip() for key, _, value in pairs}
