"""Results as one compact table (the README's), as a table for each comparison, and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar, Protocol

from benchmarks.measure import MiB, Result

Found = Mapping[str, Result]


class Line(Protocol):
    """One line of a compact table; lines of one class make a table."""

    head: ClassVar[str]

    def row(self, found: Found) -> str: ...


@dataclass(frozen=True, slots=True)
class CopyLine:
    """tokvm's `variant` against the fastest of `references`, and against `qemu` where it can."""

    label: str
    variant: str
    references: tuple[str, ...]
    qemu: str = ""

    head: ClassVar[str] = (
        "| copy | tokvm MiB/s | speed: of the kernel's copy or ssh cat | speed: of qemu-img convert "
        "| CPU s/GiB: tokvm, reference, qemu-img | peak RSS MiB |"
    )

    def row(self, found: Found) -> str:
        ours = found[self.variant]
        reference = _fastest(found, self.references)
        others = [reference, found[self.qemu]] if self.qemu else [reference]
        speeds = [f"{other.best_wall_s / ours.best_wall_s:.2f}" for other in others] + ["–"] * (2 - len(others))
        cpu = ", ".join(f"{result.cpu_per_gib:.2f}" for result in (ours, *others))
        return f"| {self.label} | {ours.rate:.0f} | {speeds[0]} | {speeds[1]} | {cpu} | {ours.peak_rss / MiB:.0f} |"


@dataclass(frozen=True, slots=True)
class FormatLine:
    """tokvm's `variant` on a format. flat: qemu-img got the same content as one image. `dissect` "": it reads this wrong."""

    format: str
    runs: str
    variant: str
    references: tuple[str, ...]
    qemu: str
    dissect: str
    flat: bool

    head: ClassVar[str] = (
        "| format | runs | tokvm MiB/s | speed: of the kernel's copy | of qemu-img | of dissect "
        "| CPU s/GiB: tokvm, kernel, qemu-img, dissect | peak RSS MiB: tokvm, qemu-img |"
    )

    def row(self, found: Found) -> str:
        ours, kernel, qemu = found[self.variant], _fastest(found, self.references), found[self.qemu]
        dissect = found.get(self.dissect)
        speeds = [f"{ours.rate / other.rate:.2f}" if other else "–" for other in (kernel, qemu, dissect)]
        if self.flat:
            speeds[1] += " (flat)"
        cpu = ", ".join(f"{result.cpu_per_gib:.2f}" if result else "–" for result in (ours, kernel, qemu, dissect))
        memory = f"{ours.peak_rss / MiB:.0f}, {qemu.peak_rss / MiB:.0f}"
        return f"| {self.format} | {self.runs} | {ours.rate:.0f} | {' | '.join(speeds)} | {cpu} | {memory} |"


@dataclass(frozen=True, slots=True)
class MapLine:
    """One kind of giant, by growing size. `variants`: name in the results of each size, smallest first."""

    label: str
    variants: tuple[str, ...]

    head: ClassVar[str] = "| map | rows, millions | wall s, smallest to largest | CPU s | peak RSS MiB |"

    def row(self, found: Found) -> str:
        results = [found[name] for name in self.variants]
        cells = [
            f"{results[-1].samples[-1].detail['moved'] / 1e6:.2f}",
            ", ".join(f"{result.best_wall_s:.1f}" for result in results),
            ", ".join(f"{result.best_cpu_s:.1f}" for result in results),
            ", ".join(f"{result.peak_rss / MiB:.0f}" for result in results),
        ]
        return f"| {self.label} | {' | '.join(cells)} |"


def _fastest(found: Found, names: Sequence[str]) -> Result:
    return min((found[name] for name in names), key=lambda result: result.best_wall_s)


@dataclass(frozen=True, slots=True)
class Section:
    """One table. `reference` is the variant that the others are divided by; "" for none."""

    title: str
    reference: str
    results: list[Result]
    lines: tuple[Line, ...] = ()


def compact(sections: Sequence[Section], head: str) -> str:
    """Best of the repeats. Speed is the other's wall time divided by tokvm's: above 1, tokvm is faster."""
    tables: dict[str, list[str]] = {}
    for section in sections:
        found = {result.variant: result for result in section.results}
        for line in section.lines:
            tables.setdefault(line.head, []).append(line.row(found))
    texts = ["\n".join([columns, "|---" * (columns.count("|") - 1) + "|", *rows]) for columns, rows in tables.items()]
    return "\n\n".join([head, *texts]) + "\n"


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
        f"| {result.rate:.0f} | {result.peak_rss / MiB:.0f} |"
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
