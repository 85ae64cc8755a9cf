"""Is this text a domain by libvirt's own RELAX NG? Asked before libvirt is: its answer to a wrong element is silence.

The schema comes with libvirt's packages, the check with libxml2's `xmllint`; where either is missing the answer is SKIPPED,
and `VIR_DOMAIN_DEFINE_VALIDATE` makes libvirt ask the same question when the domain is defined.
"""

from __future__ import annotations

import logging
from enum import StrEnum
from pathlib import Path

from tokvm.core.errors import DomainError
from tokvm.remote.process import run

log = logging.getLogger(__name__)

SCHEMA = Path("/usr/share/libvirt/schemas/domain.rng")
XMLLINT = Path("/usr/bin/xmllint")
TIMEOUT_S = 30.0


class Validation(StrEnum):
    PASSED = "passed"
    SKIPPED = "skipped"


def validate(xml: str, *, where: str, schema: Path = SCHEMA) -> Validation:
    """PASSED, or SKIPPED where it cannot be checked; DomainError naming the first thing that the schema does not know."""
    if not schema.is_file() or not XMLLINT.is_file():
        log.debug("domain XML of %s not checked: %s or %s is missing", where, schema, XMLLINT)
        return Validation.SKIPPED
    done = run(
        [str(XMLLINT), "--nonet", "--noout", "--relaxng", str(schema), "-"],
        input=xml.encode(),
        timeout_s=TIMEOUT_S,
        where="xmllint",
    )
    if done.code == 0:
        return Validation.PASSED
    complaints = [line for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
    raise DomainError(
        f"libvirt's schema refuses the domain: {complaints[0] if complaints else f'xmllint ended with {done.code}'}",
        where=where,
        fix="this is a fault in tokvm: please report it with the plan that `--dry-run` prints",
    )
