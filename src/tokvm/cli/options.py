"""Options that several verbs share, and the shell every verb runs in: state directory, reporter, errors to exit codes."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from tokvm.cli.output import error_document, print_error, print_json
from tokvm.cli.reporters import Reporter, choose_reporter
from tokvm.core.errors import TokvmError, UsageError
from tokvm.core.text import printable
from tokvm.core.units import parse_duration, parse_size
from tokvm.guest.base import Way

if TYPE_CHECKING:
    from tokvm.remote.recording import Recorder

INTERRUPTED = 130
T = TypeVar("T")


def _converted(parse: Callable[[str], T]) -> Callable[[str | None], T | None]:
    def convert(text: str | None) -> T | None:
        if text is None:
            return None
        try:
            return parse(text)
        except ValueError as exc:
            raise UsageError(str(exc)) from exc

    return convert


_duration = _converted(parse_duration)


def duration(text: str | None) -> float | None:
    return _duration(text)


def seconds(text: str) -> float:
    """A duration that was given or has a default."""
    found = _duration(text)
    return 0.0 if found is None else found


size = _converted(parse_size)

Json = Annotated[bool, typer.Option("--json", help="End with one JSON document on standard output.")]
Events = Annotated[bool, typer.Option("--events", help="Report progress as JSON lines on standard error.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done; change nothing.")]
Verbose = Annotated[int, typer.Option("--verbose", "-v", count=True, help="Log more (-vv: every request).", show_default=False)]
StateDir = Annotated[
    Path | None,
    typer.Option(
        "--state-dir",
        help="Where tokvm remembers [$TOKVM_STATE_DIR, else /var/lib/tokvm; ~/.local/state/tokvm if not root].",
        show_default=False,
    ),
]
Name = Annotated[str, typer.Argument(help="The VM's name or uuid, or the migration's id.")]
VmName = Annotated[str, typer.Argument(help="The VM's name or uuid.", metavar="NAME")]
SourceUrl = Annotated[
    str,
    typer.Argument(
        help="xenserver://[user@]HOST[:PORT] (or xcpng://…), hyperv://[user@]HOST[:PORT] (hyperv+winrm://…: WinRM and SMB), "
        "esx://[user@]HOST[:PORT], vpx://[user@]VCENTER-OR-ESXI[:PORT][/DATACENTER], or files:BASE.vhd[,CHILD.vhd…]",
        metavar="SOURCE",
    ),
]
To = Annotated[
    list[str] | None,
    typer.Option(
        "--to", help="A directory for raw files, or one file or block device for each disk, in order.", show_default=False
    ),
]
Overwrite = Annotated[
    list[str] | None,
    typer.Option(
        "--overwrite", help="PATH=SIZE or PATH=SERIAL: this target's content may be lost (repeat its size).", show_default=False
    ),
]
Network = Annotated[
    list[str] | None,
    typer.Option(
        "--network",
        help="SOURCE-NETWORK=TARGET, TARGET being network:NAME, bridge:NAME, user or none; '*' stands for all others.",
        show_default=False,
    ),
]
Libvirt = Annotated[
    str | None, typer.Option("--libvirt", help="The libvirt to start the VM on [qemu:///system].", show_default=False)
]
Domain = Annotated[str | None, typer.Option("--domain", help="The domain's name on KVM [the VM's name].", show_default=False)]
Machine = Annotated[str | None, typer.Option("--machine", help="q35 or pc [q35].", show_default=False)]
Bus = Annotated[
    str | None,
    typer.Option(
        "--bus", help="virtio-blk, virtio-scsi, sata, ide, nvme, pvscsi, sas or megasas [virtio-blk].", show_default=False
    ),
]
Identity = Annotated[str | None, typer.Option("--identity", "-i", help="The SSH key to use.", show_default=False)]
SshFile = Annotated[str | None, typer.Option("--ssh-config", help="An ssh_config instead of your own.", show_default=False)]
KnownHosts = Annotated[
    str | None, typer.Option("--known-hosts", help="Host keys instead of your own file.", show_default=False)
]
AcceptKey = Annotated[
    bool,
    typer.Option("--accept-new-host-key", help="Learn the host's key when it is unknown (a changed one is always refused)."),
]
PasswordFile = Annotated[
    str | None,
    typer.Option(
        "--password-file",
        help="The password's file, where a source asks for one [$TOKVM_PASSWORD, else a prompt].",
        show_default=False,
    ),
]
WayOption = Annotated[
    str | None,
    typer.Option(
        "--way",
        help="How the guest is made to boot: none, micro, kernel, compatible, virt-v2v or prestage [the rehearsal's best].",
        show_default=False,
    ),
]
VirtioWin = Annotated[
    str | None,
    typer.Option("--virtio-win", help="Drivers for Windows: the virtio-win ISO, or a folder of it.", show_default=False),
]
GuestRoot = Annotated[
    str | None,
    typer.Option("--root", help="Which system is meant where a disk holds several, e.g. /dev/sda2.", show_default=False),
]
SignSerial = Annotated[
    str | None,
    typer.Option(
        "--sign-serial",
        help="The line on the serial port that proves life, a regular expression [login:].",
        show_default=False,
    ),
]
CloneBase = Annotated[
    bool,
    typer.Option("--clone-base", help="esx: a base that stays locked is cloned on its datastore first (needs the room)."),
]
BytesFrom = Annotated[
    str | None,
    typer.Option(
        "--bytes",
        help="vpx: read disks by SFTP from the ESXi host that runs the VM, ssh://root@{host} or one by name.",
        metavar="SSH-URL",
        show_default=False,
    ),
]
Nbd = Annotated[
    str | None,
    typer.Option(
        "--nbd",
        help="vpx: read disks from your own NBD server, nbd+unix:///?socket=PATH with {uuid}, {snapshot}, {number}, {index}.",
        metavar="URI",
        show_default=False,
    ),
]
EnableCbt = Annotated[
    bool,
    typer.Option("--enable-cbt", help="vpx: track changed blocks during the migration, and read no more than them."),
]
TlsCa = Annotated[
    str | None, typer.Option("--tls-ca", help="The CA of the source's TLS certificate [the system's CAs].", show_default=False)
]
TlsFingerprint = Annotated[
    str | None,
    typer.Option("--tls-fingerprint", help="SHA-256 of the source's TLS certificate, instead of a CA.", show_default=False),
]
Silence = Annotated[
    str, typer.Option("--silence", help="Give a connection up that moves no byte for so long.", metavar="DURATION")
]
RateLimit = Annotated[
    str | None, typer.Option("--rate-limit", help="Bytes per second at most, e.g. 200M.", metavar="SIZE", show_default=False)
]
Passes = Annotated[
    int | None,
    typer.Option("--passes", help="Passes to make, base included [until they get no smaller].", min=1, show_default=False),
]
SyncBudget = Annotated[
    str | None,
    typer.Option(
        "--budget",
        help="Make passes until a cutover is predicted to stop the VM for no longer than this.",
        metavar="DURATION",
        show_default=False,
    ),
]
Budget = Annotated[
    str | None,
    typer.Option(
        "--budget",
        help="The longest downtime you accept; predicted or actual downtime above it rolls back (exit 7).",
        metavar="DURATION",
        show_default=False,
    ),
]
ForceOff = Annotated[bool, typer.Option("--force-off", help="Cut the VM's power when it does not shut down by the deadline.")]
Deadline = Annotated[str, typer.Option("--deadline", help="How long the guest may take to shut down.", metavar="DURATION")]
Probe = Annotated[
    str | None,
    typer.Option("--probe", help="A sign of life besides the guest agent's: tcp:HOST:PORT answers.", show_default=False),
]
Record = Annotated[
    Path | None,
    typer.Option(
        "--record",
        help="Write what is sent to the source, and its answers, to a new file in this directory; secrets are left out.",
        metavar="DIR",
        show_default=False,
    ),
]
Proof = Annotated[str, typer.Option("--proof", help="How long the target may take to show life.", metavar="DURATION")]


def way(text: str | None) -> Way | None:
    """`--way`."""
    try:
        return None if text is None else Way(text)
    except ValueError as exc:
        raise UsageError(f"{text!r} is no way to cut over", fix=f"one of {', '.join(Way)}") from exc


class _OneLine(logging.Formatter):
    """Records hold names and answers from outside: control characters are shown, not obeyed."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        return printable(super().formatMessage(record))


def _set_up_logging(verbose: int) -> None:
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.raiseExceptions = False  # a log that cannot be written must not be the end of a migration


def _on_term(number: int, _frame: FrameType | None) -> None:
    """SIGTERM and SIGHUP end like Ctrl-C: children are killed, the journal says how far it came.

    A terminal that closes sends SIGHUP twice, by its shell and by the kernel: the second would end what puts a VM right."""
    if number == signal.SIGHUP:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    raise KeyboardInterrupt


@contextmanager
def running(*, json: bool = False, events: bool = False, verbose: int = 0) -> Iterator[Reporter]:
    """The inside of every verb. A TokvmError becomes its message (or a JSON document) and its class's exit code."""
    _set_up_logging(verbose)
    signal.signal(signal.SIGTERM, _on_term)
    signal.signal(signal.SIGHUP, _on_term)
    reporter = choose_reporter(events=events)
    try:
        yield reporter
    except TokvmError as error:
        reporter.close()
        if json:
            print_json(error_document(error))
        print_error(error)
        raise typer.Exit(error.exit_code) from error
    except KeyboardInterrupt as stop:
        reporter.close()
        print("tokvm: interrupted; run the same command again to go on", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from stop
    finally:
        reporter.close()


@contextmanager
def recording(folder: Path | None, verb: str) -> Iterator[Recorder | None]:
    """The transcript that --record asks for; inside of `running`, which tells what is wrong with its directory."""
    from tokvm.remote.recording import recording as transcript  # what cleans it costs a start more than most verbs need

    with transcript(folder, verb=verb, typed=["tokvm", *sys.argv[1:]]) as recorder:
        yield recorder
