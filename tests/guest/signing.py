"""Signed files for the tests of certificates: those of the distribution, and our own by openssl and osslsigncode."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tokvm.lab.kernel import cache_dir

PACKAGES = ("shim-signed", "grub-efi-amd64-signed")
"""Both in Debian and in Ubuntu. Downloaded and unpacked, not installed: their scripts would touch the host's boot loader."""

CATALOGUE = "1.3.6.1.4.1.311.10.1"
CONFIG = """
[req]
distinguished_name=none
prompt=no
[none]
[signer]
basicConstraints=critical,CA:FALSE
keyUsage=critical,digitalSignature
extendedKeyUsage=codeSigning
[ca]
basicConstraints=critical,CA:TRUE
keyUsage=critical,keyCertSign,cRLSign
"""


def run(*argv: object, input_bytes: bytes = b"") -> bytes:
    done = subprocess.run([str(one) for one in argv], input=input_bytes, capture_output=True, timeout=120)
    assert done.returncode == 0, (argv, done.stderr[-800:], done.stdout[-300:])
    return done.stdout


def distribution_files() -> list[Path]:
    """Signed EFI programs of PACKAGES, from the lab's cache or the distribution's archive."""
    folder = cache_dir() / "signed"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".signed-", dir=folder.parent) as work:
            new = Path(work) / "tree"
            new.mkdir()
            run("env", "-C", work, "apt-get", "-q", "download", *PACKAGES)
            for package in Path(work).glob("*.deb"):
                run("dpkg-deb", "-x", package, new)
            if not folder.is_dir():
                new.rename(folder)
    found = sorted(folder.rglob("*.efi.signed*"))
    return [file for file in found if file.is_file() and "x64" in file.name]


@dataclass(frozen=True, slots=True)
class Signing:
    """A CA and a signer's certificate (PEM files) with its key."""

    folder: Path
    ca: Path
    certificate: Path
    key: Path

    def sign(self, program: bytes, *options: str, name: str = "signed.exe", algorithm: str = "sha256") -> bytes:
        """The program with an embedded signature. The CA's certificate is in the signature too."""
        unsigned, out = self.folder / f"{name}.unsigned", self.folder / name
        unsigned.write_bytes(program)
        out.unlink(missing_ok=True)
        run(
            *("osslsigncode", "sign", "-certs", self.certificate, "-ac", self.ca, "-key", self.key),
            *("-h", algorithm, *options, "-in", unsigned, "-out", out),
        )
        return out.read_bytes()

    def catalogue(self, content: bytes, *options: str, kind: str = CATALOGUE) -> bytes:
        """`content` as a CMS SignedData in DER, as openssl makes it."""
        file = self.folder / "content"
        file.write_bytes(content)
        return run(
            *("openssl", "cms", "-sign", "-binary", "-nodetach", "-outform", "DER", "-econtent_type", kind),
            *("-signer", self.certificate, "-inkey", self.key, "-certfile", self.ca, "-in", file, *options),
        )

    @property
    def der(self) -> bytes:
        return run("openssl", "x509", "-in", self.certificate, "-outform", "DER")


def new_signing(folder: Path, subject: str = "/O=Red Hat, Inc./CN=Red Hat, Inc.", *, key: str = "rsa:2048") -> Signing:
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "openssl.cnf"
    config.write_text(CONFIG)
    new = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"] if key == "ec" else ["-newkey", key]
    common = ["openssl", "req", "-x509", "-nodes", "-sha256", "-days", "30", "-config", config, *new]
    ca, signer = folder / "ca.pem", folder / "signer.pem"
    run(*common, "-subj", "/CN=Driver test CA", "-extensions", "ca", "-keyout", folder / "ca.key", "-out", ca)
    parents = ("-CA", ca, "-CAkey", folder / "ca.key")
    run(*common, *parents, "-subj", subject, "-extensions", "signer", "-keyout", folder / "signer.key", "-out", signer)
    return Signing(folder, ca, signer, folder / "signer.key")


def openssl_certificates(blob: bytes) -> set[bytes]:
    """The DER of every certificate in a PKCS#7 blob, by openssl."""
    pem = run("openssl", "pkcs7", "-inform", "DER", "-print_certs", input_bytes=blob)
    blocks = re.findall(rb"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", pem, re.DOTALL)
    return {run("openssl", "x509", "-outform", "DER", input_bytes=one) for one in blocks}


def openssl_signer_serials(blob: bytes) -> set[int]:
    """Serial numbers of the SignerInfos, by `openssl pkcs7 -print`."""
    said = run("openssl", "pkcs7", "-inform", "DER", "-print", "-noout", input_bytes=blob).decode(errors="replace")
    infos = said[said.rindex("signer_info:") :]
    return {int(one, 0) for one in re.findall(r"issuer_and_serial:.*?serial: (\w+)", infos, re.DOTALL)}
