"""PSRP as a host speaks it: one shell with its runspace pool, and pipelines that run our one bootstrap. [MS-PSRP] 2.2, 3.2.

    message   destination 4 | type 4 | runspace pool 16 | pipeline 16 | CLIXML        little-endian
    fragment  object id 8 | fragment id 8 | 1 start + 2 end | length 4 | bytes         big-endian; in base64 in the envelope

What comes is read by this module's own eyes; what goes out is cut into many fragments, as Windows may do, and strings are
written by pypsrp's serializer. What is not in the contract is recorded, and the pipeline fails.
"""

from __future__ import annotations

import struct
import threading
import time
import uuid
from collections.abc import Callable
from enum import Enum, auto
from xml.etree import ElementTree

from pypsrp.messages import Destination, Message, MessageType, PipelineState, RunspacePoolStateMessage, SessionCapability
from pypsrp.serializer import Serializer

_FRAGMENT = struct.Struct(">QQBI")
_MESSAGE = struct.Struct("<II16s16s")
_NOBODY = uuid.UUID(int=0)
OPENED, COMPLETED, FAILED = 2, 4, 5
PIECE = 3000
"""Bytes of one fragment that we send: small, so that an answer takes several."""


class Broken(Exception):
    """Bytes that are no PSRP, or are in no row of the contract."""


class Ending(Enum):
    """How a script ended, besides its answer."""

    CONNECTION_DIES = auto()
    CRASHED = auto()
    SAYS_NOTHING = auto()
    NEVER = auto()


Run = Callable[[bytes], bytes | Ending]
"""From a request as powershell.request makes it to the answer in base64."""


class Reader:
    """Fragments to messages (type, pipeline, body)."""

    def __init__(self) -> None:
        self._left = b""
        self._object = -1

    def take(self, raw: bytes) -> list[tuple[int, uuid.UUID, bytes]]:
        found = []
        while raw:
            if len(raw) < _FRAGMENT.size:
                raise Broken("half a fragment's header")
            number, _, flags, length = _FRAGMENT.unpack_from(raw)
            body, raw = raw[_FRAGMENT.size : _FRAGMENT.size + length], raw[_FRAGMENT.size + length :]
            if len(body) != length or bool(flags & 1) == bool(self._left) or (self._left and number != self._object):
                raise Broken(f"fragment {number} of {length} bytes does not go on where the last one ended")
            self._object, self._left = number, self._left + body
            if flags & 2:
                found.append(_message(self._left))
                self._left = b""
        return found


def _message(raw: bytes) -> tuple[int, uuid.UUID, bytes]:
    destination, kind, _, pipeline = _MESSAGE.unpack_from(raw)
    if destination != Destination.SERVER:
        raise Broken(f"a message for {destination}, not for a server")
    return kind, uuid.UUID(bytes_le=pipeline), raw[_MESSAGE.size :].removeprefix(b"\xef\xbb\xbf")


class Shell:
    """One wsmprovhost.exe. Thread-safe."""

    def __init__(self, shell_id: str, bootstrap: str, run: Run) -> None:
        self.id = shell_id
        self._pool = uuid.UUID(shell_id)
        self._bootstrap = bootstrap
        self._run = run
        self._serializer = Serializer()
        self._objects = 0
        self._lock = threading.Lock()
        self._waiting: list[bytes] = []
        self.pipelines: dict[str, Pipeline] = {}

    def open(self, creation: bytes) -> None:
        """What the creation XML holds: who the client is, and the pool that it wants."""
        kinds = [kind for kind, _, _ in Reader().take(creation)]
        if kinds != [MessageType.SESSION_CAPABILITY, MessageType.INIT_RUNSPACEPOOL]:
            raise Broken(f"the shell is opened with messages {kinds}")
        able = Message(Destination.CLIENT, self.id, None, SessionCapability("2.3", "2.0", "1.1.0.1"), self._serializer)
        opened = Message(Destination.CLIENT, self.id, None, RunspacePoolStateMessage(OPENED), self._serializer)  # type: ignore[no-untyped-call]
        self._waiting = [piece for message in (able, opened) for piece in self._pieces(message.pack())]

    def receive(self) -> list[bytes]:
        """What the pool says on its own."""
        with self._lock:
            waiting, self._waiting = self._waiting, []
        return waiting

    def begin(self, command_id: str, first: bytes) -> None:
        if command_id in self.pipelines:
            raise Broken("a second pipeline of this id")
        self.pipelines[command_id] = Pipeline(self, command_id)
        self.pipelines[command_id].take(first)

    def start(self, pipeline: Pipeline, body: bytes) -> None:
        request = _request(body, self._bootstrap, self._serializer)
        threading.Thread(target=self._work, args=(pipeline, request), name="pipeline", daemon=True).start()

    def _work(self, pipeline: Pipeline, request: bytes) -> None:
        said = self._run(request)
        if said is Ending.NEVER:
            return
        ends = uuid.UUID(pipeline.id)
        if isinstance(said, bytes):
            string = self._serializer.serialize(said.decode("ascii"))
            assert string is not None
            text = ElementTree.tostring(string)
            kind = MessageType.PIPELINE_OUTPUT
            output = _MESSAGE.pack(Destination.CLIENT, kind, self._pool.bytes_le, ends.bytes_le) + text
            pipeline.put(self._pieces(output))
        if said is not Ending.CONNECTION_DIES:
            state = PipelineState(FAILED if said is Ending.CRASHED else COMPLETED)  # type: ignore[no-untyped-call]
            pipeline.put(self._pieces(Message(Destination.CLIENT, self.id, pipeline.id, state, self._serializer).pack()))
        pipeline.end(dies=said is Ending.CONNECTION_DIES)

    def _pieces(self, raw: bytes) -> list[bytes]:
        with self._lock:
            self._objects += 1
            number = self._objects
        cuts = range(0, len(raw), PIECE)
        parts = []
        for index, at in enumerate(cuts):
            flags = (1 if index == 0 else 0) | (2 if index == len(cuts) - 1 else 0)
            body = raw[at : at + PIECE]
            parts.append(_FRAGMENT.pack(number, index, flags, len(body)) + body)
        return parts


class Pipeline:
    def __init__(self, shell: Shell, command_id: str) -> None:
        self.id = command_id
        self._shell = shell
        self._reader = Reader()
        self._begun = False
        self._news = threading.Condition()
        self._out: list[bytes] = []
        self._over = False
        self._dies = False

    def take(self, raw: bytes) -> None:
        for kind, of, body in self._reader.take(raw):
            if kind != MessageType.CREATE_PIPELINE or self._begun or str(of).upper() != self.id:
                raise Broken(f"a message of type {kind:#x} for the pipeline {of}")
            self._begun = True
            self._shell.start(self, body)

    def put(self, pieces: list[bytes]) -> None:
        with self._news:
            self._out += pieces
            self._news.notify_all()

    def end(self, *, dies: bool) -> None:
        with self._news:
            self._over, self._dies = True, dies
            self._news.notify_all()

    def receive(self, wait_s: float, *, most: int = 4) -> tuple[list[bytes], bool] | None:
        """(fragments, whether they are the last); None: nothing yet. ConnectionError: the connection is to die now."""
        deadline = time.monotonic() + wait_s
        with self._news:
            while not self._out and not self._over and time.monotonic() < deadline:
                self._news.wait(deadline - time.monotonic())
            if self._dies and not self._out:
                raise ConnectionError
            if not self._out and not self._over:
                return None
            sent, self._out = self._out[:most], self._out[most:]
            return sent, self._over and not self._out


def _request(body: bytes, bootstrap: str, serializer: Serializer) -> bytes:
    """The request of a CREATE_PIPELINE message that runs the bootstrap with three strings, and nothing else."""
    root = ElementTree.fromstring(body)
    commands = root.findall(".//Obj[@N='Cmds']/LST/Obj")
    if len(commands) != 1:
        raise Broken(f"a pipeline of {len(commands)} commands")
    fields = commands[0].find("MS")
    assert fields is not None
    named = {field.get("N"): field for field in fields}
    text = serializer.deserialize(named["Cmd"])
    if text.replace("\r\n", "\n") != bootstrap or named["IsScript"].text != "true" or named["UseLocalScope"].text != "true":
        raise Broken(f"the bootstrap is another one: {text[:200]!r}")
    arguments = [argument.find("MS") for argument in named["Args"].findall("LST/Obj")]
    words = []
    for argument in arguments:
        value = None if argument is None else argument.find("S[@N='V']")
        if argument is None or value is None or argument.find("Nil[@N='N']") is None:
            raise Broken("an argument that is not a string by its place")
        words.append(serializer.deserialize(value))
    if len(words) != 3 or any("\n" in word for word in words):
        raise Broken(f"{len(words)} arguments")
    return "\n".join([*words, "@@X", ""]).encode("ascii")
