"""The script that looks into a guest and prepares it, run by real shells whose root is a guest's tree."""

from __future__ import annotations

import signal
import subprocess
import time

import pytest
from tests.prestage.conftest import MakeGuest
from tests.prestage.guest_tree import PATH, PROGRAMS, VERSION, GuestTree

from tokvm.guest import linux_micro
from tokvm.guest.inspection.kernels import initrd_names
from tokvm.guest.prestage.report import DRIVERS, Held, Reader, Report, Seen
from tokvm.guest.prestage.talk import Task, script

MODULES = "etc/initramfs-tools/modules"
ALL_INSIDE = dict.fromkeys(DRIVERS, Held.INSIDE)
WAIT = "n=0\nuntil [ -e /go ] || [ $n -gt 600 ]; do sleep 0.05; n=$((n + 1)); done\n"


def run(guest: GuestTree, task: Task) -> Report:
    done = guest.run(script(), task)
    assert (done.returncode, done.stderr) == (0, b"")
    reader = Reader("guest", lambda line: None)
    assert reader.feed(done.stdout)
    assert guest.left_over == []
    assert not any("reboot" in call for call in guest.calls)
    return reader.report()


def content(guest: GuestTree) -> dict[str, tuple[bytes, int]]:
    files = [path for path in guest.root.rglob("*") if path.is_file() and not path.is_symlink() and path.parent.name != "dev"]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.mark.parametrize("generator", PROGRAMS)
@pytest.mark.slow
def test_each_generator_is_configured_as_the_micro_morph_does_it_and_run_once(make_guest: MakeGuest, generator: str) -> None:
    guest = make_guest(generator)
    found = run(guest, Task.PREPARE)
    assert (found.generator, found.refused, found.rebuilt, found.distribution) == (generator, "", 0, "debian 12")
    assert [(one.version, one.drivers) for one in found.before] == [(VERSION, dict.fromkeys(DRIVERS, Held.LOADABLE))]
    assert [(one.version, one.drivers) for one in found.after] == [(VERSION, ALL_INSIDE)]
    (path, state), *others = found.config
    assert (state, others, len(guest.calls)) == ("written", [], 1)
    if generator == "initramfs-tools":
        assert path == linux_micro.MODULES_FILE
        lines = "".join(f"{name}\n" for name in DRIVERS)
        assert guest.read(path[1:]) == f"# list of modules\n# added by tokvm: the disks of KVM\n{lines}"
    else:
        assert (path, guest.read(path[1:])) == linux_micro._SNIPPETS[generator]
    assert found.said == (f"Generating /boot/initrd.img-{VERSION}",)


@pytest.mark.parametrize("generator", PROGRAMS)
@pytest.mark.slow
def test_twice_is_the_same_as_once(make_guest: MakeGuest, generator: str) -> None:
    guest = make_guest(generator)
    ((path, _),) = run(guest, Task.PREPARE).config
    once = guest.read(path[1:])
    assert run(guest, Task.PREPARE).config == ((path, "kept"),)
    assert guest.read(path[1:]) == once


def test_a_look_changes_nothing(guest: GuestTree) -> None:
    before = content(guest)
    assert run(guest, Task.LOOK).after == ()
    assert content(guest) == before


@pytest.mark.slow
def test_where_each_driver_is(guest: GuestTree) -> None:
    guest.kernel("6.2", builtin="virtio_pci virtio_blk", has="virtio_scsi")
    guest.write("lib/modules/5.0/modules.dep", "kernel/ext4.ko:\n")
    guest.write("boot/initrd.img-5.0", "bin/sh\nusr/lib/modules/5.0/kernel/virtio-blk.ko\nvirtio_pci.ko.txt\n")
    old, plain, new = run(guest, Task.LOOK).before
    assert old.drivers == {"virtio_pci": Held.NONE, "virtio_blk": Held.INSIDE, "virtio_scsi": Held.NONE}
    assert old.hopeless
    assert new.drivers == {"virtio_pci": Held.BUILTIN, "virtio_blk": Held.BUILTIN, "virtio_scsi": Held.INSIDE}
    assert {one.version: (one.ready, one.lacks) for one in (new, plain)} == {"6.2": (True, ()), VERSION: (False, DRIVERS)}
    assert plain.size == (guest.root / f"boot/initrd.img-{VERSION}").stat().st_size
    assert plain.free > 0


@pytest.mark.parametrize("name", [*(f"boot/{name}" for name in initrd_names("V1")), f"boot/{'a' * 32}/V1/initrd"])
@pytest.mark.slow
def test_an_initramfs_is_found_under_every_name_that_inspection_knows(dash_guest: GuestTree, name: str) -> None:
    dash_guest.kernel("V1", name)
    assert {one.version: one.initrd for one in run(dash_guest, Task.LOOK).before}["V1"] == f"/{name}"


@pytest.mark.slow
def test_arch_names_its_initramfs_after_the_package(guest: GuestTree) -> None:
    guest.kernel("6.9.1-arch1-1", "boot/initramfs-linux.img")
    guest.write("lib/modules/6.9.1-arch1-1/pkgbase", "linux\n")
    assert {one.initrd for one in run(guest, Task.LOOK).before} >= {"/boot/initramfs-linux.img"}


@pytest.mark.slow
def test_what_is_signed_unified_or_broken_is_said(guest: GuestTree) -> None:
    guest.kernel("6.2")
    guest.write("boot/initrd.img-6.2.sig", "x")
    guest.kernel("6.3").write_text("BROKEN\n")
    guest.write("boot/EFI/Linux/arch.efi", "MZ")
    found = run(guest, Task.LOOK)
    assert {one.version: one.seen for one in found.before} == {
        VERSION: Seen.LISTED,
        "6.2": Seen.SIGNED,
        "6.3": Seen.UNREADABLE,
    }
    assert found.unified == ("/boot/EFI/Linux/arch.efi",)


@pytest.mark.parametrize("generator", PROGRAMS)
@pytest.mark.slow
def test_a_rebuild_that_fails_leaves_the_configuration_as_it_was(make_guest: MakeGuest, generator: str) -> None:
    guest = make_guest(generator)
    config = guest.root / "etc"
    if generator == "initramfs-tools":
        (guest.root / MODULES).chmod(0o640)
    before = {str(path): (path.read_bytes(), path.stat()) for path in config.rglob("*") if path.is_file()}
    guest.program(next(iter(PROGRAMS[generator])), "echo 'No space left on device' >&2; exit 3\n")
    found = run(guest, Task.PREPARE)
    assert (found.rebuilt, found.said) == (3, ("No space left on device",))
    assert [state for _, state in found.config] == ["written", "back"]
    after = {str(path): (path.read_bytes(), path.stat()) for path in config.rglob("*") if path.is_file()}
    assert after.keys() == before.keys()
    for path, (text, stat) in after.items():
        old_text, old = before[path]
        assert (text, stat.st_mode, stat.st_mtime_ns, stat.st_ino) == (old_text, old.st_mode, old.st_mtime_ns, old.st_ino)


@pytest.mark.slow
def test_a_rebuild_that_only_says_that_it_went_well_is_not_believed(guest: GuestTree) -> None:
    old = guest.read(MODULES)
    guest.program("update-initramfs", "echo 'WARNING: /boot is ro-mounted; not updating'\n")
    found = run(guest, Task.PREPARE)
    assert (found.rebuilt, found.after[0].lacks) == (0, DRIVERS)
    assert [state for _, state in found.config] == ["written", "back"]
    assert guest.read(MODULES) == old


def test_a_configuration_that_has_the_drivers_in_its_own_way_is_kept(guest: GuestTree) -> None:
    guest.write(MODULES, "virtio_blk\n  virtio_pci  # ours\n# virtio_scsi\nvirtio_scsi_old")
    run(guest, Task.PREPARE)
    assert guest.read(MODULES).splitlines()[3:] == ["virtio_scsi_old", "# added by tokvm: the disks of KVM", "virtio_scsi"]


def test_what_a_run_that_died_left_behind_is_put_back_first(guest: GuestTree) -> None:
    (guest.root / MODULES).rename(guest.root / f"{MODULES}.tokvm-before")
    guest.write(MODULES, "half a file")
    run(guest, Task.PREPARE)
    assert guest.read(MODULES).startswith("# list of modules\n# added")


def test_a_configuration_that_cannot_be_written_is_left(guest: GuestTree) -> None:
    old = guest.read(MODULES)
    (guest.root / f"{MODULES}.tokvm-new").mkdir()
    guest.write(f"{MODULES}.tokvm-new/x/modules", "")  # `cp` and `mv` go into it
    (guest.root / f"{MODULES}.tokvm-new/modules").mkdir()
    done = guest.run(script(), Task.PREPARE)
    assert b"refused unwritable" in done.stdout
    assert (guest.read(MODULES), guest.calls) == (old, [])


def test_a_generator_without_its_folder_is_refused(make_guest: MakeGuest) -> None:
    guest = make_guest("mkinitcpio")
    (guest.root / "etc/mkinitcpio.conf.d").rmdir()
    found = run(guest, Task.PREPARE)
    assert (found.refused, guest.calls) == ("no-folder", [])


def test_names_from_the_guest_are_never_run(dash_guest: GuestTree) -> None:
    for name in ("$(reboot)", "`reboot`", "a b", "x\nrebuilt 0", "-rf", "; reboot"):
        dash_guest.write(f"lib/modules/{name}/modules.dep", "virtio_pci.ko:\n")
        dash_guest.write(f"boot/initrd.img-{name}", "x\n")
    dash_guest.write("etc/os-release", "ID=$(reboot)\nVERSION_ID=`reboot`; reboot\n")
    dash_guest.write(f"lib/modules/{VERSION}/pkgbase", "$(reboot)/../../x\n")
    dash_guest.program("uname", 'case $1 in -s) echo Linux ;; *) echo "\'$(echo \\$)(reboot)"; echo end ;; esac\n')
    dash_guest.card("$(reboot)", "$(reboot)\nend")
    found = run(dash_guest, Task.PREPARE)
    assert (found.host, found.distribution) == ("rebootend", "reboot rebootreboot")
    assert {one.version for one in found.after} == {VERSION, "-rf"}
    assert dash_guest.calls == ["/usr/sbin/update-initramfs -u -k all"]


def test_a_script_that_was_cut_short_does_nothing(dash_guest: GuestTree) -> None:
    whole, before = script(), content(dash_guest)
    for at in [*range(0, len(whole) - 40, len(whole) // 12), *range(len(whole) - 40, len(whole) - 1, 3), len(whole) - 2]:
        assert b"tokvm-prestage" not in dash_guest.run(whole[:at], Task.PREPARE).stdout, at
    assert content(dash_guest) == before


def start(guest: GuestTree) -> subprocess.Popen[bytes]:
    """A rebuild that waits for /go."""
    guest.program("update-initramfs", WAIT + PROGRAMS["initramfs-tools"]["update-initramfs"] + "head -c 200000 /bin/sh\n")
    argv = [*guest.enter, "/bin/env", f"PATH={PATH}", "/bin/sh", "-s", Task.PREPARE]
    with guest.write("script", script().decode()).open("rb") as text:
        child = subprocess.Popen(argv, stdin=text, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 20
    while "virtio_scsi" not in guest.read(MODULES) and time.monotonic() < until:
        time.sleep(0.02)
    time.sleep(0.1)
    return child


@pytest.mark.slow
def test_a_connection_that_breaks_does_not_end_a_rebuild(guest: GuestTree) -> None:
    child = start(guest)
    assert child.stdout is not None
    child.stdout.close()
    child.send_signal(signal.SIGHUP)
    guest.write("go", "")
    child.wait(timeout=30)
    assert guest.calls == ["/usr/sbin/update-initramfs -u -k all"]
    found = run(guest, Task.LOOK)
    assert found.before[0].ready
    assert "virtio_scsi" in guest.read(MODULES)


@pytest.mark.slow
def test_one_run_at_a_time(guest: GuestTree) -> None:
    child = start(guest)
    config = guest.read(MODULES)
    assert b"refused busy" in guest.run(script(), Task.PREPARE).stdout
    assert guest.read(MODULES) == config
    guest.write("go", "")
    child.communicate(timeout=30)
    assert guest.calls == ["/usr/sbin/update-initramfs -u -k all"]
    guest.write("run/tokvm-prestage/pid", "4194304\n")  # of one that died: the kernel gives no such number
    assert run(guest, Task.PREPARE).rebuilt == 0


@pytest.mark.slow
def test_a_script_that_is_told_to_end_puts_the_configuration_back(guest: GuestTree) -> None:
    child = start(guest)
    child.send_signal(signal.SIGTERM)
    guest.write("go", "")
    child.communicate(timeout=30)
    assert child.returncode == 143
    assert guest.read(MODULES) == "# list of modules\n"
    assert guest.left_over == []
