"""One pass: everything a reader hands out, onto a writer, with checkpoints that never claim more than the medium holds.

(published early: signatures are final, the body follows)
"""

from __future__ import annotations

from collections.abc import Callable

from tokvm.core.disk import DiskReader, DiskWriter
from tokvm.transfer.checkpoint import Checkpoint, PassLimits, PassResult, PassStopped, StopReason, TargetState
from tokvm.transfer.manifest import ManifestWriter

__all__ = ["Checkpoint", "PassLimits", "PassResult", "PassStopped", "StopReason", "TargetState", "run_pass"]


def run_pass(
    reader: DiskReader,
    writer: DiskWriter,
    *,
    state: TargetState,
    resume: Checkpoint | None,
    record: Callable[[Checkpoint], None],
    progress: Callable[[int], None],
    manifest: ManifestWriter | None = None,
    limits: PassLimits = PassLimits(),
    cancelled: Callable[[], bool] | None = None,
    total_deadline: float | None = None,
) -> PassResult:
    """Copy. `record`, `progress` and `cancelled` are called in the calling thread only.

    resume: the last Checkpoint recorded for a reader with the same fingerprint (the caller compares it), or None.
    progress: bytes of DATA done since the last call, this run only; a bar starts at `resume.data_bytes`.
    total_deadline: a `time.monotonic()` instant. When it passes, or `cancelled()` says so, what is in flight is finished,
    flushed and recorded, and PassStopped is raised.
    """
    raise NotImplementedError
