"""The report of a migration: from the journal alone, beside an outside clock, and as a picture that is harmless."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from tests.migration.conftest import Rig

from tokvm.app.report import Report, report_of
from tokvm.app.report_picture import MAX_PICTURE, read_picture
from tokvm.app.report_svg import MAX_PASSES, as_svg, save_svg, verdict_of
from tokvm.core.errors import TokvmError, UsageError
from tokvm.migration.journal import Journal
from tokvm.testing.fakes import Fault, World

HOSTILE = "web</text><script>alert(1)</script>\x1b[2J\x00 &amp; \"'\u202e]]>\ud800\ufffe\n<!ENTITY x>"
SVG = "{http://www.w3.org/2000/svg}"
XLINK = "{http://www.w3.org/1999/xlink}href"


def png(width: int = 3, height: int = 2) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = (b"\0" + b"\x10\x80\x30" * width) * height
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    """Synced twice and rehearsed, under a name that nobody should be called."""
    path = tmp_path / "state"
    path.mkdir(mode=0o700)
    found = Rig(path, World.make(disks=2))
    vm = replace(found.world.machine(), name=HOSTILE)
    found.journal().create(vm=vm, source="fake://source", plan={}, targets=["/fake/<0>", "/fake/1"])
    found.migration().sync(passes=1)
    found.world.clock.sleep(60)
    found.migration().sync(passes=2)
    (path / "screen.png").write_bytes(png())
    record = found.journals[0].migrations()[0]
    document = {
        "verdict": HOSTILE,
        "works": True,
        "why": "<b>it answers</b>",
        "way": "micro",
        "screenshot": "screen.png",
        "timings": {"inspection": 9.0, "morph": 2.0, "boot": 20.0, "odd": "x"},
        "proof": {"sign": "serial", "seconds": 20.0},
        "replay": {"secret": "plan"},
    }
    found.journals[0].book(record.id).rehearsed("micro", document, works=True)
    yield found
    found.close()


def report(rig: Rig, outside: str | None = None) -> Report:
    with Journal.open(rig.path) as journal:
        return report_of(journal, rig.path, journal.migrations()[0].id, outside=outside)


def cut_over(rig: Rig) -> Any:
    return rig.migration().cutover(deadline_s=20.0, proof_s=20.0, settle_s=10.0)


def parsed(drawing: bytes) -> ET.Element:
    """Well-formed, and nothing in it that acts or loads."""
    root = ET.fromstring(drawing)
    assert root.tag == f"{SVG}svg"
    assert {one.tag for one in root.iter()} <= {f"{SVG}{tag}" for tag in ("svg", "title", "rect", "text", "image")}
    for one in root.iter():
        for key, value in one.attrib.items():
            assert not key.startswith("on")
            assert "url(" not in value
            assert key != XLINK or value.startswith("data:image/png;base64,")
    return root


def texts(root: ET.Element) -> list[str]:
    return [one.text or "" for one in root.iter(f"{SVG}text")]


def test_it_tells_predicted_beside_actual_after_finish(rig: Rig) -> None:
    done = cut_over(rig)
    rig.migration().finish()
    found = report(rig)
    document = json.loads(json.dumps(found.to_dict()))
    [cutover] = document["cutovers"]
    assert cutover["end"] == "COMMITTED"
    assert cutover["actual_downtime_s"] == pytest.approx(done.downtime_s["total"], abs=0.002)
    assert cutover["predicted"]["predicted_downtime_s"] == pytest.approx(done.to_dict()["predicted_downtime_s"])
    assert cutover["comparison"]["error_percent"] == pytest.approx(
        100 * (cutover["comparison"]["predicted_s"] / cutover["actual_downtime_s"] - 1), abs=0.5
    )
    assert [one["kind"] for one in document["passes"]] == ["base", "delta", "final"]
    assert [one["phase"] for one in document["phases"]] == [
        "COPY", "STOP_INTENT", "FENCED", "FINAL", "START_INTENT", "STARTED", "COMMITTED",
    ]  # fmt: skip
    assert document["phases"][-1]["end"] == document["finished"]
    assert document["rehearsals"][0]["verdict"] == HOSTILE
    assert "secret" not in json.dumps(document)
    assert document["outcome"] == "report"


def test_an_attempt_that_was_rolled_back_stays_in_the_story(rig: Rig) -> None:
    rig.world.always = {"host.start": Fault.REFUSE}
    with pytest.raises(TokvmError):
        cut_over(rig)
    assert [str(one.end) for one in report(rig).attempts] == ["ROLLED_BACK"]
    rig.world.always = {}
    cut_over(rig)
    found = report(rig)
    assert [str(one.end) for one in found.attempts] == ["ROLLED_BACK", "COMMITTED"]
    assert "start" not in found.attempts[0].actual
    assert all(one.comparison is not None for one in found.attempts)
    root = parsed(as_svg(found))
    assert sum(text.startswith("cutover") for text in texts(root)) == 2


def test_before_any_cutover_there_is_a_report_too(rig: Rig) -> None:
    found = report(rig)
    assert found.attempts == ()
    parsed(as_svg(found))


def test_a_migration_that_has_only_begun_has_a_report(tmp_path: Path) -> None:
    path = tmp_path / "fresh"
    path.mkdir(mode=0o700)
    rig = Rig(path, World.make())
    rig.begin()
    found = report(rig)
    rig.close()
    assert (found.passes, found.rehearsals) == ((), ())
    parsed(as_svg(found))


# ---- the outside clock


def test_seconds_of_an_outside_clock(rig: Rig) -> None:
    cut_over(rig)
    found = report(rig, "50s")
    predicted = found.attempts[0].prediction
    assert found.outside is not None
    assert predicted is not None
    assert found.outside.error_percent == pytest.approx(100 * (predicted.total_s / 50 - 1), abs=0.06)
    assert "outside clock 50.0 s" in verdict_of(found.attempts[0], found.outside)
    assert "outside clock" in texts(parsed(as_svg(found)))


def test_the_lab_s_document_is_an_outside_clock(rig: Rig, tmp_path: Path) -> None:
    cut_over(rig)
    path = tmp_path / "lab.json"
    path.write_text(json.dumps({"downtime_s": {"total": 9.5, "stop": 4.0, "delta": 1.5, "start": 1.0, "boot": 3.0}}))
    found = report(rig, str(path)).outside
    assert found is not None
    assert (found.total_s, found.parts["boot"]) == (9.5, 3.0)
    guests = [{"guest": "other", "downtime_s": {"total": 1}}, {"guest": "guest", "downtime_s": {"total": 7}}]
    path.write_text(json.dumps({"downtime_s": {"total": 9}, "guests": guests}))
    found = report(rig, str(path)).outside
    assert found is not None
    assert found.total_s == 9  # none of them has this VM's name


@pytest.mark.parametrize("text", ["", "{}", "[]", "3", '{"downtime_s": 3}', '{"downtime_s": {"total": "x"}}', "[" * 100_000])
@pytest.mark.slow
def test_a_document_without_a_downtime_is_refused(rig: Rig, tmp_path: Path, text: str) -> None:
    path = tmp_path / "lab.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"outside clock|no downtime_s"):
        report(rig, str(path))


def test_an_outside_clock_that_is_no_file_is_refused(rig: Rig, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for odd in (tmp_path / "missing", tmp_path, tmp_path / "fifo", Path("/dev/zero")):
        with pytest.raises(UsageError, match="outside clock"):
            report(rig, str(odd))


# ---- the picture


def test_a_hostile_name_stays_text(rig: Rig) -> None:
    cut_over(rig)
    root = parsed(as_svg(report(rig)))
    assert any("web</text><script>" in text for text in texts(root))
    assert not any(ord(c) < 32 or c in "\u202e\ufffe" for text in texts(root) for c in text)


def test_bars_of_the_prediction_lie_above_those_of_what_came(rig: Rig) -> None:
    cut_over(rig)
    root = parsed(as_svg(report(rig)))
    rows = [(one.text, float(one.get("y", 0)) - 14) for one in root.iter(f"{SVG}text") if one.get("x") == "20"]
    predicted_y, actual_y = dict(rows)["predicted"], dict(rows)["actual"]
    assert predicted_y < actual_y
    rects = list(root.iter(f"{SVG}rect"))
    drawn = {one.findtext(f"{SVG}title"): one for one in rects if one.get("y") == f"{predicted_y + 3:.1f}"}
    assert float(drawn["boot: 20.0 s"].get("width", 0)) == pytest.approx(
        2 * float(drawn["stop: 10.0 s"].get("width", 0)), abs=0.2
    )
    assert all(float(one.get("x", 0)) + float(one.get("width", 0)) <= 1000 for one in rects)


def test_the_rehearsal_s_screen_is_inside(rig: Rig) -> None:
    root = parsed(as_svg(report(rig)))
    [image] = list(root.iter(f"{SVG}image"))
    assert image.get(XLINK, "").startswith("data:image/png;base64,iVBOR")


@pytest.mark.parametrize("content", [b"", b"GIF89a", png()[:-4], b"<svg/>", png(9000, 1), png() + bytes(MAX_PICTURE)])
@pytest.mark.slow
def test_what_is_no_picture_is_not_inside(rig: Rig, content: bytes) -> None:
    (rig.path / "screen.png").write_bytes(content)
    found = report(rig)
    assert found.rehearsals[0].picture is None
    assert not list(parsed(as_svg(found)).iter(f"{SVG}image"))


def test_no_link_to_elsewhere_is_followed_for_a_picture(tmp_path: Path) -> None:
    (tmp_path / "real.png").write_bytes(png())
    (tmp_path / "link.png").symlink_to("real.png")
    assert read_picture(tmp_path / "real.png") is not None
    assert read_picture(tmp_path / "link.png") is None


def test_hundreds_of_passes_stay_one_picture(rig: Rig) -> None:
    found = report(rig)
    many = tuple(replace(found.passes[0], number=number) for number in range(1, 501))
    shown = texts(parsed(as_svg(replace(found, passes=many))))
    assert sum(text.startswith("pass ") for text in shown) == MAX_PASSES + 1
    assert f"… {499 - MAX_PASSES} passes are not drawn …" in shown
    assert "pass 1 base" in shown
    assert "pass 500 base" in shown


def test_another_program_draws_it(rig: Rig, tmp_path: Path) -> None:
    program = shutil.which("rsvg-convert") or shutil.which("inkscape")
    if program is None:
        pytest.skip("neither rsvg-convert nor inkscape is installed")
    cut_over(rig)
    drawn, path = tmp_path / "drawn.png", tmp_path / "report.svg"
    save_svg(path, as_svg(report(rig, "44s")))
    argv = ["-o", str(drawn), str(path)] if "rsvg" in program else [f"--export-filename={drawn}", str(path)]
    subprocess.run([program, *argv], check=True, timeout=60, capture_output=True)
    assert read_picture(drawn) is not None


def test_a_drawing_replaces_only_a_drawing(rig: Rig, tmp_path: Path) -> None:
    drawing, path = as_svg(report(rig)), tmp_path / "report.svg"
    save_svg(path, drawing)
    save_svg(path, drawing)
    assert path.read_bytes() == drawing
    precious = tmp_path / "disk.raw"
    precious.write_bytes(b"boot sector")
    (tmp_path / "link").symlink_to("report.svg")
    for odd in (precious, tmp_path, tmp_path / "link", tmp_path / "no" / "where.svg", Path("/dev/null")):
        with pytest.raises(UsageError):
            save_svg(odd, drawing)
    assert precious.read_bytes() == b"boot sector"
    assert sorted(one.name for one in tmp_path.iterdir()) == ["disk.raw", "link", "report.svg", "state"]
