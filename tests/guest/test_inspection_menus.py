"""Boot menus as real distributions write them, and what a guest could write to hurt us."""

from __future__ import annotations

import time

import pytest
from tests.guest.disk_trees import DEBIAN_GRUB, UUID

from tokvm.guest.inspection import menus
from tokvm.guest.inspection.boot_entry import OPTIONS_LIMIT, BootEntry, version_key, words_of
from tokvm.guest.inspection.grub_cfg import parse_grub_cfg, parse_grubenv

UBUNTU = r"""
if [ "${next_entry}" ] ; then
   set default="${next_entry}"
else
   set default="0"
fi
if [ x"${feature_menuentry_id}" = xy ]; then
  menuentry_id_option="--id"
else
  menuentry_id_option=""
fi
export linux_gfx_mode
menuentry 'Ubuntu' --class ubuntu --class gnu-linux --class gnu --class os $menuentry_id_option 'gnulinux-simple-0f' {
	recordfail
	load_video
	gfxmode $linux_gfx_mode
	insmod gzio
	if [ x$grub_platform = xxen ]; then insmod xzio; insmod lzopio; fi
	search --no-floppy --fs-uuid --set=root 0f
	linux	/vmlinuz-6.8.0-45-generic root=/dev/mapper/ubuntu--vg-ubuntu--lv ro  quiet splash $vt_handoff
	initrd	/initrd.img-6.8.0-45-generic
}
"""
RHEL8 = """
set pager=1
if [ -f ${config_directory}/grubenv ]; then
  load_env -f ${config_directory}/grubenv
fi
if [ "${next_entry}" ] ; then
   set default="${next_entry}"
   set next_entry=
   save_env next_entry
   set boot_once=true
else
   set default="${saved_entry}"
fi
if [ -z "${kernelopts}" ]; then
  set kernelopts="root=/dev/mapper/rhel-root ro crashkernel=auto "
fi
insmod blscfg
blscfg
"""
SUSE = """
if [ "${next_entry}" ] ; then
   set default="${next_entry}"
else
   set default="${saved_entry}"
fi
menuentry 'SLES 15-SP5'  --class sles --class gnu-linux $menuentry_id_option 'gnulinux-simple-ab' {
	linux	/boot/vmlinuz-5.14.21-150500.53-default root=UUID=ab  ${extra_cmdline} splash=silent quiet mitigations=auto
	initrd	/boot/initrd-5.14.21-150500.53-default
}
submenu 'Advanced options for SLES 15-SP5' --hotkey=1 $menuentry_id_option 'gnulinux-advanced-ab' {
	menuentry 'SLES 15-SP5, with Linux 5.14.21' --hotkey=2 $menuentry_id_option 'gnulinux-5.14.21-advanced-ab' {
		linux	/boot/vmlinuz-5.14.21-150500.53-default root=UUID=ab single
		initrd	/boot/initrd-5.14.21-150500.53-default
	}
}
"""
BLS_A = """\
title RHEL (4.18.0-553.el8)
version 4.18.0-553.el8
linux /vmlinuz-4.18.0-553
initrd /initramfs-4.18.0-553.img $tuned_initrd
options $kernelopts $tuned_params
"""
BLS_B = BLS_A.replace("553", "1000")


def _default(text: str, **environment: str) -> BootEntry:
    entry = parse_grub_cfg(text, environment).default_entry()
    assert entry is not None
    return entry


def test_debian_starts_an_entry_of_a_submenu_by_its_ids() -> None:
    entry = _default(DEBIAN_GRUB)
    assert entry.kernel == "/boot/vmlinuz-6.1.0-18-amd64"
    assert entry.options == f"root=UUID={UUID} ro console=ttyS0"
    assert entry.initrds == ("/boot/initrd.img-6.1.0-18-amd64",)


def test_ubuntu_starts_its_first_entry_and_unknown_variables_vanish() -> None:
    entry = _default(UBUNTU)
    assert (entry.title, entry.ident) == ("Ubuntu", "gnulinux-simple-0f")
    assert entry.options == "root=/dev/mapper/ubuntu--vg-ubuntu--lv ro quiet splash"


@pytest.mark.parametrize(
    ("saved", "options"),
    [
        ("gnulinux-simple-ab", "root=UUID=ab splash=silent quiet mitigations=auto"),
        ("Advanced options for SLES 15-SP5>0", "root=UUID=ab single"),
        ("1>0", "root=UUID=ab single"),
        ("1", "root=UUID=ab single"),
        ("gone", "root=UUID=ab splash=silent quiet mitigations=auto"),
        ("7>3", "root=UUID=ab splash=silent quiet mitigations=auto"),
        ("²", "root=UUID=ab splash=silent quiet mitigations=auto"),
    ],
)
def test_suse_starts_what_was_saved_else_the_first(saved: str, options: str) -> None:
    assert _default(SUSE, saved_entry=saved).options == options


def test_rhel_8_takes_its_options_from_grubenv_and_else_from_grub_cfg() -> None:
    menu = parse_grub_cfg(RHEL8, parse_grubenv("# GRUB Environment Block\nsaved_entry=m-4.18.0-553\n####"))
    assert menu.uses_bls
    entries = menus.bls_entries({"m-4.18.0-553.conf": BLS_A, "m-4.18.0-1000.conf": BLS_B}, menu.variables)
    assert [one.kernel for one in entries] == ["/vmlinuz-4.18.0-1000", "/vmlinuz-4.18.0-553"]
    chosen = menus.grub_bls_default(entries, menu.default)
    assert chosen is not None
    assert (chosen.ident, chosen.initrds) == ("m-4.18.0-553", ("/initramfs-4.18.0-553.img",))
    assert chosen.options == "root=/dev/mapper/rhel-root ro crashkernel=auto"
    other = parse_grub_cfg(RHEL8, {"kernelopts": "root=LABEL=r"})
    assert menus.bls_entries({"a.conf": BLS_A}, other.variables)[0].options == "root=LABEL=r"


def test_a_saved_number_counts_bls_entries_newest_first() -> None:
    entries = menus.bls_entries({"m-4.18.0-553.conf": BLS_A, "m-4.18.0-1000.conf": BLS_B}, {})
    for wanted, ident in [("1", "m-4.18.0-553"), ("", "m-4.18.0-1000"), ("9", "m-4.18.0-1000")]:
        chosen = menus.grub_bls_default(entries, wanted)
        assert chosen is not None
        assert chosen.ident == ident
    assert menus.grub_bls_default([], "0") is None


def test_systemd_boots_default_is_a_glob() -> None:
    entries = menus.bls_entries({"arch-6.10.conf": BLS_A, "arch-6.9.conf": BLS_B}, {})

    for conf, ident in [
        ("timeout 3\ndefault arch-6.9*\n", "arch-6.9"),
        ("default arch-6.9.conf", "arch-6.9"),
        ("", "arch-6.10"),
    ]:
        chosen = menus.systemd_boot_default(entries, conf)
        assert chosen is not None
        assert chosen.ident == ident


def test_grub_legacy_counts_titles() -> None:
    text = """
#boot=/dev/sda
default=1
title CentOS (2.6.32-754.el6.x86_64)
\troot (hd0,0)
\tkernel /vmlinuz-2.6.32-754.el6.x86_64 ro root=/dev/mapper/vg-root rhgb quiet
\tinitrd /initramfs-2.6.32-754.el6.x86_64.img
title CentOS (2.6.32-696.el6.x86_64)
\troot (hd0,0)
\tkernel /vmlinuz-2.6.32-696.el6.x86_64 ro root=/dev/mapper/vg-root
\tinitrd /initramfs-2.6.32-696.el6.x86_64.img
"""
    entry = menus.legacy_grub_default(text)
    assert entry == BootEntry(
        "CentOS (2.6.32-696.el6.x86_64)",
        "",
        "/vmlinuz-2.6.32-696.el6.x86_64",
        ("/initramfs-2.6.32-696.el6.x86_64.img",),
        "ro root=/dev/mapper/vg-root",
    )
    assert menus.legacy_grub_default("default=9\n") is None


def test_extlinux_takes_its_default_label() -> None:
    text = """DEFAULT lts
LABEL lts
  MENU LABEL Linux lts
  LINUX vmlinuz-lts
  INITRD initramfs-lts
  APPEND root=UUID=aa modules=sd-mod,ext4 quiet
LABEL other
  KERNEL /k
  APPEND initrd=/i root=/dev/sda1
"""
    entry = menus.extlinux_default(text)
    assert entry is not None
    assert (entry.kernel, entry.initrds, entry.options) == (
        "vmlinuz-lts",
        ("initramfs-lts",),
        "root=UUID=aa modules=sd-mod,ext4 quiet",
    )
    other = menus.extlinux_default(text.replace("DEFAULT lts", "DEFAULT other"))
    assert other is not None
    assert (other.kernel, other.initrds, other.options) == ("/k", ("/i",), "root=/dev/sda1")


def test_versions_sort_as_numbers() -> None:
    versions = ["5.14.0-70.el9", "5.14.0-362.el9", "6.1.0-9-amd64", "6.1.0-18-amd64"]
    assert sorted(versions, key=version_key) == versions
    assert version_key("9" * 5000)  # no integer of 5000 digits


def test_words_read_as_in_a_shell_even_when_quotes_do_not_match() -> None:
    assert words_of("linux /k 'a b' \"c\"") == ["linux", "/k", "a b", "c"]
    assert words_of("linux /k it's") == ["linux", "/k", "it's"]


def test_variables_do_not_make_gigabytes_of_options() -> None:
    text = "linux /k\n" + ("options " + "$a " * 2700 + "\n") * 199
    began = time.process_time()
    assert len(menus.parse_bls("a.conf", text, {"a": "x" * 5000}).options) == OPTIONS_LIMIT
    assert time.process_time() - began < 1


@pytest.mark.parametrize(
    "text",
    [
        "submenu 'x' {\n" * 50_000,
        "menuentry 'x' {\nlinux /k a\n}\n" * 20_000,
        "submenu 'a' {\n}\n" * 20_000 + "menuentry 'x' {\nlinux /k a\n}\n",
        "}\n" * 60_000,
        'set default="' + ">".join("0" * 50_000) + '"\nmenuentry x {\nlinux /k a\n}',
        "".join(f'set v{n}="{"x" * 4000}"\n' for n in range(900)) + "menuentry x {\nlinux /k " + "$v1 " * 2000 + "\n}",
        "menuentry '" + "\\" * 900_000 + "' {\nlinux /k a",
        "\n" * 1_000_000,
    ],
)
@pytest.mark.slow
def test_no_menu_takes_long_or_grows(text: str) -> None:
    began = time.process_time()
    entry = parse_grub_cfg(text, {}).default_entry()
    assert entry is None or len(entry.options) <= OPTIONS_LIMIT
    menus.legacy_grub_default(text)
    menus.extlinux_default(text)
    assert time.process_time() - began < 3
