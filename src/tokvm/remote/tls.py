"""Whom we talk to over TLS: a certificate that a CA vouches for, or one whose fingerprint a person has compared. Never anybody.

    --tls-ca FILE              the CA that signed it; the system's CAs when nothing is said; the name must fit, too
    --tls-fingerprint SHA256   the certificate itself, as `openssl x509 -noout -fingerprint -sha256` shows it

A pin is proved inside the handshake of every socket that the context makes, whatever library makes it: before that, not a byte
of a request (nor a password) is sent. With pins neither name nor CA are asked: who holds the key of that certificate is meant.
"""

from __future__ import annotations

import hashlib
import re
import socket
import ssl
from dataclasses import dataclass
from typing import Any, ClassVar

from tokvm.core.errors import HostKeyError, UsageError

_SHA1, _SHA256 = 40, 64
_PROBE_S = 10.0


class CertificateRefused(HostKeyError):
    """The peer's certificate is not the one that was pinned, or nobody vouches for it."""

    meaning: ClassVar[str] = "the source's TLS certificate is unknown or has changed; nothing was sent to it"


class PinMismatch(ssl.SSLError):
    """Raised within the handshake; `presented` is the SHA-256 of the certificate that was shown."""

    def __init__(self, presented: str) -> None:
        super().__init__(f"the certificate shown is not the pinned one (SHA-256 {presented})")
        self.presented = presented


@dataclass(frozen=True, slots=True)
class TlsTrust:
    """pins: lower-case hex of SHA-256 (a hypervisor's word for its own hosts may be a SHA-1: `with_pin`)."""

    ca_file: str | None = None
    pins: frozenset[str] = frozenset()

    @classmethod
    def of(cls, *, ca_file: str | None = None, fingerprints: tuple[str, ...] = ()) -> TlsTrust:
        """From what an operator typed. UsageError for a fingerprint that is none, or when both ways are asked for."""
        if ca_file and fingerprints:
            raise UsageError("--tls-ca and --tls-fingerprint were both given", fix="say one of them: a CA, or one certificate")
        return cls(ca_file, frozenset(parse_fingerprint(text) for text in fingerprints))

    def with_pin(self, fingerprint: str) -> TlsTrust:
        """The same, and one certificate more, vouched for by somebody who was proved already. SHA-256 or SHA-1."""
        found = _hex(fingerprint)
        if len(found) not in (_SHA1, _SHA256):
            raise ValueError("it is the length of neither SHA-256 nor SHA-1")
        return TlsTrust(self.ca_file, self.pins | {found})

    def context(self) -> ssl.SSLContext:
        """For client sockets. UsageError when the CA's file cannot be used."""
        try:
            made = ssl.create_default_context(cafile=self.ca_file)
        except (OSError, ssl.SSLError) as exc:
            raise UsageError(
                f"the CA cannot be read: {exc}", where=self.ca_file or "", fix="give a file with PEM certificates"
            ) from exc
        made.minimum_version = ssl.TLSVersion.TLSv1_2
        if self.pins:
            made.check_hostname = False
            made.verify_mode = ssl.CERT_NONE
            made.sslsocket_class = type("PinnedSocket", (_PinnedSocket,), {"pins": self.pins})
        return made


class _PinnedSocket(ssl.SSLSocket):
    """A socket that is of no use unless its peer holds the key of a pinned certificate."""

    pins: ClassVar[frozenset[str]] = frozenset()

    def do_handshake(self, *args: Any, **named: Any) -> None:
        super().do_handshake(*args, **named)
        shown = self.getpeercert(binary_form=True) or b""
        names = {hashlib.sha256(shown).hexdigest(), hashlib.sha1(shown, usedforsecurity=False).hexdigest()}
        if not shown or not names & self.pins:
            raise PinMismatch(hashlib.sha256(shown).hexdigest())


def parse_fingerprint(text: str) -> str:
    """Lower-case hex of a SHA-256 fingerprint, with or without colons and the prefix `SHA256:`; UsageError otherwise."""
    found = _hex(text)
    if len(found) != _SHA256:
        raise UsageError(
            f"{text!r} is no SHA-256 fingerprint of a certificate",
            fix="write its 64 hexadecimal digits, as `openssl x509 -noout -fingerprint -sha256` shows them",
        )
    return found


def _hex(text: str) -> str:
    found = re.sub(r"[:\s]", "", re.sub(r"^\s*SHA-?256[:= ]", "", text, flags=re.IGNORECASE)).lower()
    return found if re.fullmatch(r"[0-9a-f]*", found) else ""


def shown(fingerprint: str) -> str:
    """As openssl shows it: upper case, with colons."""
    return ":".join(fingerprint[at : at + 2] for at in range(0, len(fingerprint), 2)).upper()


def certificate_refused(exc: ssl.SSLError, *, host: str, port: int, where: str) -> CertificateRefused:
    """The error for a handshake that failed over the peer's certificate, with the fingerprint a person can compare."""
    presented = exc.presented if isinstance(exc, PinMismatch) else presented_fingerprint(host, port)
    reason = getattr(exc, "verify_message", "") or str(exc)
    told = f"; it shows SHA-256 {shown(presented)}" if presented else ""
    what = (
        "its TLS certificate is not the pinned one"
        if isinstance(exc, PinMismatch)
        else f"its TLS certificate is not trusted ({reason})"
    )
    return CertificateRefused(
        what + told,
        where=where,
        fix="compare that fingerprint with the host's own (on its console), then give --tls-fingerprint; or its CA by "
        "--tls-ca. In a migration that was begun, `tokvm sync … --tls-fingerprint …` keeps it for cutover, rollback and finish",
    )


def is_certificate_error(exc: BaseException) -> bool:
    return isinstance(exc, PinMismatch | ssl.SSLCertVerificationError)


def presented_fingerprint(host: str, port: int) -> str:
    """SHA-256 of the certificate a server shows, to be shown to a person, never to be trusted; "" when it shows none."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        with (
            socket.create_connection((host, port), timeout=_PROBE_S) as plain,
            context.wrap_socket(plain, server_hostname=host) as wrapped,
        ):
            return hashlib.sha256(wrapped.getpeercert(binary_form=True) or b"").hexdigest()
    except (OSError, ValueError):
        return ""
