"""tokvm morph: make the guest on disks that are here already boot on KVM, all or nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from tokvm.cli import options
from tokvm.cli.output import print_json, say
from tokvm.core.errors import UsageError
from tokvm.core.machine import Firmware
from tokvm.core.units import format_bytes, format_duration

if TYPE_CHECKING:
    from tokvm.app.morph import Outcome

Disks = Annotated[list[str], typer.Argument(help="All disks of one VM, in its order: files or devices.", metavar="DISK…")]


def morph(
    disks: Disks,
    image_format: Annotated[str, typer.Option("--format", help="raw, or qcow2 as tokvm makes them.")] = "raw",
    way: Annotated[
        str | None,
        typer.Option("--way", help="micro or virt-v2v [the first of them that works for the guest].", show_default=False),
    ] = None,
    guest_root: options.GuestRoot = None,
    virtio_win: options.VirtioWin = None,
    firmware: Annotated[str, typer.Option("--firmware", help="The VM's: bios or uefi.")] = "bios",
    deadline: Annotated[str, typer.Option("--deadline", help="How long it may take.", metavar="DURATION")] = "1h",
    dry_run: options.DryRun = False,
    state_dir: options.StateDir = None,
    json: options.Json = False,
    events: options.Events = False,
    verbose: options.Verbose = 0,
) -> None:
    """Make the guest on these disks boot on KVM. All or nothing; tokvm unmorph gives every byte back. The VM must be off."""
    from tokvm.app import morph as app
    from tokvm.app.claimed import refuse_claimed
    from tokvm.app.state import default_state_dir

    with options.running(json=json, events=events, verbose=verbose) as reporter:
        wishes = app.MorphWishes(options.way(way), guest_root, virtio_win, _firmware(firmware), options.seconds(deadline))
        state = state_dir or default_state_dir()
        meant = app.disks_of(disks, image_format)
        refuse_claimed([disk.path for disk in meant], state)  # before an appliance is waited for; `morph` asks again
        found = app.look(meant, wishes)
        if not dry_run:
            found = app.morph(found, state, wishes, reporter.step)
        if json:
            print_json(found.to_dict())
        else:
            _print(found)


def _print(found: Outcome) -> None:
    if found.judgement is not None:
        say(f"{found.judgement.verdict}: {found.judgement.why}")
        for finding in found.judgement.findings:
            say(f"{finding.severity}: {finding.what}" + (f" ({finding.fix})" if finding.fix else ""))
    if found.report is None:
        say("nothing has to be done" if found.way is None else f"would morph by {found.way}; nothing was changed")
        return
    for warning in found.report.warnings:
        say(f"warning: {warning}")
    parts = ", ".join(f"{part} {format_duration(seconds)}" for part, seconds in found.report.seconds.items())
    say(f"morphed by {found.way}: {format_bytes(found.report.changed)} changed ({parts})")
    say(f"to undo it, before the VM has run: tokvm unmorph {' '.join(disk.path for disk in found.disks)}")


def _firmware(text: str) -> Firmware:
    try:
        return Firmware(text)
    except ValueError as exc:
        raise UsageError(f"{text!r} is no firmware", fix=f"--firmware {', or '.join(Firmware)}") from exc
