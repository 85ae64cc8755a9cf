"""UEFI variables, with virt-firmware's virt-fw-vars as a second opinion."""

from __future__ import annotations

import json
import re
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokvm.core.errors import DomainError
from tokvm.core.machine import Firmware
from tokvm.domain.base import Accel, DomainPlan
from tokvm.domain.host import LibvirtHost
from tokvm.domain.nvram import DESCRIPTORS, VariableStore, find_template, load_option, write_variables
from tokvm.remote.process import run

VIRT_FW_VARS = Path(sys.executable).with_name("virt-fw-vars")
SHIM = "\\EFI\\debian\\shimx64.efi"
needs_ovmf = pytest.mark.skipif(not DESCRIPTORS[0].is_dir(), reason="OVMF is not installed")
needs_oracle = pytest.mark.skipif(not VIRT_FW_VARS.exists(), reason="virt-firmware is not installed")


def template(*, secure_boot: bool) -> Path:
    return find_template(machine="q35", secure_boot=secure_boot)


def others_view(path: Path) -> str:
    done = run([str(VIRT_FW_VARS), "-i", str(path), "--print", "-v"], timeout_s=60, where="virt-fw-vars")
    assert done.code == 0, done.stderr
    return done.stdout.decode()


@needs_ovmf
@needs_oracle
@pytest.mark.parametrize("secure_boot", [False, True])
@pytest.mark.slow
def test_the_entry_is_what_virt_firmware_reads(tmp_path: Path, secure_boot: bool) -> None:
    path = tmp_path / "vars.fd"
    write_variables(path, template(secure_boot=secure_boot), loader=SHIM, description="web")
    seen = others_view(path)
    number = re.search(r"boot order: (\w{4})", seen)
    assert number is not None
    assert f"name=Boot{number[1]} guid=guid:EfiGlobalVariable" in seen
    assert f'title="web" devpath=FilePath({SHIM})' in seen
    assert ("name=PK " in seen) is secure_boot
    assert path.stat().st_mode & 0o777 == 0o600


@needs_ovmf
@needs_oracle
def test_a_second_entry_goes_before_the_first(tmp_path: Path) -> None:
    path = tmp_path / "vars.fd"
    write_variables(path, template(secure_boot=False), loader=SHIM)
    write_variables(path, path, loader="\\EFI\\BOOT\\BOOTX64.EFI", description="other")
    assert "boot order: 0001, 0000" in others_view(path)
    store = VariableStore.parse(path.read_bytes(), where="x")
    assert [one.name for one in store.variables].count("BootOrder") == 2
    order = store.find("BootOrder")
    assert order is not None
    assert order.data == b"\1\0\0\0"


@needs_ovmf
@needs_oracle
@pytest.mark.slow
def test_it_is_byte_for_byte_what_virt_firmware_writes(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.fd", tmp_path / "theirs.fd"
    base = template(secure_boot=False)
    argv = [str(VIRT_FW_VARS), "-i", str(base), "-o", str(theirs), "--append-boot-filepath", SHIM]
    assert run(argv, timeout_s=60, where="virt-fw-vars").code == 0
    expected = VariableStore.parse(theirs.read_bytes(), where="theirs").find("Boot0000")
    assert expected is not None
    write_variables(ours, base, loader=SHIM, description=expected.data[6:].decode("utf-16-le", "replace").partition("\0")[0])
    found = VariableStore.parse(ours.read_bytes(), where="ours").find("Boot0000")
    assert found is not None
    assert found.data == expected.data


@needs_ovmf
def test_without_a_loader_it_is_the_template(tmp_path: Path) -> None:
    write_variables(tmp_path / "vars.fd", template(secure_boot=True))
    assert (tmp_path / "vars.fd").read_bytes() == template(secure_boot=True).read_bytes()


@needs_ovmf
@given(st.data())
def test_a_damaged_file_is_refused_or_read(data: st.DataObject) -> None:
    content = bytearray(template(secure_boot=True).read_bytes()[:0x6000].ljust(0x84000, b"\xff"))
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, 0x200))] = data.draw(st.integers(0, 255))
    with suppress(DomainError):
        VariableStore.parse(bytes(content), where="x").with_boot_entry(SHIM, "web")


@needs_ovmf
@pytest.mark.parametrize("damage", [0x10, 0x28, 0x48, 0x5C, 0x5D])
def test_another_format_is_no_store(damage: int) -> None:
    content = bytearray(template(secure_boot=False).read_bytes())
    content[damage] ^= 0x55
    with pytest.raises(DomainError, match="no file of UEFI variables"):
        VariableStore.parse(bytes(content), where="x")


@needs_ovmf
def test_a_full_store_takes_no_more(tmp_path: Path) -> None:
    content = template(secure_boot=False).read_bytes()
    store = VariableStore.parse(content, where="x")
    full = VariableStore(content, (), store.end - 100, store.end)
    with pytest.raises(DomainError, match="no room"):
        full.with_boot_entry(SHIM, "web")


def test_nothing_and_too_much_are_no_stores(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(DomainError, match="no file of UEFI"):
        write_variables(tmp_path / "out", tmp_path / "empty", loader=SHIM)
    with (tmp_path / "big").open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(DomainError, match="more than"):
        write_variables(tmp_path / "out", tmp_path / "big")
    with pytest.raises(DomainError, match="cannot be read"):
        write_variables(tmp_path / "out", tmp_path / "none")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("loader", ["", "EFI\\x.efi", "/EFI/x.efi", "\\EFI/x.efi", "\\a\0b", "\\" + "x" * 300])
def test_what_is_no_loader(loader: str) -> None:
    with pytest.raises(DomainError, match="boot loader"):
        load_option(loader, "web")


def descriptor(folder: Path, name: str, *features: str, machine: str = "pc-q35-*", form: str = "raw") -> None:
    described = {
        "interface-types": ["uefi"],
        "mapping": {"device": "flash", "nvram-template": {"filename": f"/fw/{name}", "format": form}},
        "targets": [{"architecture": "x86_64", "machines": [machine]}],
        "features": list(features),
    }
    (folder / f"{name}.json").write_text(json.dumps(described))


def test_the_first_template_that_fits(tmp_path: Path) -> None:
    vendor, local = tmp_path / "vendor", tmp_path / "local"
    vendor.mkdir()
    local.mkdir()
    descriptor(vendor, "40", "secure-boot", "enrolled-keys")
    descriptor(vendor, "50", "secure-boot")
    descriptor(vendor, "60")
    descriptor(vendor, "70", machine="pc-i440fx-*")
    descriptor(vendor, "45", form="qcow2")
    found: Callable[..., Path] = find_template
    folders = (vendor, local)
    assert found(machine="q35", secure_boot=True, folders=folders) == Path("/fw/40")
    assert found(machine="q35", secure_boot=False, folders=folders) == Path("/fw/60")
    assert found(machine="pc", secure_boot=False, folders=folders) == Path("/fw/70")
    (local / "60.json").write_text("")
    with pytest.raises(DomainError, match="no UEFI without secure boot"):
        found(machine="q35", secure_boot=False, folders=folders)


@needs_ovmf
@pytest.mark.root
@pytest.mark.parametrize("secure_boot", [False, True])
@pytest.mark.slow
def test_libvirt_takes_the_same_template(libvirtd: Any, new_plan: Callable[..., DomainPlan], secure_boot: bool) -> None:
    import libvirt

    plan = new_plan(firmware=Firmware.UEFI, secure_boot=secure_boot)
    target, connection = LibvirtHost(libvirtd.uri, accel=Accel.TCG), libvirt.open(libvirtd.uri)
    target.define(plan)
    domain = connection.lookupByUUIDString(plan.vm.uuid)
    domain.createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED)
    nvram = ET.fromstring(domain.XMLDesc(0)).find("os/nvram")
    assert nvram is not None
    assert nvram.get("template") == str(template(secure_boot=secure_boot))
    target.stop(plan.vm.uuid)
    target.close()
    connection.close()
