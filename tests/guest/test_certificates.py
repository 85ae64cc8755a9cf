"""Who signed a driver: against openssl, on the distribution's signed programs and on our own of many layouts."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.guest.signing import (
    Signing,
    distribution_files,
    new_signing,
    openssl_certificates,
    openssl_signer_serials,
    run,
)

from tokvm.guest.base import GuestError
from tokvm.guest.windows import certificates, pe
from tokvm.guest.windows.certificates import read_signers, signers, to_import
from tokvm.testing.pe_writer import program


@pytest.fixture(scope="module")
def red_hat(tmp_path_factory: pytest.TempPathFactory) -> Signing:
    return new_signing(tmp_path_factory.mktemp("rsa"))


@pytest.fixture(scope="module")
def curve(tmp_path_factory: pytest.TempPathFactory) -> Signing:
    return new_signing(tmp_path_factory.mktemp("ec"), "/O=Curves/CN=Curves", key="ec")


@dataclass(frozen=True, slots=True)
class Sample:
    """Hypothesis prints its arguments; this one is short."""

    data: bytes = field(repr=False)


@pytest.fixture(scope="module")
def driver(red_hat: Signing) -> bytes:
    """A signed driver whose size is no multiple of eight before it is signed."""
    return red_hat.sign(program(native=True, body=b"\xc3" * 700) + b"odd")


@pytest.fixture(scope="module")
def sample(driver: bytes) -> Sample:
    return Sample(driver)


@pytest.mark.slow
def test_the_distributions_programs_have_the_signers_that_openssl_sees() -> None:
    files = distribution_files()
    assert len(files) >= 2
    for file in files:
        data = file.read_bytes()
        found = signers(data, file.name)
        blobs = [blob for _, blob in pe.SignedProgram.parse(data, file.name).blobs()]
        assert {one.der for one in found} <= set().union(*(openssl_certificates(blob) for blob in blobs))
        assert {one.serial for one in found} == set().union(*(openssl_signer_serials(blob) for blob in blobs))


def test_shim_is_signed_by_microsoft_and_needs_no_import_and_grub_does() -> None:
    by_name = {file.name.split(".")[0]: read_signers(file) for file in distribution_files()}
    shim, grub = by_name["shimx64"], by_name["grubx64"]
    assert shim
    assert all(one.microsoft and not one.needs_import for one in shim)
    assert to_import(shim) == ()
    assert to_import(grub) == grub
    assert "Microsoft Corporation" in shim[0].subject


@pytest.mark.parametrize("arch", ["amd64", "x86", "arm64"])
@pytest.mark.parametrize("options", [(), ("-ph",)], ids=["plain", "page hashes"])
@pytest.mark.slow
def test_a_signed_program_of_each_architecture(red_hat: Signing, arch: str, options: tuple[str, ...]) -> None:
    data = red_hat.sign(program(arch=arch, body=bytes(5000)), *options)
    (found,) = signers(data, "a.exe")
    assert found.der == red_hat.der
    assert found.needs_import
    assert found.sha1 == hashlib.sha1(red_hat.der, usedforsecurity=False).hexdigest()
    assert found.sha256 == hashlib.sha256(red_hat.der).hexdigest()
    assert "Red Hat, Inc." in found.subject
    assert "Driver test CA" in found.issuer
    assert datetime.now(UTC) + timedelta(29) < found.not_after < datetime.now(UTC) + timedelta(31)
    assert (
        f"{found.serial:X}"
        == run("openssl", "x509", "-noout", "-serial", "-in", red_hat.certificate).decode().split("=")[1].strip()
    )


@pytest.mark.parametrize("length", range(1, 9))
def test_a_program_of_any_length_is_padded_by_who_signs_it(red_hat: Signing, length: int) -> None:
    assert signers(red_hat.sign(program() + bytes([7]) * length), "a.exe")[0].der == red_hat.der


@pytest.mark.parametrize("algorithm", ["sha1", "sha256", "sha384", "sha512"])
def test_each_digest_that_windows_knows(red_hat: Signing, algorithm: str) -> None:
    assert signers(red_hat.sign(program(), algorithm=algorithm), "a.exe")[0].der == red_hat.der


def test_a_nested_second_signature_gives_both_signers(red_hat: Signing, curve: Signing) -> None:
    once = red_hat.sign(program(), algorithm="sha1")
    twice = curve.sign(once, "-nest")
    assert {one.der for one in signers(twice, "a.exe")} == {red_hat.der, curve.der}


def test_the_same_signer_twice_is_told_once(red_hat: Signing) -> None:
    assert len(signers(red_hat.sign(red_hat.sign(program(), algorithm="sha1"), "-nest"), "a.exe")) == 1


def test_two_records_in_the_table_give_both_signers(red_hat: Signing, curve: Signing) -> None:
    """As signtool /as did before it nested: both sign the same bytes."""
    first, second = red_hat.sign(program()), curve.sign(program())
    parsed = pe.SignedProgram.parse(first, "first")
    table = first[parsed.table :] + second[pe.SignedProgram.parse(second, "second").table :]
    both = bytearray(first[: parsed.table] + table)
    struct.pack_into("<I", both, parsed.entry_at + 4, len(table))
    assert {one.der for one in signers(bytes(both), "both.sys")} == {red_hat.der, curve.der}


def test_a_catalogue_is_the_signature_itself(red_hat: Signing, curve: Signing) -> None:
    for signing in (red_hat, curve):
        data = signing.catalogue(b"\x30\x03\x02\x01\x05")
        assert [one.der for one in signers(data, "viostor.cat")] == [signing.der]
        assert openssl_signer_serials(data) == {signers(data, "viostor.cat")[0].serial}


def test_a_catalogue_whose_signer_is_named_by_key_identifier(red_hat: Signing) -> None:
    assert signers(red_hat.catalogue(b"\x30\x00", "-keyid"), "a.cat")[0].der == red_hat.der


def test_a_catalogue_without_signed_attributes(red_hat: Signing) -> None:
    assert signers(red_hat.catalogue(b"\x30\x00", "-noattr"), "a.cat")[0].der == red_hat.der


def test_a_signed_mail_is_no_catalogue(red_hat: Signing) -> None:
    with pytest.raises(GuestError, match="not a catalogue's"):
        signers(red_hat.catalogue(b"\x30\x00", kind="1.2.840.113549.1.7.1"), "a.cat")


def test_another_programs_signature_is_refused(driver: bytes, red_hat: Signing) -> None:
    other = red_hat.sign(program(native=True, body=b"\x90" * 700) + b"odd")
    cut = pe.SignedProgram.parse(driver, "driver").table
    with pytest.raises(GuestError, match="not of this program"):
        signers(other[:cut] + driver[cut:], "swapped.sys")


def test_a_digest_put_right_without_the_key_is_refused(driver: bytes) -> None:
    """Body changed, SpcIndirectData changed to fit: the signed attribute gives it away."""
    changed = bytearray(driver)
    changed[0x210] ^= 1
    before, after = (pe.SignedProgram.parse(bytes(one), "x").digest("sha256") for one in (driver, changed))
    with pytest.raises(GuestError, match="not that of the content"):
        signers(bytes(changed).replace(before, after), "forged.sys")


def test_a_forged_attribute_does_not_fit_the_key(red_hat: Signing) -> None:
    data = red_hat.catalogue(b"\x30\x03\x02\x01\x05")
    old, new = b"\x03\x02\x01\x05", b"\x03\x02\x01\x06"
    digests = [hashlib.sha256(one).digest() for one in (b"\x30" + old, b"\x30" + new)]
    inner = [hashlib.sha256(one[1:]).digest() for one in (old, new)]
    forged = data.replace(b"\x30" + old, b"\x30" + new).replace(digests[0], digests[1]).replace(inner[0], inner[1])
    assert forged != data
    with pytest.raises(GuestError, match=r"does not fit|not that of the content"):
        signers(forged, "forged.cat")


def test_the_checksum_field_is_not_covered(driver: bytes) -> None:
    changed = bytearray(driver)
    at = pe.SignedProgram.parse(driver, "driver").checksum_at
    changed[at] ^= 0xFF
    assert signers(bytes(changed), "driver.sys") == signers(driver, "driver.sys")


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (program(), "not signed"),
        (b"", "empty"),
        (b"MZ", "too early"),
        (b"MZ" + bytes(100), "no PE header"),
        (b"#!/bin/sh\n", "damaged signature"),
        (b"\x30\x80" + b"\x30\x80" * 5000, "damaged signature"),
    ],
)
def test_what_is_not_signed_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(GuestError, match=why) as refused:
        signers(data, "some.sys")
    assert "some.sys" in str(refused.value)


def test_a_file_above_the_limit_is_not_read(tmp_path: Path) -> None:
    huge = tmp_path / "huge.sys"
    with huge.open("wb") as file:
        file.truncate(certificates.MAX_FILE * 100)
    with pytest.raises(GuestError, match="more than"):
        read_signers(huge)


def test_bytes_behind_the_table_or_in_its_padding_are_refused(driver: bytes) -> None:
    with pytest.raises(GuestError, match="not the end of the file") as refused:
        signers(driver + bytes(8), "a.sys")
    assert "@0x" in refused.value.where
    parsed = pe.SignedProgram.parse(driver, "a.sys")
    grown = bytearray(driver + b"payload!")
    for at in (parsed.table, parsed.entry_at + 4):
        struct.pack_into("<I", grown, at, struct.unpack_from("<I", grown, at)[0] + 8)
    with pytest.raises(GuestError, match="does not cover"):
        signers(bytes(grown), "a.sys")


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 1 << 16))
def test_a_truncated_program_is_refused(sample: Sample, cut: int) -> None:
    with pytest.raises(GuestError):
        signers(sample.data[: cut % len(sample.data)], "cut.sys")


@settings(max_examples=300, deadline=None)
@given(at=st.integers(0, 1 << 20), flip=st.integers(1, 255))
@pytest.mark.slow
def test_a_flipped_byte_is_refused_or_changes_nothing(sample: Sample, at: int, flip: int) -> None:
    """Nothing is left but bytes that no signature covers: the checksum, the CA's own names, unsigned attributes."""
    changed = bytearray(sample.data)
    changed[at % len(changed)] ^= flip
    try:
        found = signers(bytes(changed), "flipped.sys")
    except GuestError:
        return
    assert found == signers(sample.data, "driver.sys")


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=400))
def test_random_bytes_are_refused(data: bytes) -> None:
    for start in (b"", b"\x30\x82", b"MZ"):
        with pytest.raises(GuestError):
            signers(start + data, "random")
