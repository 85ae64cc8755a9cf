"""tokvm prestage: the running source's own tools put virtio into its initramfs, so that the cutover has nothing to morph."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from typing import Annotated, Any

import typer

from tokvm.app.prestage import Prestage
from tokvm.app.workshop import Workshop
from tokvm.cli import options
from tokvm.cli.output import print_fields, print_json, print_table, say
from tokvm.cli.summaries import print_lines
from tokvm.remote.ssh import SshConfig, SshHost

GuestSsh = Annotated[
    str,
    typer.Option(
        "--guest-ssh",
        help="The guest itself, while it runs on the source: its root, or a user with `sudo -n`.",
        metavar="[USER@]HOST[:PORT]",
        show_default=False,
    ),
]


def prestage(
    name: options.Name,
    guest_ssh: GuestSsh,
    identity: options.Identity = None,
    ssh_config: options.SshFile = None,
    known_hosts: options.KnownHosts = None,
    accept_new_host_key: options.AcceptKey = False,
    dry_run: options.DryRun = False,
    state_dir: options.StateDir = None,
    json: options.Json = False,
    events: options.Events = False,
    verbose: options.Verbose = 0,
) -> None:
    """Put virtio into the running guest's initramfs, by its own tools, before the cutover. Linux only."""
    with options.running(json=json, events=events, verbose=verbose) as reporter:
        config = SshConfig.parse(
            guest_ssh,
            identity=identity,
            config_file=str(ssh_config) if ssh_config else None,
            known_hosts=known_hosts,
            accept_new_host_key=accept_new_host_key,
        )
        with Workshop.open(state_dir, reporter) as shop, closing(SshHost(config)) as host:
            document = Prestage(shop.journal, host, reporter).run(name, dry_run=dry_run)
    if json:
        print_json(document)
    else:
        _print(document)


def _print(document: Mapping[str, Any]) -> None:
    guest = document["guest"]
    print_fields((("guest", f"{guest['host']} ({guest['distribution']})"), ("initramfs by", guest["generator"])))
    print_table(
        ("kernel", "initramfs", "virtio"),
        [(one["version"], one["initrd"], _state(one)) for one in document["kernels"]],
    )
    for image in guest["unified"]:
        say(f"left as it is: {image}, a unified image")
    for one in document["config"]:
        say(f"{one['path']}: {one['state']}")
    if document["outcome"] == "dry-run":
        print_lines(document["steps"], json=False)
        return
    said = "every initramfs has virtio already" if document["outcome"] == "nothing-to-do" else "prestaged"
    say(f"{said}; next: {document['next']}")


def _state(kernel: Mapping[str, Any]) -> str:
    """`ready`, or which drivers are where."""
    if kernel["ready"]:
        return "ready"
    return ", ".join(f"{name} {held}" for name, held in kernel["drivers"].items())
