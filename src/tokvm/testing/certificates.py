"""A CA of one's own and server certificates by it, made with the openssl program.

    folder/  ca.pem ca.key   NAME.pem NAME.key

They satisfy strict verification (basicConstraints, keyUsage, key identifiers; RFC 5280), which Python asks for since 3.13.
"""

from __future__ import annotations

import hashlib
import shutil
import ssl
import subprocess
from collections.abc import Sequence
from pathlib import Path

DAYS = 3650


class Authority:
    """Makes its CA when there is none in `folder` yet."""

    def __init__(self, folder: Path, name: str = "tokvm test CA") -> None:
        self.folder = folder
        self.certificate = folder / "ca.pem"
        self._key = folder / "ca.key"
        if not self.certificate.exists():
            folder.mkdir(parents=True, exist_ok=True)
            extensions = ["basicConstraints=critical,CA:TRUE", "keyUsage=critical,keyCertSign,cRLSign"]
            _make(self.certificate, self._key, name, extensions, ())

    def server(self, name: str, *, hosts: Sequence[str] = ("IP:127.0.0.1", "DNS:localhost"), anew: bool = False) -> Path:
        """folder/NAME.pem, for `hosts`; its key beside it. anew: even if there is one."""
        certificate = self.folder / f"{name}.pem"
        if anew or not certificate.exists():
            extensions = [
                "basicConstraints=critical,CA:FALSE",
                "keyUsage=critical,digitalSignature",
                "extendedKeyUsage=serverAuth",
                "authorityKeyIdentifier=keyid",
                f"subjectAltName={','.join(hosts)}",
            ]
            signed = ("-CA", str(self.certificate), "-CAkey", str(self._key))
            _make(certificate, certificate.with_suffix(".key"), name, extensions, signed)
        return certificate


def server_context(certificate: Path) -> ssl.SSLContext:
    """For a server that shows this certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, certificate.with_suffix(".key"))
    return context


def fingerprint(certificate: Path, algorithm: str = "sha256") -> str:
    """`AB:CD:…` of the certificate in a PEM file. vSphere says SHA-1 of its hosts'."""
    der = ssl.PEM_cert_to_DER_cert(certificate.read_text(encoding="ascii"))
    digest = hashlib.new(algorithm, der, usedforsecurity=False).hexdigest().upper()
    return ":".join(digest[at : at + 2] for at in range(0, len(digest), 2))


def _make(certificate: Path, key: Path, name: str, extensions: Sequence[str], signed: Sequence[str]) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        raise RuntimeError("openssl is not there; install the package openssl")
    argv = [openssl, "req", "-x509", "-nodes", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-sha256"]
    argv += ["-days", str(DAYS), "-subj", f"/O=tokvm/CN={name}", "-keyout", str(key), "-out", str(certificate)]
    # The defaults of the host's openssl.cnf would make every certificate a CA's.
    config = "[req]\ndistinguished_name=none\n[none]\n"
    argv += ["-config", "/dev/stdin", *signed]
    argv += [word for one in (*extensions, "subjectKeyIdentifier=hash") for word in ("-addext", one)]
    done = subprocess.run(argv, input=config.encode(), capture_output=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"openssl made no certificate: {done.stderr.decode(errors='replace')[-500:]}")
    key.chmod(0o600)
