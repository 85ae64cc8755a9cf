"""Who signed a Windows driver: from a signed program (.sys, .exe, .dll, .efi) or a catalogue (.cat), without Windows.

    program: certificate table (pe.py) ─► PKCS#7 blob ┐
    .cat:    the whole file is the blob               ┴► SignedData ─► SignerInfo: issuer + serial ─► the certificate's DER
                                                          nested SignedData (unsigned attribute 1.3.6.1.4.1.311.2.4.1)

Before a signer is believed: the program's digest is the one in its SpcIndirectData, the content's digest is the signed
attribute messageDigest, the signature over the attributes fits the certificate's key, and the certificate fits its issuer's
where that is there. So a swapped body is refused. The chain is not built up to a root and dates are only told: Windows judges
those, and a time stamp keeps an expired signer's signature good.

Spec: Microsoft, "Windows Authenticode Portable Executable Signature Format" (2008); RFC 2315 (PKCS#7), RFC 5652 (CMS).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from asn1crypto import algos, cms, core, parser
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa

from tokvm.core.text import readable
from tokvm.core.units import MiB
from tokvm.guest.base import GuestError
from tokvm.guest.windows import pe

MAX_FILE = 64 * MiB
MAX_SIGNERS = 16
MAX_CERTIFICATES = 64
MAX_NESTING = 4
INDIRECT_DATA = "1.3.6.1.4.1.311.2.1.4"
TRUST_LIST = "1.3.6.1.4.1.311.10.1"
NESTED_SIGNATURE = "1.3.6.1.4.1.311.2.4.1"
MICROSOFT = "Microsoft Corporation"
HASHES: dict[str, Callable[[], hashes.HashAlgorithm]] = {
    "sha1": hashes.SHA1,
    "sha256": hashes.SHA256,
    "sha384": hashes.SHA384,
    "sha512": hashes.SHA512,
}

# What asn1crypto lets out of a damaged structure. All of it means: not what it should be.
_ASN1_FAULTS = (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError)


class _DigestInfo(core.Sequence):  # type: ignore[misc]  # asn1crypto has no types
    _fields = [("digest_algorithm", algos.DigestAlgorithm), ("digest", core.OctetString)]  # noqa: RUF012


class _IndirectData(core.Sequence):  # type: ignore[misc]
    _fields = [("data", core.Any), ("message_digest", _DigestInfo)]  # noqa: RUF012


@dataclass(frozen=True, slots=True)
class Signer:
    """One signer's certificate. Names are printable text of bounded length; not_after is UTC."""

    subject: str
    issuer: str
    serial: int
    not_after: datetime
    der: bytes
    microsoft: bool

    @property
    def sha1(self) -> str:
        """The thumbprint by which Windows names a certificate."""
        return hashlib.sha1(self.der, usedforsecurity=False).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.der).hexdigest()

    @property
    def needs_import(self) -> bool:
        """Whether Windows asks before it installs: not for what Microsoft signed (WHQL, attestation)."""
        return not self.microsoft


def read_signers(path: Path) -> tuple[Signer, ...]:
    """`signers` of a file on this host."""
    with path.open("rb") as file:
        data = file.read(MAX_FILE + 1)
    return signers(data, str(path))


def signers(data: bytes, name: str) -> tuple[Signer, ...]:
    """Every signer of a program or a catalogue, each certificate once, in the file's order.

    `name` is for messages. GuestError: unsigned, damaged, or the signature is not this file's.
    """
    if len(data) > MAX_FILE:
        raise GuestError(f"a signed file of more than {MAX_FILE} bytes", where=name)
    if not data:
        raise GuestError("the file is empty", where=name)
    found: dict[bytes, Signer] = {}
    if pe.is_program(data):
        program = pe.SignedProgram.parse(data, name)
        for offset, blob in program.blobs():
            _collect(blob, _Place(name, offset, program), found)
        if not found:
            raise pe.unsigned(name)
    else:
        _collect(data, _Place(name, 0, None), found)
    return tuple(found.values())


def to_import(found: Iterable[Signer]) -> tuple[Signer, ...]:
    """What the guest's TrustedPublisher store needs, each certificate once."""
    return tuple({one.sha256: one for one in found if one.needs_import}.values())


@dataclass(frozen=True, slots=True)
class _Place:
    name: str
    offset: int
    program: pe.SignedProgram | None

    def wrong(self, what: str) -> GuestError:
        fix = "get the file again; it is damaged, or was changed after it was signed"
        return GuestError(what, where=f"{self.name}@{self.offset:#x}", fix=fix)


def _collect(blob: bytes, place: _Place, found: dict[bytes, Signer], depth: int = 0) -> None:
    if depth > MAX_NESTING:
        raise place.wrong("signatures nested too deep")
    try:
        signed = _signed_data(blob, place)
        content = _checked_content(signed, place)
        certificates = _certificates(signed, place)
        infos = signed["signer_infos"]
        if not 0 < len(infos) <= MAX_SIGNERS or len(found) > MAX_SIGNERS:
            raise place.wrong(f"a signature by {len(infos)} signers")
        for info in infos:
            certificate = _signer_certificate(info, certificates, place)
            _check_signature(info, certificate, content, place)
            _check_issued(certificate, certificates, place)
            der = certificate.dump()
            found.setdefault(der, _signer(certificate, der))
            for nested in _nested(info):
                _collect(nested, place, found, depth + 1)
    except _ASN1_FAULTS as exc:
        raise place.wrong(f"a damaged signature ({readable(str(exc), limit=120)})") from exc


def _signed_data(blob: bytes, place: _Place) -> Any:
    """The SignedData; what follows it may only be the table's padding (CVE-2013-3900)."""
    _, _, _, head, body, tail = parser.parse(blob, strict=False)
    rest = blob[len(head) + len(body) + len(tail) :]
    if len(rest) >= 8 or any(rest):
        raise place.wrong("bytes behind the signature that it does not cover")
    info = cms.ContentInfo.load(head + body + tail, strict=True)
    if info["content_type"].native != "signed_data":
        raise place.wrong("this is neither a Windows program nor a PKCS#7 signature")
    return info["content"]


def _checked_content(signed: Any, place: _Place) -> bytes:
    """The signed content's octets, after the program's digest was compared with the one in it."""
    wrapped = signed["encap_content_info"]
    kind = wrapped["content_type"].dotted
    der = wrapped["content"].dump()
    if not der:
        raise place.wrong("a signature without its content")
    explicit = parser.parse(der, strict=True)
    if explicit[0] == 2:  # [0] EXPLICIT around the content itself
        der = explicit[4]
    content = bytes(parser.parse(der, strict=True)[4])
    if place.program is None:
        if kind != TRUST_LIST:
            raise place.wrong(f"a signature of kind {kind}, not a catalogue's")
        return content
    if kind != INDIRECT_DATA:
        raise place.wrong(f"a signature of kind {kind}, not a program's")
    claim = _IndirectData.load(der, strict=True)["message_digest"]
    algorithm = claim["digest_algorithm"]["algorithm"].native
    if algorithm not in HASHES or place.program.digest(algorithm) != claim["digest"].native:
        raise place.wrong(f"the signature is not of this program: its {algorithm} digest differs")
    return content


def _certificates(signed: Any, place: _Place) -> list[Any]:
    all_of_them = signed["certificates"]
    if not all_of_them.dump() or len(all_of_them) > MAX_CERTIFICATES:
        raise place.wrong("a signature with no certificates, or with too many")
    return [one.chosen for one in all_of_them if one.name == "certificate"]


def _signer_certificate(info: Any, certificates: list[Any], place: _Place) -> Any:
    sid = info["sid"]
    for certificate in certificates:
        if sid.name == "issuer_and_serial_number":
            same = certificate.serial_number == sid.chosen["serial_number"].native
            if same and certificate.issuer.dump() == sid.chosen["issuer"].dump():
                return certificate
        elif certificate.key_identifier is not None and certificate.key_identifier == sid.chosen.native:
            return certificate
    raise place.wrong("the signer's certificate is not in the signature")


def _check_signature(info: Any, certificate: Any, content: bytes, place: _Place) -> None:
    algorithm = info["digest_algorithm"]["algorithm"].native
    if algorithm not in HASHES:
        raise place.wrong(f"a signature by {readable(str(algorithm), limit=40)}, which is not checked here")
    attributes = info["signed_attrs"]
    if not attributes.dump():
        covered = content
    else:
        claimed = [one["values"][0].native for one in attributes if one["type"].native == "message_digest"]
        if claimed != [hashlib.new(algorithm, content, usedforsecurity=False).digest()]:
            raise place.wrong("the signed digest is not that of the content")
        covered = attributes.untag().dump()
    if info["signature_algorithm"]["algorithm"].native == "rsassa_pss":
        raise place.wrong("an RSA-PSS signature, which Windows does not take for drivers")
    _verify(certificate, info["signature"].native, covered, algorithm, place)


def _check_issued(certificate: Any, certificates: list[Any], place: _Place) -> None:
    """That its issuer made the certificate as it stands, where the issuer's is in the signature too (rarely the root's)."""
    wanted = certificate.issuer.dump()
    issuers = [one for one in certificates if one.subject.dump() == wanted and one is not certificate]
    algorithm = certificate["signature_algorithm"].hash_algo
    if issuers and algorithm in HASHES:
        covered = certificate["tbs_certificate"].dump()
        _verify(issuers[0], certificate["signature_value"].native, covered, algorithm, place)


def _verify(certificate: Any, signature: bytes, covered: bytes, algorithm: str, place: _Place) -> None:
    """That the certificate's key made `signature` over `covered`."""
    try:
        key = serialization.load_der_public_key(certificate.public_key.dump())
        if isinstance(key, rsa.RSAPublicKey):
            key.verify(signature, covered, padding.PKCS1v15(), HASHES[algorithm]())
        elif isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(signature, covered, ec.ECDSA(HASHES[algorithm]()))
        else:
            raise place.wrong("a signature by a key that is neither RSA nor ECDSA")
    except (InvalidSignature, UnsupportedAlgorithm, ValueError) as exc:
        raise place.wrong("a signature does not fit the certificate that it is said to be made with") from exc


def _nested(info: Any) -> list[bytes]:
    attributes = info["unsigned_attrs"]
    if not attributes.dump():
        return []
    found = [value.dump() for one in attributes if one["type"].dotted == NESTED_SIGNATURE for value in one["values"]]
    return found[:MAX_SIGNERS]


def _signer(certificate: Any, der: bytes) -> Signer:
    return Signer(
        subject=readable(certificate.subject.human_friendly),
        issuer=readable(certificate.issuer.human_friendly),
        serial=certificate.serial_number,
        not_after=certificate.not_valid_after,
        der=der,
        microsoft=certificate.subject.native.get("organization_name") == MICROSOFT,
    )
