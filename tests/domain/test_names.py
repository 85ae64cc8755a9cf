from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tokvm.domain.names import NAME_BYTES, legal_name, one_line, pack, unpack, xml_text

UUID = "9f3a2b1c-0000-4000-8000-0123456789ab"
OTHER = "0f3a2b1c-0000-4000-8000-0123456789ab"
any_text = st.text(st.characters(exclude_categories=[]))


@pytest.mark.parametrize("name", ["web", "Web server (2)", "büro-Ä", "数据库", "a.b_c+d@e:f", "x" * 200])
def test_harmless_names_stay(name: str) -> None:
    assert legal_name(name, UUID) == name


@pytest.mark.parametrize(
    ("name", "tame"),
    [
        ("", "vm-9f3a2b1c"),
        ("   ", "vm-9f3a2b1c"),
        ("-o", "o-9f3a2b1c"),
        ("--", "vm-9f3a2b1c"),
        ("..", "vm-9f3a2b1c"),
        ("a/b", "a_b-9f3a2b1c"),
        ("../../etc/passwd", "_.._etc_passwd-9f3a2b1c"),
        ("$(reboot)", "_(reboot)-9f3a2b1c"),
        ("a'b", "a_b-9f3a2b1c"),
        ("two\nlines", "two_lines-9f3a2b1c"),
        ("7", "7-9f3a2b1c"),
        (" padded ", "padded-9f3a2b1c"),
        ("\x00\x1b[2J", "__[2J-9f3a2b1c"),
        ("x" * 300, "x" * 191 + "-9f3a2b1c"),
    ],
)
def test_others_are_tamed_and_marked_with_the_uuid(name: str, tame: str) -> None:
    assert legal_name(name, UUID) == tame


def test_two_names_that_are_tamed_alike_stay_apart() -> None:
    assert legal_name("a/b", UUID) != legal_name("a\\b", OTHER)


@given(any_text)
@example("é" * 300)
@example("\ud800")
def test_what_comes_out_is_always_legal(name: str) -> None:
    tame = legal_name(name, UUID)
    assert tame.strip() == tame != ""
    assert len(tame.encode()) <= NAME_BYTES
    assert tame[0] not in "-."
    assert not set(tame) & set("/\n\x00'\"$`\\;&|<>*?!%~#{}")
    assert xml_text(tame) == tame
    assert not tame.isdigit()


@given(any_text)
def test_taming_twice_changes_nothing_more(name: str) -> None:
    once = legal_name(name, UUID)
    assert legal_name(once, UUID) == once


@given(any_text)
@example("\r\n\ud800\x00\ufffe")
def test_a_packed_name_comes_back_exactly_through_xml(name: str) -> None:
    element = ET.Element("e", name=pack(name))
    assert unpack(ET.fromstring(ET.tostring(element, encoding="unicode")).get("name", "")) == name


@given(any_text)
def test_xml_text_comes_back_exactly_through_xml(text: str) -> None:
    element = ET.Element("e")
    element.text = xml_text(text)
    assert (ET.fromstring(ET.tostring(element, encoding="unicode")).text or "") == xml_text(text)


@given(any_text)
def test_one_line_is_one_line(text: str) -> None:
    assert len(one_line(text).splitlines()) <= 1


def test_what_was_not_packed_is_refused() -> None:
    with pytest.raises(ValueError, match="packed"):
        unpack("3")
