"""tokvm report and tokvm status, as the real command prints them, from a journal of fakes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from tests.cli.conftest import Run
from tests.migration.conftest import Rig

from tokvm.testing.fakes import World

NAME = "db\x1b[31m & <web>"


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    """Where the command looks: a migration that was synced twice."""
    path = tmp_path / "state"
    path.mkdir(mode=0o700)
    found = Rig(path, World.make())
    vm = replace(found.world.machine(), name=NAME)
    found.journal().create(vm=vm, source="fake://source", plan={}, targets=["/fake/0"])
    found.migration().sync(passes=2)
    return found


@pytest.mark.slow
def test_a_status_predicts_before_and_compares_afterwards(rig: Rig, tokvm: Run) -> None:
    before = tokvm("status", NAME)
    assert "a cutover now would stop the VM for about" in before.stdout
    assert "boot 30.0 s (assumed)" in before.stdout
    document = json.loads(tokvm("status", NAME, "--json").stdout)
    assert set(document["predicted_parts"]) == {"stop", "delta", "overhead", "morph", "start", "boot"}
    assert document["predicted_downtime_s"] == pytest.approx(sum(p["seconds"] for p in document["predicted_parts"].values()))
    assert document["predicted_parts"]["delta"]["basis"] == "measured here"
    rig.migration().cutover(deadline_s=20.0, proof_s=20.0)
    rig.migration().finish()
    rig.close()
    after = tokvm("status", NAME)
    assert "a cutover now" not in after.stdout
    assert "predicted" in after.stdout
    assert "downtime total" in after.stdout


@pytest.mark.slow
def test_the_report_in_text_json_and_svg(rig: Rig, tokvm: Run, tmp_path: Path) -> None:
    rig.migration().cutover(deadline_s=20.0, proof_s=20.0)
    rig.migration().finish()
    rig.book.note("prestaged:\x1b[31m virtio in the initramfs")
    rig.close()
    drawing = tmp_path / "it.svg"
    shown = tokvm("report", NAME, "--svg", drawing, "--outside-clock", "12s")
    assert shown.returncode == 0, shown.stderr
    assert "\x1b" not in shown.stdout
    rows = [line.split("\t") for line in shown.stdout.splitlines()]
    assert ["part", "predicted", "from", "actual", "off by"] in rows
    assert next(row for row in rows if row[0] == "boot")[2] == "assumed"
    assert next(row for row in rows if row[0] == "total")[4].endswith("%")
    assert any(row[0].endswith("virtio in the initramfs") for row in rows), "what the journal was told"
    assert "outside clock: 12.0 s; the prediction was off by +" in shown.stdout
    assert ET.fromstring(drawing.read_bytes()).tag.endswith("svg")
    document = json.loads(tokvm("report", NAME, "--json").stdout)
    assert document["name"] == NAME
    assert document["cutovers"][0]["predicted"]["predicted_parts"]["boot"] == {"seconds": 30.0, "basis": "assumed"}


@pytest.mark.slow
def test_what_is_wrong_is_said_once(rig: Rig, tokvm: Run, tmp_path: Path) -> None:
    rig.close()
    assert tokvm("report", "nobody").returncode == 2
    precious = tmp_path / "disk.raw"
    precious.write_bytes(b"boot sector")
    refused = tokvm("report", NAME, "--svg", precious)
    assert refused.returncode == 2
    assert "something else than a drawing" in refused.stderr
    assert precious.read_bytes() == b"boot sector"
