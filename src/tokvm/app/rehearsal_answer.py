"""What a rehearsal says in the end: the document that is printed, kept in the journal, and asked before a cutover. Pure.

    facts, judgement, attempts ─► works? by which way, or: what stands against it in the guest, and what became of each way

`why` and `fix` are for a person who has nothing else: a cutover that refuses shows these two alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokvm.app.ways import Replay
from tokvm.core.machine import Finding, Severity
from tokvm.guest.base import GuestError, GuestFacts, Judgement, OsFamily, Verdict, Way


@dataclass(frozen=True, slots=True)
class Attempt:
    """One way tried. timings: seconds (`morph`, `boot`: the typical one of boots); why: of a failure, or what showed life; fix:
    of a failure. boots: seconds of those that showed life."""

    way: Way
    works: bool
    why: str
    timings: dict[str, float]
    replay: Replay
    sign: str = ""
    picture: str = ""
    fix: str = ""
    boots: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, object]:
        return {"way": self.way, "works": self.works, "why": self.why, "fix": self.fix, "timings": self.timings}


def unknown(refused: GuestError, disks: int) -> tuple[GuestFacts, Judgement]:
    """What is known of a guest that could not be inspected: why, and that no way may be chosen for it."""
    finding = Finding(Severity.BLOCKER, refused.what, refused.fix, refused.where)
    judgement = Judgement(Verdict.CANNOT, refused.what, (Verdict.CANNOT,) * disks, (), findings=(finding,))
    return GuestFacts(OsFamily.OTHER), judgement


def answer(
    facts: GuestFacts, judgement: Judgement, attempts: Sequence[Attempt], inspection: dict[str, float]
) -> dict[str, object]:
    """The document. attempts: in the order they were made; the last one is the result. inspection: its timings."""
    best = attempts[-1] if attempts else None
    works = best is not None and best.works
    timings = {**inspection, **(best.timings if best else {})}
    return {
        "verdict": judgement.verdict,
        "verdicts": list(judgement.disks),
        "works": works,
        "why": best.why if best and works else _why_not(judgement, attempts),
        "fix": "" if works else _fix(judgement, attempts),
        "way": best.way if best else "",
        "ways": list(judgement.ways),
        "guest": {"product": facts.product, "distro": facts.distro, "arch": facts.arch, "root": facts.root},
        "findings": [{"severity": f.severity, "what": f.what, "fix": f.fix} for f in judgement.findings],
        "attempts": [attempt.to_dict() for attempt in attempts],
        "screenshot": best.picture if best else "",
        "timings": timings,
        "proof": {"sign": best.sign if best else "", "seconds": timings.get("boot"), "boots": list(best.boots) if best else []},
        "replay": best.replay.to_json() if best and works else None,
    }


def _why_not(judgement: Judgement, attempts: Sequence[Attempt]) -> str:
    """What the guest has against it, then what became of each way: the last failure alone would hide the one to mend."""
    against = [one.what for one in _against(judgement)]
    if not against and len(attempts) == 1:
        return attempts[0].why
    return "; ".join([*against, *(f"{one.way}: {one.why}" for one in attempts)]) or judgement.why


def _fix(judgement: Judgement, attempts: Sequence[Attempt]) -> str:
    fixes = [one.fix for one in _against(judgement)] + [one.fix for one in attempts]
    return next((one for one in fixes if one), "")


def _against(judgement: Judgement) -> list[Finding]:
    """Blockers; and what made the verdict, which is a warning only while another way is left."""
    return [one for one in judgement.findings if one.severity is Severity.BLOCKER or one.what == judgement.why]
