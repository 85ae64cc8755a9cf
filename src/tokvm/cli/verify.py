"""tokvm verify: does the target hold what the manifests say was written?"""

from __future__ import annotations

from typing import Annotated

import typer

from tokvm.app.verify import verify_job
from tokvm.app.workshop import Workshop
from tokvm.cli import options
from tokvm.cli.output import print_json, say
from tokvm.core.errors import VerifyError
from tokvm.core.units import format_bytes


def verify(
    name: options.Name,
    sample: Annotated[
        float | None,
        typer.Option(
            "--sample", help="Check this fraction (0-1) only, chosen at random.", min=0.0, max=1.0, show_default=False
        ),
    ] = None,
    state_dir: options.StateDir = None,
    json: options.Json = False,
    events: options.Events = False,
    verbose: options.Verbose = 0,
) -> None:
    """Read the target back past the page cache and compare it with the hashes of every pass (before it first runs on KVM)."""
    with (
        options.running(json=json, events=events, verbose=verbose) as reporter,
        Workshop.open(state_dir, reporter) as shop,
    ):
        report = verify_job(shop, name, reporter, sample=sample)
        if json:
            print_json(report.to_dict())
        else:
            for disk in report.disks:
                say(
                    f"disk {disk.index}: {format_bytes(disk.verified_bytes)} verified, "
                    f"{format_bytes(disk.unverifiable_bytes)} without a hash of their own, {len(disk.bad)} bad ranges"
                )
        if report.bad:
            first = report.bad[0]
            raise VerifyError(
                f"{len(report.bad)} ranges differ from what was written; the first is {first[2]} bytes at {first[1]:#x}",
                where=first[0],
                fix="do not start this copy; check the storage, then sync again with another --state-dir to copy it anew",
            )
