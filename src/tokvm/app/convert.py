"""A chain onto a target (convert), and a layer onto a target that holds what it was made over (apply).

    convert   maps walked and checked ─► target opened, interlocks ─► note: pending ─► pass ─► note: holds the top layer
    apply     note: holds X ─► layer made over X? ─► note: pending ─► delta pass ─► note: holds the layer

Killed in between, the same command goes on from the last checkpoint. Another layer, a repeated one, or a target that is not the
one that was noted is refused; nothing is written then.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tokvm.app.held import Content, Held, Note, Pending
from tokvm.app.targets import target_spec
from tokvm.app.watching import Progress
from tokvm.core.disk import BufferPool
from tokvm.core.errors import ImageError, UnsafeTarget, UsageError
from tokvm.core.text import printable
from tokvm.images.base import UNKNOWN_PARENT
from tokvm.images.chain import Chain
from tokvm.images.reader import ChainReader
from tokvm.targets.open import TargetSpec, open_target
from tokvm.targets.qcow2_readback import Qcow2ReadBack
from tokvm.targets.readback import ReadBack
from tokvm.transfer.checkpoint import Checkpoint, PassLimits, PassResult, TargetState
from tokvm.transfer.passes import run_pass

log = logging.getLogger(__name__)

BUFFERS = 8  # of 2 MiB: measured, more brings nothing
_KEPT = 1000  # signatures of layers applied to one target
_EMPTY = ""  # the signature of layers that say nothing: applied twice they do no harm, and may look all the same
# The note is a file of its own, renamed and flushed each time: rarer than the journal's checkpoints.
_LIMITS = PassLimits(checkpoint_bytes=4 << 30, checkpoint_s=10.0)


@dataclass(frozen=True, slots=True)
class Target:
    """path: absolute. format: `raw` or `qcow2`. overwrite: the size or serial that the operator repeated, or None."""

    path: str
    format: str = "raw"
    overwrite: str | None = None

    def open_to_read(self) -> ReadBack | Qcow2ReadBack:
        """The target, past the page cache; nothing can be written to it."""
        return Qcow2ReadBack.open(self.path) if self.format == "qcow2" else ReadBack.open(self.path)

    def spec(self, *, create: bool) -> TargetSpec:
        return replace(target_spec(self.path, self.overwrite), create=create, format=self.format)


def convert(chain: Chain, target: Target, progress: Progress, *, force_linkage: bool = False) -> PassResult:
    """All of the chain's content; absent ranges read as zeros afterwards, whatever the target held before."""
    _check_whole(chain, force_linkage=force_linkage)
    reader, signature = _reading(chain)
    note = Note.of(target.path)
    pending = Pending("convert", tuple(layer.name for layer in chain.layers), signature, reader.fingerprint)
    expect, resume = _resumed(note, target, pending)
    with closing(open_target(target.spec(create=True), size=chain.size, expect=expect)) as writer:
        note.write(Held(writer.identity, pending=replace(pending, checkpoint=resume)))
        progress.begin("convert", reader.total, resume.data_bytes if resume else 0)
        result = run_pass(
            reader, writer, state=TargetState.UNKNOWN, resume=resume, record=note.checkpoint,
            progress=progress.advance, limits=_LIMITS,
        )  # fmt: skip
        note.write(Held(writer.identity, holds=_content(chain), applied=(signature,)))
    return result


def apply(chain: Chain, target: Target, progress: Progress, *, force_linkage: bool = False) -> PassResult:
    """What the layers of a partial chain say, onto a target that holds the disk they were made over."""
    if not chain.partial:
        raise UsageError(
            f"{printable(chain.layers[0].name)} is a base, not a layer over another", fix="copy it with tokvm image convert"
        )
    note = Note.of(target.path)
    held = note.read()
    reader, signature = _reading(chain)
    pending, resume = _next_step(chain, held, reader, signature, target, force_linkage=force_linkage)
    expect = held.target if held is not None else None
    with closing(open_target(target.spec(create=False), size=chain.size, expect=expect)) as writer:
        now = replace(held or Held(writer.identity), target=writer.identity, pending=replace(pending, checkpoint=resume))
        note.write(now)
        progress.begin("apply", reader.total, resume.data_bytes if resume else 0)
        result = run_pass(
            reader, writer, state=TargetState.PREVIOUS_PASS, resume=resume, record=note.checkpoint,
            progress=progress.advance, limits=_LIMITS, grown_from=pending.grown_from,
        )  # fmt: skip
        note.write(Held(writer.identity, holds=_content(chain), applied=(*now.applied, signature)[-_KEPT:]))
    return result


def _reading(chain: Chain) -> tuple[ChainReader, str]:
    """The reader and the signature of what it will say. The maps are walked here, so damage is found before anything is opened
    for writing."""
    reader = ChainReader(chain, pool=BufferPool(BUFFERS))
    digest = hashlib.blake2b(digest_size=16)
    for layer in chain.layers:
        digest.update(f"{layer.format} {layer.linkage} {layer.size}\n".encode())
    rows = 0
    for window in reader.covered():
        rows += len(window)
        for column in (window.offset, window.length, window.kind, window.file_offset):
            digest.update(np.ascontiguousarray(column).data)
    return reader, digest.hexdigest() if rows else _EMPTY


def _check_whole(chain: Chain, *, force_linkage: bool) -> None:
    if not chain.partial:
        return
    problem = ImageError(
        f"it was made over parent {chain.parent_identity}, which is not listed",
        where=chain.layers[0].name,
        fix="list the whole chain, base first; or apply it onto a target that holds its parent: tokvm image apply. "
        "--force-linkage reads the missing parent as zeros",
    )
    if not force_linkage:
        raise problem
    log.warning("%s: %s; it is read as zeros because linkage is forced", chain.layers[0].name, problem.what)


def _resumed(note: Note, target: Target, mine: Pending) -> tuple[str | None, Checkpoint | None]:
    """(the identity that the target must have, where to go on) when an earlier run of the same conversion broke off."""
    if not Path(target.path).exists():
        note.forget()
        return None, None
    if target.overwrite is not None:
        return None, None
    held = note.read()
    before = held.pending if held is not None else None
    if held is None or before is None or before.what != "convert":
        return None, None
    if before.signature != mine.signature:
        raise UnsafeTarget(
            f"it holds a part of another conversion, of {printable(', '.join(before.names))}",
            where=target.path,
            fix=f"go on with that one, or give it up: --overwrite {target.path}={Path(target.path).stat().st_size}",
        )
    return held.target, before.checkpoint if before.fingerprint == mine.fingerprint else None


def _next_step(
    chain: Chain, held: Held | None, reader: ChainReader, signature: str, target: Target, *, force_linkage: bool
) -> tuple[Pending, Checkpoint | None]:
    """What to note before the layer is applied, and where to go on; or the refusal."""
    names = tuple(layer.name for layer in chain.layers)
    before = held.pending if held is not None else None
    if before is not None:
        if before.what != "apply" or before.signature != signature:
            raise UsageError(
                f"the target is in the middle of another {before.what}, of {printable(', '.join(before.names))}",
                where=target.path,
                fix="run that command again to its end first",
            )
        return before, before.checkpoint if before.fingerprint == reader.fingerprint else None
    holds = held.holds if held is not None else None
    for problem in _problems(chain, holds, held, signature, target):
        if not force_linkage:
            raise problem
        log.warning("%s: %s; going on because linkage is forced", problem.where, problem.what)
    grown = holds.size if holds is not None and holds.size < chain.size else None
    return Pending("apply", names, signature, reader.fingerprint, grown_from=grown), None


def _problems(chain: Chain, holds: Content | None, held: Held | None, signature: str, target: Target) -> Iterator[ImageError]:
    """Why the layer must not go onto the target."""
    lowest = chain.layers[0]
    made_over = f"it was made over {' or '.join(lowest.linkage.parents)}"
    forced = "--force-linkage if you know that it belongs there"

    def problem(what: str, fix: str) -> ImageError:
        return ImageError(what, where=lowest.name, fix=f"{fix}; {forced}")

    if holds is None:
        yield problem(
            f"{made_over}, but nothing is noted about what {printable(target.path)} holds",
            "copy the base with tokvm image convert, which notes it",
        )
        return
    if held is not None and signature != _EMPTY and signature in held.applied:
        yield problem(f"this layer was applied already; the target holds {_named(holds)}", "apply the next layer")
    elif UNKNOWN_PARENT in lowest.linkage.parents:
        yield problem(f"it does not say over which disk it was made; the target holds {_named(holds)}", "give its descriptor")
    elif not set(lowest.linkage.parents) & set(holds.ids):
        yield problem(
            f"{made_over}, but the target holds {_named(holds)}", "apply every layer once, in the order they were made"
        )
    elif not lowest.linkage.knows_file(holds.name):
        yield problem(
            f"it was made over the file {printable(lowest.linkage.parent_file)}, but the target holds {_named(holds)} "
            "(such an id does not tell the layers of a running VM apart)",
            "apply every layer once, in the order they were made",
        )
    if chain.size < holds.size:
        yield problem(f"its size {chain.size} is smaller than {holds.size}, the target's disk", "a layer never shrinks a disk")
    if lowest.sector_size != holds.sector_size:
        what = f"its logical sectors have {lowest.sector_size} bytes, those of the target's disk {holds.sector_size}"
        yield problem(what, "give the layer of this disk")


def _named(holds: Content) -> str:
    return f"{holds.ids[0] if holds.ids else 'a disk without an id'} of {printable(holds.name)}"


def _content(chain: Chain) -> Content:
    top = chain.layers[-1]
    return Content(top.linkage.ids, top.format, Path(top.name).name, chain.size, top.sector_size)
