"""A report as one SVG 1.1 picture that stands alone: no script, no font, nothing loaded from anywhere.

    name, source → targets
    time ─────────────────────────────►   phases, passes with their bytes, rehearsals
    cutover n     predicted ▇▇▇▇▇▇▇▇      above actual (and the outside clock's), one scale; a table of the parts
    pictures of the rehearsals            as data: PNG

Text is set by ElementTree, so it cannot become markup, and `readable` leaves no character in it that XML forbids.
"""

from __future__ import annotations

import os
import stat
import tempfile
from base64 import b64encode
from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree as ET

from tokvm.app.report import Attempt, Outside, Rehearsed, Report, moment
from tokvm.core.errors import UsageError
from tokvm.core.text import readable
from tokvm.core.units import format_bytes, format_duration, format_rate
from tokvm.migration.phases import Phase
from tokvm.transfer.predict import PARTS

WIDTH, LEFT, RIGHT = 1000, 130, 720
"""Pixels; the time axis lies between LEFT and RIGHT, figures stand to its right."""
ROW = 20
MAX_PASSES, MAX_PICTURES = 40, 4
COLOURS = {
    "stop": "#0072b2", "delta": "#e69f00", "overhead": "#999999", "morph": "#cc79a7", "start": "#56b4e9", "boot": "#009e73",
}  # fmt: skip
"""Okabe and Ito's palette (2008), which colour-blind people can tell apart."""
PHASE_COLOURS = {
    Phase.COPY: "#cfe3f2", Phase.COMMITTED: "#009e73", Phase.STARTED: "#8fd0bb", Phase.ROLLBACK_INTENT: "#d55e00",
    Phase.ROLLED_BACK: "#f3c3a5",
}  # fmt: skip
WINDOW_COLOUR = "#e69f00"
BEGIN = b"<?xml version='1.0' encoding='utf-8'?>\n<svg "


class Sheet:
    """Paper of growing length: `y` is where the next row begins."""

    def __init__(self, title: str) -> None:
        self.y = 0.0
        self.root = ET.Element(
            "svg",
            {"xmlns": "http://www.w3.org/2000/svg", "xmlns:xlink": "http://www.w3.org/1999/xlink", "version": "1.1"},
        )
        self.root.set("font-family", "sans-serif")
        ET.SubElement(self.root, "title").text = title
        self._paper = self._add("rect", x=0, y=0, width=WIDTH, fill="#ffffff")

    def text(
        self, x: float, text: str, *, size: int = 12, weight: str = "normal", fill: str = "#222222", anchor: str = "start"
    ) -> None:
        """On the row at `y`."""
        words = {"font-size": size, "font-weight": weight, "text-anchor": anchor}
        self._add("text", x=x, y=self.y + 14, fill=fill, **words).text = readable(text, limit=160)

    def bar(self, x: float, width: float, fill: str, hint: str, *, height: float = 14) -> None:
        """On the row at `y`; never too thin to be seen."""
        drawn = self._add("rect", x=x, y=self.y + 3, width=max(1.5, width), height=height, fill=fill)
        ET.SubElement(drawn, "title").text = readable(hint)

    def picture(self, png: bytes, width: float, height: float) -> None:
        data = "data:image/png;base64," + b64encode(png).decode("ascii")
        self._add("image", x=LEFT, y=self.y, width=width, height=height, **{"xlink:href": data})

    def line(self) -> None:
        self._add("rect", x=20, y=self.y + 4, width=WIDTH - 40, height=1, fill="#dddddd")

    def down(self, pixels: float = ROW) -> None:
        self.y += pixels

    def done(self) -> bytes:
        height = f"{self.y + 20:.0f}"
        self._paper.set("height", height)
        self.root.set("width", str(WIDTH))
        self.root.set("height", height)
        self.root.set("viewBox", f"0 0 {WIDTH} {height}")
        return bytes(ET.tostring(self.root, encoding="utf-8", xml_declaration=True)) + b"\n"

    def _add(self, tag: str, **attributes: object) -> ET.Element:
        return ET.SubElement(self.root, tag, {k: f"{v:.1f}" if isinstance(v, float) else str(v) for k, v in attributes.items()})


def as_svg(report: Report) -> bytes:
    """The picture, UTF-8."""
    record = report.record
    sheet = Sheet(readable(f"Migration {record.id} of {record.name}"))
    sheet.down(16)
    sheet.text(20, record.name, size=20, weight="bold")
    sheet.down(26)
    sheet.text(20, f"migration {record.id}, {record.phase}{', finished' if record.finished else ''}", fill="#555555")
    sheet.down()
    sheet.text(20, f"{record.source} → {', '.join(report.targets)}", fill="#555555")
    sheet.down(30)
    _history(sheet, report)
    for attempt in report.attempts:
        last = attempt is report.attempts[-1]
        _cutover(sheet, attempt, report.outside if last else None)
    if not report.attempts and report.outside is not None:
        sheet.text(20, f"downtime by the outside clock: {format_duration(report.outside.total_s)}")
        sheet.down()
    _pictures(sheet, report.rehearsals)
    return sheet.done()


def _history(sheet: Sheet, report: Report) -> None:
    """Everything on one time axis, from the beginning to the last that is known."""
    begin = report.record.created
    span = max(report.until - begin, 0.001)

    def at(wall: float) -> float:
        return LEFT + (RIGHT - LEFT) * min(1.0, max(0.0, (wall - begin) / span))

    sheet.text(LEFT, moment(begin), size=11, fill="#555555")
    sheet.text(RIGHT, f"{moment(report.until)}  (+{format_duration(span)})", size=11, fill="#555555", anchor="end")
    sheet.down()
    sheet.text(20, "phases")
    for phase in report.phases:
        hint = f"{phase.phase}: {moment(phase.begin)}, {format_duration(phase.end - phase.begin)} {phase.note}"
        sheet.bar(at(phase.begin), at(phase.end) - at(phase.begin), PHASE_COLOURS.get(phase.phase, WINDOW_COLOUR), hint)
    sheet.text(RIGHT + 10, str(report.record.phase))
    sheet.down()
    left_out = report.passes[1:-MAX_PASSES]
    for one in report.passes:
        if left_out and one is left_out[0]:
            sheet.text(LEFT, f"… {len(left_out)} passes are not drawn …", fill="#555555")
            sheet.down()
        if one in left_out:
            continue
        figures = f"{format_bytes(one.bytes)} in {format_duration(one.seconds)}"
        rate = f", {format_rate(one.bytes / one.seconds)}" if one.seconds > 0 else ""
        sheet.text(20, f"pass {one.number} {one.kind}")
        sheet.bar(at(one.wall), at(one.wall + one.seconds) - at(one.wall), COLOURS["delta"], figures + rate)
        sheet.text(RIGHT + 10, figures + rate + ("" if one.done else ", not complete"))
        sheet.down()
    for rehearsal in report.rehearsals:
        took = sum(rehearsal.seconds().values())
        fill = COLOURS["boot"] if rehearsal.works else "#d55e00"
        sheet.text(20, f"rehearsal {rehearsal.number}")
        sheet.bar(at(rehearsal.wall - took), at(rehearsal.wall) - at(rehearsal.wall - took), fill, rehearsal.text("why"))
        sheet.text(RIGHT + 10, readable(rehearsal.verdict(), limit=44))
        sheet.down()
    sheet.down(10)


def _cutover(sheet: Sheet, attempt: Attempt, outside: Outside | None) -> None:
    """Predicted above actual on one scale, then the parts as figures."""
    predicted = {} if attempt.prediction is None else {name: one.seconds for name, one in attempt.prediction.parts.items()}
    rows: list[tuple[str, Mapping[str, float], float]] = [
        ("predicted", predicted, sum(predicted.values())),
        ("actual", attempt.actual, attempt.actual_s),
    ]
    if outside is not None:
        rows.append(("outside clock", outside.parts or {"downtime": outside.total_s}, outside.total_s))
    longest = max((total for _, _, total in rows), default=0.0) or 1.0
    sheet.line()
    sheet.down(12)
    sheet.text(20, f"cutover {attempt.number}, {moment(attempt.wall)}: {attempt.end}", size=14, weight="bold")
    sheet.text(WIDTH - 20, verdict_of(attempt, outside), anchor="end")
    sheet.down(24)
    for label, parts, total in rows:
        sheet.text(20, label)
        x = float(LEFT)
        for name, seconds in parts.items():
            width = (RIGHT - LEFT) * seconds / longest
            if seconds > 0:
                sheet.bar(x, width, COLOURS.get(name, "#444444"), f"{name}: {format_duration(seconds)}")
            x += width
        sheet.text(RIGHT + 10, format_duration(total) if total else "none")
        sheet.down()
    sheet.down(6)
    _parts(sheet, attempt)


def _parts(sheet: Sheet, attempt: Attempt) -> None:
    predicted = {} if attempt.prediction is None else attempt.prediction.parts
    for x, head in ((LEFT + 20, "part"), (260, "predicted"), (360, "from"), (580, "actual")):
        sheet.text(x, head, size=11, fill="#555555")
    sheet.down(18)
    for name in PARTS:
        if name not in predicted and name not in attempt.actual:
            continue
        sheet.bar(LEFT, 12, COLOURS[name], name, height=12)
        sheet.text(LEFT + 20, name)
        if name in predicted:
            sheet.text(260, format_duration(predicted[name].seconds))
            sheet.text(360, str(predicted[name].basis), fill="#555555")
        sheet.text(580, format_duration(attempt.actual[name]) if name in attempt.actual else "–")
        sheet.down(18)
    sheet.down(10)


def verdict_of(attempt: Attempt, outside: Outside | None = None) -> str:
    """How good the prediction was, in one line."""
    found = attempt.comparison
    said = []
    if found is not None and found.error_percent is not None:
        predicted, came = format_duration(found.predicted_s), format_duration(found.actual_s)
        said.append(f"predicted {predicted}, came {came} ({found.error_percent:+.1f} %)")
    if outside is not None:
        error = "" if outside.error_percent is None else f" (prediction {outside.error_percent:+.1f} %)"
        said.append(f"outside clock {format_duration(outside.total_s)}{error}")
    return "; ".join(said)


def _pictures(sheet: Sheet, rehearsals: tuple[Rehearsed, ...]) -> None:
    """The newest few, as wide as the axis at most."""
    for rehearsal in [one for one in rehearsals if one.picture is not None][-MAX_PICTURES:]:
        picture = rehearsal.picture
        if picture is None:
            continue
        width = min(picture.width, RIGHT - LEFT)
        height = picture.height * width / picture.width
        sheet.line()
        sheet.down(12)
        sheet.text(20, f"rehearsal {rehearsal.number}, {moment(rehearsal.wall)}: {rehearsal.verdict()}", weight="bold")
        sheet.down(24)
        sheet.picture(picture.png, width, height)
        sheet.down(height + 10)


def save_svg(path: Path, drawing: bytes) -> None:
    """All of it or nothing. What is there already is replaced only if it is such a drawing: a slip of the keyboard must not
    cost a disk image. UsageError otherwise."""
    try:
        found = path.lstat()
    except OSError:
        found = None
    try:
        if found is not None and not _is_ours(path, found.st_mode):
            what = "there is something else than a drawing of tokvm's"
            raise UsageError(what, where=str(path), fix="give the name of a new file")
        fd, draft = tempfile.mkstemp(dir=path.parent, prefix=".tokvm-", suffix=".svg")
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(drawing)
            Path(draft).replace(path)
        except BaseException:
            Path(draft).unlink(missing_ok=True)
            raise
    except OSError as exc:
        raise UsageError(f"the drawing cannot be written: {exc.strerror}", where=str(path), fix="give another file") from exc


def _is_ours(path: Path, mode: int) -> bool:
    if not stat.S_ISREG(mode):
        return False
    with path.open("rb") as file:
        return file.read(len(BEGIN)) == BEGIN
