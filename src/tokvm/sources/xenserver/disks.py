"""A frozen disk's bytes, streamed by the host itself: any kind of SR, no scratch space, no file names.

    xe vdi-export uuid=D format=vhd [base=B] filename=                              an empty file name means stdout
    set -o pipefail; xe vdi-export … filename= | tail -c +N                         the same from byte N (counted from 1) on

XAPI writes the same VHD for the same frozen disk again, so a broken stream goes on from where it was: `images.vhd.stream`
checks that by the fingerprint of its block table. The host reads the disk from its start each time; only the network is spared,
and nothing is sent until the host has read N bytes.

The size to expect is the frozen image's: the VM's disk may have grown since.
"""

from __future__ import annotations

from tokvm.core.disk import DiskReader
from tokvm.core.errors import SourceError
from tokvm.core.machine import Disk, Snapshot
from tokvm.images.base import ByteStream
from tokvm.images.vhd.stream import StreamKind, VhdStream
from tokvm.remote.ssh import RemoteCommandError, quote
from tokvm.sources.xenserver.faults import explain
from tokvm.sources.xenserver.xe import Host, Xe, is_uuid, value_of

SKIPPED_PER_S = 20e6
"""Bytes that even a slow host reads past in a second, for `tail` to drop them. A guess on the safe side."""


def open_disk(host: Host, disk: Disk, at: Snapshot, since: Snapshot | None) -> DiskReader:
    frozen = _frozen(host, disk, at)
    base = None if since is None else _frozen(host, disk, since)
    return VhdStream(
        lambda first: _Export(host, export_command(frozen, base, first), first),
        name=f"{host.where} VDI {frozen}",
        expect_size=_size(host, frozen),
        expect_parent=StreamKind.BASE if base is None else StreamKind.DIFFERENCING,
    )


def export_command(vdi: str, base: str | None, first: int) -> str:
    """The command line for the stream from byte `first` (counted from 0) on."""
    export = quote(["xe", "vdi-export", f"uuid={vdi}", "format=vhd", *([] if base is None else [f"base={base}"]), "filename="])
    return export if first == 0 else f"set -o pipefail; {export} | tail -c +{first + 1}"


def _frozen(host: Host, disk: Disk, snapshot: Snapshot) -> str:
    frozen = snapshot.disks.get(disk.key)
    if frozen is None or not is_uuid(frozen):
        raise SourceError(
            f"the snapshot {snapshot.mark} holds no frozen image of disk {disk.index} ({disk.key})",
            where=host.where,
            fix="a disk was added or the snapshot was tampered with; run the same command again for a new snapshot",
        )
    return frozen


def _size(host: Host, vdi: str) -> int:
    xe = Xe(host)
    command = value_of("vdi", vdi, "virtual-size")
    answer = xe.ask(*command)
    if not (answer.isascii() and answer.isdecimal()):
        raise xe.confused(command, answer)
    return int(answer)


class _Export:
    """A ByteStream whose failures are in our words."""

    def __init__(self, host: Host, command: str, first: int) -> None:
        self._where = host.where
        self._stream: ByteStream = host.stream(command, first_byte_s=first / SKIPPED_PER_S)

    def read_into(self, buffer: memoryview) -> int:
        return self._stream.read_into(buffer)

    def finish(self) -> None:
        try:
            self._stream.finish()
        except RemoteCommandError as failed:
            raise explain(failed, where=self._where) from failed

    def close(self) -> None:
        self._stream.close()
