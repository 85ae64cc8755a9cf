"""Windows paths as SMB shares and paths, and those that no login must follow."""

from __future__ import annotations

import pytest

from tokvm.core.errors import SourceError
from tokvm.sources.hyperv.smb_paths import Place, place, problem


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("C:\\a b\\x.avhdx", Place("", "C$", "a b\\x.avhdx")),
        ("d:/VMs\\ü [1] 'x’ $(y).vhdx", Place("", "D$", "VMs\\ü [1] 'x’ $(y).vhdx")),
        ("\\\\?\\C:\\x.vhdx", Place("", "C$", "x.vhdx")),
        ("\\\\NAS\\vms$\\a\\x.vhdx", Place("nas", "vms$", "a\\x.vhdx")),
        ("//nas/vms$/a/x.vhdx", Place("nas", "vms$", "a\\x.vhdx")),
        ("\\\\?\\unc\\nas\\vms$\\a\\x.vhdx", Place("nas", "vms$", "a\\x.vhdx")),
    ],
)
def test_a_path_over_smb(path: str, expected: Place) -> None:
    assert place(path, drive="\\\\nas\\vms$\\a\\y.avhdx", where="hv1") == expected
    assert problem(path) == ""


@pytest.mark.parametrize(
    "path",
    [
        "",
        "x.vhdx",
        "C:x.vhdx",
        "C:\\",
        "C:\\x.vhdx:stream",
        "C:\\a\\..\\x.vhdx",
        "C:\\a\\.\\x.vhdx",
        "C:\\a\\\\x.vhdx",
        "C:\\x\0.vhdx",
        "C:\\x\n.vhdx",
        "C:\\*.vhdx",
        "\\\\?\\Volume{0b1c}\\x.vhdx",
        "\\\\.\\PhysicalDrive1",
        "\\\\nas\\vms",
        "\\\\nas\\..\\x.vhdx",
        "\\\\nas\\a:b\\x.vhdx",
        "\\\\na s\\vms\\x.vhdx",
        "\\\\-nas\\vms\\x.vhdx",
        "\\\\nas@SSL\\vms\\x.vhdx",
    ],
)
def test_a_path_that_smb_cannot_reach(path: str) -> None:
    assert problem(path)
    with pytest.raises(SourceError):
        place(path, drive=path, where="hv1")
