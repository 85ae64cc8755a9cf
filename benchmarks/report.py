"""Results as markdown tables and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from benchmarks.measure import MiB, Result


@dataclass(frozen=True, slots=True)
class Section:
    """One table. `reference` is the variant that the others are divided by; "" for none."""

    title: str
    reference: str
    results: list[Result]


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
