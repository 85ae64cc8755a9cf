"""A small tree like virtio-win's, with signed catalogues, for tests."""

from __future__ import annotations

from pathlib import Path

from tests.guest.signing import Signing

from tokvm.testing.pe_writer import program

DRIVERS = {"viostor": "viostor", "vioscsi": "vioscsi", "NetKVM": "netkvm", "Balloon": "balloon", "smbus": "smbus"}


def make_tree(
    folder: Path, signing: Signing, *, versions: tuple[str, ...] = ("2k22", "2k16", "w10", "2k8R2"), arch: str = "amd64"
) -> Path:
    """ISO layout: DRIVER/VERSION/ARCH/stem.{inf,sys,cat}, guest-agent/*.msi."""
    for driver, stem in DRIVERS.items():
        for version in versions:
            place = folder / driver / version / arch
            place.mkdir(parents=True)
            (place / f"{stem}.inf").write_text(f"; {stem} for {version}\r\n")
            (place / f"{stem}.sys").write_bytes(program(native=True, body=f"{stem} {version}".encode()))
            (place / f"{stem}.pdb").write_bytes(b"symbols")
            (place / f"{stem}.cat").write_bytes(signing.catalogue(f"{stem} {version}".encode()))
    agent = folder / "guest-agent"
    agent.mkdir()
    (agent / "qemu-ga-x86_64.msi").write_bytes(b"msi 64")
    (agent / "qemu-ga-i386.msi").write_bytes(b"msi 32")
    return folder
