"""What a guest says is bounded and of a known shape, or it is refused; and what follows from it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tokvm.core.units import KiB, MiB
from tokvm.guest.base import GuestError
from tokvm.guest.prestage.checks import refuse_undone, refuse_unfit
from tokvm.guest.prestage.report import DRIVERS, LONGEST_LINE, MOST, Held, Kernel, Reader, Report, Seen

FACTS = "system Linux\nhost web1\nrunning 6.1\ndistribution debian 12\nmac 02:16:3E:00:00:01\n"
KERNEL = "kernel 6.1 /boot/initrd.img-6.1 30000000 90000 listed\n"
WITHOUT = "".join(f"module 6.1 {name} loadable\n" for name in DRIVERS)
WITH = WITHOUT.replace("loadable", "inside")
LOOK = f"tokvm-prestage 1\n{FACTS}generator dracut\n{KERNEL}{WITHOUT}end\n"
MANY = "".join((KERNEL + WITHOUT).replace("6.1", f"6.{number}") for number in range(2, 80))
DONE = LOOK.replace("end\n", f"config /etc/x.conf written\nsaid \x1b[2J done\r\nrebuilt 0\n{KERNEL}{WITH}end\n")


def read(text: str, *, said: list[str] | None = None) -> Report:
    reader = Reader("guest", (said if said is not None else []).append)
    reader.feed(text.encode())
    return reader.report()


def test_a_report_is_the_same_however_it_comes_in_pieces() -> None:
    text = f"Welcome!\nsystem x\n{DONE}trailing\n".encode()
    for size in (1, 7, 4096):
        said: list[str] = []
        reader = Reader("guest", said.append)
        whole = [reader.feed(text[at : at + size]) for at in range(0, len(text), size)]
        assert whole[-1]
        assert reader.report() == read(DONE)
        assert said == ["\\x1b[2J done"], "a guest's escapes are shown, not obeyed"
    found = read(DONE)
    assert (found.host, found.running, found.distribution) == ("web1", "6.1", "debian 12")
    assert found.macs == {"02:16:3e:00:00:01"}
    (kernel,) = found.before
    assert (kernel.size, kernel.free, kernel.lacks) == (30_000_000, 90_000 * KiB, DRIVERS)
    assert (found.after[0].ready, found.rebuilt, found.config) == (True, 0, (("/etc/x.conf", "written"),))


def test_what_is_unknown_is_a_dash() -> None:
    assert read(LOOK.replace("host web1", "host -").replace("debian 12", "arch -")).distribution == "arch"


@pytest.mark.parametrize(
    "text",
    [
        LOOK.replace("end\n", ""),
        LOOK.replace("host web1", "host $(reboot)"),
        LOOK.replace("host web1", "host web1\nhost web2"),
        LOOK.replace("host web1\n", ""),
        LOOK.replace("running 6.1", "running 6.1 "),
        LOOK.replace("generator dracut", "generator emacs"),
        LOOK.replace("/boot/initrd.img-6.1", "../initrd"),
        LOOK.replace("30000000", "-1"),
        LOOK.replace("30000000", "9" * 30),
        LOOK.replace("module 6.1 virtio_blk loadable\n", ""),
        LOOK.replace("virtio_blk loadable", "virtio_blk absent"),
        LOOK.replace("module 6.1", "module 6.2"),
        LOOK.replace("end\n", "rm -rf /\nend\n"),
        LOOK.replace("end\n", f"said {'x' * LONGEST_LINE}\nend\n"),
        LOOK.replace("end\n", "mac 1\n" * 5000 + "end\n"),
        LOOK.replace("end\n", MANY + "end\n"),
        LOOK.replace("web1", "wéb1"),
    ],
)
def test_whatever_else_is_refused(text: str) -> None:
    with pytest.raises(GuestError, match="cannot be understood"):
        read(text)


def test_a_guest_that_never_stops_talking_is_left() -> None:
    reader = Reader("guest", lambda line: None)
    for _ in range(MOST // MiB):
        assert not reader.feed(b"said yes\n" * (MiB // 9))
    with pytest.raises(GuestError, match="more than 4 MiB"):
        reader.feed(b"said yes\n" * 99)
    endless = Reader("guest", lambda line: None)
    with pytest.raises(GuestError, match="a line has more"):
        endless.feed(b"x" * (LONGEST_LINE + 1))


def kernel(version: str = "6.1", **more: object) -> Kernel:
    drivers = dict.fromkeys(DRIVERS, Held.LOADABLE)
    plain = Kernel(version, f"/boot/initrd-{version}", 30 * MiB, 90 * MiB, Seen.LISTED, drivers)
    return replace(plain, **more)  # type: ignore[arg-type]


def look(*kernels: Kernel, **more: object) -> Report:
    return replace(read(LOOK), before=kernels, **more)  # type: ignore[arg-type]


NO_VIRTIO = kernel(drivers=dict.fromkeys(DRIVERS, Held.NONE))


@pytest.mark.parametrize(
    ("found", "why", "fix"),
    [
        (look(kernel(), refused="no-root"), "not root", "sudo"),
        (look(kernel(), refused="no-linux", system="MINGW64_NT"), "no Linux", "pnputil"),
        (look(kernel(), refused="no-linux", system="FreeBSD"), "no Linux", "--way"),
        (look(kernel(), generator="none"), "none of initramfs-tools", "--way"),
        (look(), "no kernel with an initramfs", "--way"),
        (look(unified=("/efi/EFI/Linux/a.efi",)), "unified images", "--way"),
        (look(kernel(seen=Seen.SIGNED)), "is signed", "--way"),
        (look(NO_VIRTIO), "no virtio drivers", "install a kernel"),
        (look(NO_VIRTIO, kernel("6.2")), "no virtio drivers", "install a kernel"),
        (look(kernel(free=30 * MiB)), "free in /boot", "old kernels"),
        (look(kernel(), kernel("6.2", size=89 * MiB)), "free in /boot", "old kernels"),
    ],
)
def test_a_guest_that_cannot_or_must_not_be_prepared_is_refused(found: Report, why: str, fix: str) -> None:
    with pytest.raises(GuestError, match=why) as refused:
        refuse_unfit(found, where="ssh://guest")
    assert fix in refused.value.fix


def test_a_guest_that_needs_nothing_needs_no_room() -> None:
    refuse_unfit(look(kernel(free=0, drivers=dict.fromkeys(DRIVERS, Held.BUILTIN))), where="")
    refuse_unfit(look(kernel(), kernel("5.0", drivers=dict.fromkeys(DRIVERS, Held.NONE))), where="")
    refuse_unfit(look(kernel(free=31 * MiB)), where="")


GOOD = replace(read(DONE), said=("all well",))


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (replace(GOOD, refused="unwritable"), "could not be written; it is as it was"),
        (replace(GOOD, rebuilt=None), "was not rebuilt"),
        (replace(GOOD, rebuilt=1, said=("No space left",)), "exit code 1: No space left; its configuration is as it was"),
        (replace(GOOD, rebuilt=1, config=(("/etc/x", "stuck"),)), "/etc/x could NOT be put back"),
        (replace(GOOD, rebuilt=1, after=(kernel(seen=Seen.UNREADABLE),)), "6.1 CANNOT BE READ"),
        (replace(GOOD, after=(kernel(),)), "still missing for 6.1"),
        (replace(GOOD, after=()), "still missing for every kernel"),
    ],
)
def test_what_did_not_help_is_an_error_that_says_how_the_guest_is_now(found: Report, why: str) -> None:
    with pytest.raises(GuestError, match=why):
        refuse_undone(found, where="ssh://guest")


def test_what_helped_is_none() -> None:
    refuse_undone(GOOD, where="ssh://guest")
