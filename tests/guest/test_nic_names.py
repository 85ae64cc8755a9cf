"""Names of cards that a guest's configuration depends on: kept when the card is known for sure, else said."""

from __future__ import annotations

import pytest

from tokvm.core.machine import Nic
from tokvm.guest.base import Judgement, LinuxFacts, Verdict, Way
from tokvm.guest.nic_names import NicNames, names_to_keep
from tokvm.guest.verdict import with_names

A, B = "00:16:3e:00:00:0a", "00:16:3e:00:00:0b"


def keep(*interfaces: str, nics: tuple[Nic, ...], words: str = "", xen: bool = False, slots: bool = True) -> NicNames:
    linux = LinuxFacts(interfaces=interfaces, command_line=words)
    return names_to_keep(linux, nics, slots_kept=slots, in_order=xen)


ONE = (Nic(0, A),)
TWO = (Nic(0, A), Nic(1, B))
GAP = (Nic(1, A), Nic(2, B))


@pytest.mark.parametrize(
    ("found", "by_mac", "unsure"),
    [
        (keep("eth0", nics=ONE), {A: "eth0"}, ()),
        (keep("eth0:1", "eth0.20", "eth0", "bond0", "br-lan", "wg0", nics=ONE), {A: "eth0"}, ()),
        (keep("ens3", nics=ONE), {A: "ens3"}, ()),
        (keep("bond0", nics=ONE), {}, ()),
        (keep(nics=ONE), {}, ()),
        # two cards, and nobody says that this source's order is the kernel's
        (keep("eth0", "eth1", nics=TWO), {}, ("eth0", "eth1")),
        (keep("eth0", "eth1", nics=TWO, xen=True), {A: "eth0", B: "eth1"}, ()),
        (keep("eth1", nics=GAP, xen=True), {B: "eth1"}, ()),
        (keep("enX1", "enX2", nics=GAP), {A: "enX1", B: "enX2"}, ()),
        (keep("enX0", nics=GAP), {}, ("enX0",)),
        # one card, and a configuration that knows more of them
        (keep("eth0", "eth1", nics=ONE), {}, ("eth0", "eth1")),
        (keep("eth0", "eth1", nics=ONE, xen=True), {A: "eth0"}, ("eth1",)),
        # the kernel's own order stays
        (keep("eth0", "eth1", nics=TWO, words="ro net.ifnames=0 quiet"), {}, ()),
        (keep("eth0", nics=ONE, words="ro xnet.ifnames=0"), {A: "eth0"}, ()),
        # the machine gives the slot
        (keep("ens192", nics=(Nic(0, A, slot=192),)), {}, ()),
        (keep("ens192", "ens224", nics=(Nic(0, A, slot=192), Nic(1, B, slot=224))), {}, ()),
        (keep("ens192", nics=(Nic(0, A, slot=192),), slots=False), {A: "ens192"}, ()),
        (keep("eth0", nics=()), {}, ()),
    ],
)
def test_names(found: NicNames, by_mac: dict[str, str], unsure: tuple[str, ...]) -> None:
    assert (found.by_mac, found.unsure) == (by_mac, unsure)


def test_no_card_gets_two_names_and_no_name_two_cards() -> None:
    found = keep("eth0", "enX0", "eth1", "enX1", nics=TWO, xen=True)
    assert len(found.by_mac) == len(set(found.by_mac.values())) == 2


READY = Judgement(Verdict.READY, "virtio is there", (Verdict.READY,), (Way.NONE, Way.KERNEL))


def test_a_guest_that_needs_nothing_else_gets_its_names_by_micro() -> None:
    judged = with_names(READY, NicNames({A: "eth0"}))
    assert judged.ways == (Way.MICRO, Way.NONE, Way.KERNEL)
    assert [finding.what for finding in judged.findings] == [
        "the network is configured for eth0, and KVM's cards have other names"
    ]


def test_names_that_stay_change_nothing() -> None:
    assert with_names(READY, NicNames()) == READY


def test_names_of_unknown_cards_are_said() -> None:
    judged = with_names(READY, NicNames(unsure=("eth0", "eth1")))
    assert judged.ways == READY.ways
    assert "eth0, eth1" in judged.findings[0].what
