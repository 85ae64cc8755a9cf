"""Results as one compact table (the README's), as a table for each comparison, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from benchmarks.measure import MiB, Result

GiB = 1024 * MiB


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the compact table: tokvm's `variant` against the fastest of `references`, and against `qemu` where it can."""

    label: str
    variant: str
    references: tuple[str, ...]
    qemu: str = ""


@dataclass(frozen=True, slots=True)
class Section:
    """One table. `reference` is the variant that the others are divided by; "" for none."""

    title: str
    reference: str
    results: list[Result]
    lines: tuple[Line, ...] = ()


def compact(sections: Sequence[Section], head: str) -> str:
    """Best of the repeats. Speed is the other's wall time divided by tokvm's: above 1, tokvm is faster."""
    rows = [
        "| copy | tokvm MiB/s | speed: of the kernel's copy or ssh cat | speed: of qemu-img convert "
        "| CPU s/GiB: tokvm, reference, qemu-img | peak RSS MiB |",
        "|---|---|---|---|---|---|",
    ]
    rows += [_compact_row(line, section) for section in sections for line in section.lines]
    return f"{head}\n\n" + "\n".join(rows) + "\n"


def _compact_row(line: Line, section: Section) -> str:
    found = {result.variant: result for result in section.results}
    ours = found[line.variant]
    reference = min((found[name] for name in line.references), key=lambda result: result.best_wall_s)
    others = [reference, found[line.qemu]] if line.qemu else [reference]
    speeds = [f"{other.best_wall_s / ours.best_wall_s:.2f}" for other in others] + ["–"] * (2 - len(others))
    cpu = ", ".join(f"{result.best_cpu_s * GiB / result.payload:.2f}" for result in (ours, *others))
    rate = ours.payload / MiB / ours.best_wall_s
    return f"| {line.label} | {rate:.0f} | {speeds[0]} | {speeds[1]} | {cpu} | {ours.peak_rss / MiB:.0f} |"


def markdown(sections: Sequence[Section], head: str) -> str:
    return "\n\n".join([head, *(_table(section) for section in sections)]) + "\n"


def _table(section: Section) -> str:
    rows = [
        f"### {section.title}",
        "",
        "| variant | wall s, best (median) | speed | CPU s, best (median) | CPU | MiB/s | peak MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    reference = next((result for result in section.results if result.variant == section.reference), None)
    return "\n".join([*rows, *(_row(result, reference) for result in section.results)])


def _row(result: Result, reference: Result | None) -> str:
    speed = f"{reference.best_wall_s / result.best_wall_s:.2f}" if reference else ""
    cpu = f"{result.best_cpu_s / reference.best_cpu_s:.2f}" if reference else ""
    return (
        f"| {result.variant} | {result.best_wall_s:.2f} ({result.median_wall_s:.2f}) | {speed} "
        f"| {result.best_cpu_s:.2f} ({result.median_cpu_s:.2f}) | {cpu} "
        f"| {result.payload / MiB / result.best_wall_s:.0f} | {result.peak_rss / MiB:.0f} |"
    )


def as_dict(sections: Sequence[Section]) -> list[dict[str, object]]:
    return [
        {
            "title": section.title,
            "reference": section.reference,
            "results": [
                {
                    "variant": result.variant,
                    "payload": result.payload,
                    "best_wall_s": result.best_wall_s,
                    "median_wall_s": result.median_wall_s,
                    "best_cpu_s": result.best_cpu_s,
                    "median_cpu_s": result.median_cpu_s,
                    "peak_rss": result.peak_rss,
                    "samples": [asdict(sample) for sample in result.samples],
                }
                for result in section.results
            ],
        }
        for section in sections
    ]
