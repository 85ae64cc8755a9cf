"""Nobody starts the source any more: not a person, not HA, not the host's own boot.

    other-config:tokvm-fence     what it was before, as JSON; written first, removed last, never overwritten
    blocked-operations           start, start_on, resume: our reason, unless somebody blocks it already
    ha-restart-priority          emptied: HA does not restart the VM (it would even after a shutdown from inside the guest)
    other-config:auto_poweron    `false` if it was `true`: the host's boot does not start it

Whatever died in between, the record tells the next one all that has to be put back. A block of somebody else is left alone,
now and at the end. When the fence is lifted the blocks go first and the priority comes last: where HA refuses it, the VM can
be started all the same, and the record stays for a later try.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass

from tokvm.core.errors import ConnectionLost, SourceError, UsageError
from tokvm.sources.xenserver.claims import remove_key
from tokvm.sources.xenserver.xe import Xe, value_of

log = logging.getLogger(__name__)

RECORD = "tokvm-fence"
OPERATIONS = ("start", "start_on", "resume")
_AUTO = "auto_poweron"
_VERSION = 1


@dataclass(frozen=True, slots=True)
class Before:
    """How the VM was before it was fenced. `blocked`: the operations that somebody else blocks."""

    reason: str
    blocked: tuple[str, ...]
    ha_priority: str
    auto_poweron: bool

    def to_json(self) -> str:
        return json.dumps({"version": _VERSION, **asdict(self)}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Before:
        """ValueError for anything that `to_json` did not write."""
        found = json.loads(text)
        if not isinstance(found, dict) or found.get("version") != _VERSION:
            raise ValueError("not a record of this version")
        reason, blocked, priority, auto = (found.get(key) for key in ("reason", "blocked", "ha_priority", "auto_poweron"))
        if not (isinstance(reason, str) and isinstance(priority, str) and isinstance(auto, bool) and isinstance(blocked, list)):
            raise ValueError("a field is missing or of another type")  # noqa: TRY004 - it is about the text
        if not all(operation in OPERATIONS for operation in blocked):
            raise ValueError("it names an operation that tokvm does not block")
        return cls(reason, tuple(blocked), priority, auto)


@dataclass(frozen=True, slots=True)
class _Now:
    """What is set at this moment. `blocks` maps each of OPERATIONS to its reason or None."""

    blocks: dict[str, str | None]
    ha_priority: str
    auto_poweron: bool

    @property
    def shut(self) -> bool:
        return all(reason is not None for reason in self.blocks.values()) and not self.ha_priority and not self.auto_poweron


def fence(xe: Xe, vm: str, reason: str) -> None:
    if not reason or "\0" in reason:
        raise UsageError("a fence needs a reason that people can read")
    before = _saved(xe, vm) or _save(xe, vm, reason)
    now = _look(xe, vm)
    for operation, blocked in now.blocks.items():
        if blocked is None:
            xe.act("vm-param-set", f"uuid={vm}", f"blocked-operations:{operation}={before.reason}")
    _set_ha(xe, vm, now, "")
    _set_auto(xe, vm, now, wanted=False)
    now = _look(xe, vm)
    if not now.shut:
        raise _refused(xe, vm, "fenced", now)
    log.info("VM %s is fenced", vm)


def is_fenced(xe: Xe, vm: str) -> bool:
    return _look(xe, vm).shut


def unfence(xe: Xe, vm: str) -> None:
    before = _saved(xe, vm)
    if before is None:
        return
    now = _look(xe, vm)
    for operation, blocked in now.blocks.items():
        if blocked == before.reason and operation not in before.blocked:
            remove_key(xe, vm, "blocked-operations", operation)
        elif blocked is not None:
            log.warning("VM %s: %s stays blocked by somebody else: %s", vm, operation, blocked)
    _set_auto(xe, vm, now, wanted=before.auto_poweron)
    refusal = _restore_ha(xe, vm, now, before.ha_priority)
    now = _look(xe, vm)
    ours = [
        operation for operation, reason in now.blocks.items() if reason == before.reason and operation not in before.blocked
    ]
    if ours or now.auto_poweron != before.auto_poweron:
        raise _refused(xe, vm, "unfenced", now)
    if now.ha_priority != before.ha_priority:
        log.warning(
            "VM %s may be started again, but HA does not protect it: ha-restart-priority is %r and was %r before (%s); "
            "set it by hand (xe vm-param-set), or unfence again when HA has room",
            vm,
            now.ha_priority,
            before.ha_priority,
            refusal or "it was read back unchanged",
        )
        return
    remove_key(xe, vm, "other-config", RECORD)
    if xe.key(vm, "other-config", RECORD):
        raise _refused(xe, vm, "unfenced", now)
    log.info("VM %s is unfenced", vm)


def record(xe: Xe, vm: str) -> str | None:
    """The saved record as it is, or None."""
    return xe.key(vm, "other-config", RECORD) or None


def _saved(xe: Xe, vm: str) -> Before | None:
    text = record(xe, vm)
    if text is None:
        return None
    try:
        return Before.from_json(text)
    except (ValueError, RecursionError) as exc:
        raise SourceError(
            f"other-config:{RECORD} is not what tokvm wrote: {exc}",
            where=f"{xe.where} VM {vm}",
            fix="put blocked-operations, ha-restart-priority and other-config:auto_poweron right by hand, "
            f"then remove the key: xe vm-param-remove uuid={vm} param-name=other-config param-key={RECORD}",
        ) from exc


def _save(xe: Xe, vm: str, reason: str) -> Before:
    now = _look(xe, vm)
    blocked = tuple(operation for operation, found in now.blocks.items() if found is not None)
    before = Before(reason, blocked, now.ha_priority, now.auto_poweron)
    xe.act("vm-param-set", f"uuid={vm}", f"other-config:{RECORD}={before.to_json()}")
    if _saved(xe, vm) != before:
        raise SourceError(
            "what has to be restored later could not be saved on the VM; nothing was changed",
            where=f"{xe.where} VM {vm}",
            fix="see whether somebody else is changing the VM's other-config, then run the same command again",
        )
    return before


def _look(xe: Xe, vm: str) -> _Now:
    wanted = [("blocked-operations", operation) for operation in OPERATIONS]
    *blocks, auto = xe.keys(vm, [*wanted, ("other-config", _AUTO)])
    priority = xe.ask(*value_of("vm", vm, "ha-restart-priority"))
    return _Now(dict(zip(OPERATIONS, blocks, strict=True)), priority, auto == "true")


def _set_ha(xe: Xe, vm: str, now: _Now, wanted: str) -> None:
    if now.ha_priority != wanted:
        xe.act("vm-param-set", f"uuid={vm}", f"ha-restart-priority={wanted}")


def _restore_ha(xe: Xe, vm: str, now: _Now, wanted: str) -> str:
    """HA refuses a priority while its failover plan has no room for the VM (a host is down). Why, or "" when it did not."""
    try:
        _set_ha(xe, vm, now, wanted)
    except ConnectionLost:
        raise
    except SourceError as refused:
        return refused.what
    return ""


def _set_auto(xe: Xe, vm: str, now: _Now, *, wanted: bool) -> None:
    """A VM without the key is not started at boot, so an absent key is left absent."""
    if now.auto_poweron != wanted:
        xe.act("vm-param-set", f"uuid={vm}", f"other-config:{_AUTO}={'true' if wanted else 'false'}")


def _refused(xe: Xe, vm: str, wanted: str, now: _Now) -> SourceError:
    blocked = ", ".join(name for name, reason in now.blocks.items() if reason is not None) or "nothing"
    return SourceError(
        f"the VM could not be {wanted}: read back, blocked is {blocked}, ha-restart-priority is {now.ha_priority!r}, "
        f"auto_poweron is {now.auto_poweron}",
        where=f"{xe.where} VM {vm}",
        fix="see whether somebody else is changing the VM, then run the same command again",
    )
