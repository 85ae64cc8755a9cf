"""tokvm lab: a hypervisor to try it on, with a real guest, on this machine."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from tokvm.cli import options
from tokvm.cli.output import print_fields, print_json
from tokvm.core.errors import UsageError
from tokvm.lab.settings import GuestKind, LabSettings, pictures_dir

lab = typer.Typer(help="Try tokvm on an embedded hypervisor with a real guest.", no_args_is_help=True, rich_markup_mode=None)

SourceName = Annotated[
    str,
    typer.Option(
        "--source",
        help="What to play: xenserver, hyperv, esxi (esxi-vmfs5: COWD layers; esxi-locked: a base that stays locked), vcenter "
        "(vcenter-api: without SSH).",
    ),
]
Guests = Annotated[int, typer.Option("--guests", help="How many VMs run and are migrated.", min=1)]
Guest = Annotated[
    str,
    typer.Option(
        "--guest",
        help="What runs in the VMs: mini (seconds to make), mini-no-virtio (needs a morph), debian-no-virtio (a real Debian; "
        "minutes to make, once), windows-phony (is built, never boots: for lab up).",
    ),
]
DiskSize = Annotated[
    str | None,
    typer.Option(
        "--disk-size", help="Size of each guest's disk [256M; debian-no-virtio: 1200M].", metavar="SIZE", show_default=False
    ),
]
WriteRate = Annotated[
    str, typer.Option("--write-rate", help="Bytes per second each guest writes beside its ledger.", metavar="SIZE")
]
LinkRate = Annotated[
    str | None,
    typer.Option(
        "--link-rate", help="Bytes per second between source and tokvm [loopback].", metavar="SIZE", show_default=False
    ),
]
Rtt = Annotated[str, typer.Option("--rtt", help="Delay added to each round trip.", metavar="DURATION")]
LabPasses = Annotated[int, typer.Option("--passes", help="Base and deltas before the final one.", min=1)]
AtOnce = Annotated[
    int,
    typer.Option(
        "--at-once",
        help="How many VMs run and are moved at a time [all]; the earlier ones' stop foretells the later ones'.",
        min=0,
        show_default=False,
    ),
]
Rehearse = Annotated[
    bool, typer.Option("--rehearse", help="Sync, rehearse, cut over, instead of migrate: see what the rehearsal foretold.")
]
Boots = Annotated[int, typer.Option("--boots", help="How often a rehearsal boots a guest.", min=1, max=9)]
Pictures = Annotated[
    Path | None,
    typer.Option(
        "--pictures", help="A folder for the rehearsals' pictures and the drawn reports [the lab's cache].", show_default=False
    ),
]
Folder = Annotated[
    Path | None, typer.Option("--folder", help="Where the lab lives [a new folder of its own].", show_default=False)
]


def _settings(
    source: str,
    guests: int,
    guest: str,
    disk_size: str | None,
    write_rate: str,
    link_rate: str | None,
    rtt: str,
    passes: int = 3,
    *,
    at_once: int = 0,
    rehearse: bool = False,
    boots: int = 1,
    way: str | None = None,
    pictures: Path | None = None,
) -> LabSettings:
    return LabSettings(
        source=source,
        guests=guests,
        guest=_guest(guest),
        disk_size=0 if disk_size is None else _size(disk_size),
        write_rate=_size(write_rate),
        link_rate=None if link_rate is None else float(_size(link_rate)),
        rtt_s=options.duration(rtt) or 0.0,
        passes=passes,
        at_once=at_once,
        rehearse=rehearse,
        rehearsal_boots=boots,
        way=options.way(way),
        pictures=pictures or pictures_dir(),
    )


def _guest(text: str) -> GuestKind:
    try:
        return GuestKind(text)
    except ValueError as exc:
        raise UsageError(f"the lab has no guest {text!r}", fix=f"write --guest {' or '.join(GuestKind)}") from exc


def _size(text: str) -> int:
    found = options.size(text)
    if found is None:
        raise UsageError(f"{text!r} is not a size", fix="write for example 256M")
    return found


@lab.command()
def run(
    source: SourceName = "xenserver",
    guests: Guests = 1,
    guest: Guest = "mini",
    disk_size: DiskSize = None,
    write_rate: WriteRate = "256K",
    link_rate: LinkRate = None,
    rtt: Rtt = "0s",
    passes: LabPasses = 3,
    at_once: AtOnce = 0,
    rehearse: Rehearse = False,
    boots: Boots = 1,
    way: options.WayOption = None,
    pictures: Pictures = None,
    folder: Folder = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the lab running afterwards; `tokvm lab down` ends it.")] = False,
    json: options.Json = False,
    events: options.Events = False,
    verbose: options.Verbose = 0,
) -> None:
    """Build a lab, migrate its running VMs, print the downtime report, take the lab down. Exit 0 only when nothing was lost."""
    from tokvm.lab.run import run as run_lab

    with options.running(json=json, events=events, verbose=verbose) as reporter:
        settings = _settings(
            *(source, guests, guest, disk_size, write_rate, link_rate, rtt, passes),
            at_once=at_once,
            rehearse=rehearse,
            boots=boots,
            way=way,
            pictures=pictures,
        )
        report = run_lab(settings, folder=folder, keep=keep, progress=reporter.note)
        if json:
            print_json(report.document)
        else:
            print(report.text)
        if report.exit_code:
            raise typer.Exit(report.exit_code)


@lab.command()
def up(
    source: SourceName = "xenserver",
    guests: Guests = 1,
    guest: Guest = "mini",
    disk_size: DiskSize = None,
    write_rate: WriteRate = "256K",
    link_rate: LinkRate = None,
    rtt: Rtt = "0s",
    folder: Folder = None,
    json: options.Json = False,
    verbose: options.Verbose = 0,
) -> None:
    """Build a lab and leave it running, to try tokvm on by hand."""
    from tokvm.lab.run import up as lab_up

    with options.running(json=json, verbose=verbose) as reporter:
        place, record = lab_up(
            _settings(source, guests, guest, disk_size, write_rate, link_rate, rtt), folder=folder, progress=reporter.note
        )
        known = {
            "folder": str(place),
            "source": record.url,
            "options": record.options,
            "ssh_config": record.ssh_config,
            "libvirt": record.libvirt,
            "machines": record.machines,
        }
        if json:
            print_json(known)
            return
        print_fields(known.items())
        name = next(iter(record.machines.values()))
        ready = shlex.join(["--ssh-config", record.ssh_config, *record.options])
        print(f"\ntry:  tokvm ls {record.url} {ready}")
        print(
            f"      tokvm migrate {record.url} {name} --to {place}/target/ {ready} "
            f"--libvirt '{record.libvirt}' --network '*=user' --proof 0 --state-dir {place}/state"
        )
        print(f"then: tokvm lab down --folder {place}")


@lab.command()
def down(
    folder: Annotated[
        Path | None, typer.Option("--folder", help="The lab to take down [all of them].", show_default=False)
    ] = None,
    json: options.Json = False,
    verbose: options.Verbose = 0,
) -> None:
    """Take a lab down (all of them without --folder), also one that a crash left behind."""
    from tokvm.lab.run import down as lab_down

    with options.running(json=json, verbose=verbose) as reporter:
        count = lab_down(folder, progress=reporter.note)
        if json:
            print_json({"outcome": "down", "labs": count})
        else:
            print(f"{count} lab{'' if count == 1 else 's'} taken down")
