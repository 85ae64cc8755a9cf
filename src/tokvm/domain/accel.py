"""Does KVM work here? Found by trying, because /dev/kvm can be there and a guest still hang in its firmware.

    SeaBIOS ─► boot sector (made here) ─► sti; hlt: one timer interrupt
                                       ─► protected mode; counts down from 2^28
                                       ─► writes MARK to the serial port
                                       ─► resets the machine, which ends QEMU (-no-reboot)

A broken KVM may run the first instructions. Seen: one that came through SeaBIOS in 2.8 s, but not through the loop in 12 s,
where TCG needed 0.2 s and about 1.1 s. KVM that works runs the 2^28 rounds at the processor's own speed (estimate: 0.1 s).
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from tokvm.core.errors import TokvmError
from tokvm.core.units import SECTOR, MiB
from tokvm.domain.base import Accel
from tokvm.remote.process import run

log = logging.getLogger(__name__)

DEVICE = Path("/dev/kvm")
EMULATORS = ("qemu-system-x86_64", "/usr/libexec/qemu-kvm", "qemu-kvm")
MARK = b"tokvm: the guest runs"
DEADLINE_S = 5.0
# SeaBIOS 1.16 would not read a disk of one sector ("could not read the boot disk"); 1 MiB it did.
DISK = MiB
# A "no" may have come from a host too busy to boot anything within the deadline; it is asked again after this time.
NO_LASTS_S = 600.0


class Kvm(StrEnum):
    WORKS = "works"
    ABSENT = "absent"
    """No /dev/kvm, or no QEMU to try it with."""
    FORBIDDEN = "forbidden"
    """This user may not open /dev/kvm; libvirt's QEMU perhaps may."""
    BROKEN = "broken"
    """A guest was started and made no progress."""


@dataclass(frozen=True, slots=True)
class KvmAnswer:
    verdict: Kvm
    detail: str


def kvm_works() -> bool:
    """True when a guest has run under KVM on this host, now or earlier since boot."""
    return probe_kvm().verdict is Kvm.WORKS


def probe_kvm(*, deadline_s: float = DEADLINE_S, cache: Path | None = None) -> KvmAnswer:
    """The answer, from `cache` (default: a file in the runtime directory) when it is of this boot and this QEMU."""
    if not DEVICE.exists():
        return KvmAnswer(Kvm.ABSENT, f"there is no {DEVICE}")
    if not os.access(DEVICE, os.R_OK | os.W_OK):
        return KvmAnswer(Kvm.FORBIDDEN, f"{DEVICE} may not be opened by uid {os.geteuid()}")
    emulator = find_emulator()
    if emulator is None:
        return KvmAnswer(Kvm.ABSENT, f"none of {', '.join(EMULATORS)} is installed")
    kept = cache or _cache_file()
    key = _cache_key(emulator)
    answer = _recall(kept, key)
    if answer is None:
        answer = try_guest(emulator, Accel.KVM, deadline_s=deadline_s)
        log.info("KVM %s on this host: %s", answer.verdict, answer.detail)
        _remember(kept, key, answer)
    return answer


def find_emulator() -> str | None:
    """The path of the QEMU to try with."""
    return next((found for name in EMULATORS if (found := shutil.which(name))), None)


def boot_sector() -> bytes:
    """Machine code for 0000:7C00: 16 bits until the jump, 32 bits behind it."""
    code = bytes.fromhex(
        "31c0 8ed8 fc"  #                 xor ax,ax; mov ds,ax; cld             a BIOS promises neither
        "fb f4 fa"  #                     sti; hlt; cli                         until the timer ticks (18.2 Hz)
        "660f0116607c"  #                 lgdt [0x7c60]
        "0f20c0 0c01 0f22c0"  #           cr0 |= 1
        "66ea 1e7c0000 0800"  #           jmp 8:0x7c1e                          32 bits from here
        "66b81000 8ed8"  #                mov ax,0x10; mov ds,eax
        "b900000010 49 75fd"  #           mov ecx,1 << 28; again: dec ecx; jnz again
        "baf8030000 be667c0000"  #        mov edx,0x3f8 (COM1); mov esi,0x7c66 (MARK)
        "ac 84c0 7403 ee ebf8"  #         next: lodsb; test al,al; jz done; out dx,al; jmp next
        "b0fe e664 f4 ebfd"  #            done: mov al,0xfe; out 0x64,al; hlt   reset by the keyboard controller
        "000000 0000000000000000"  #      0x7c48: GDT: nothing,
        "ffff0000009acf00"  #             code and
        "ffff00000092cf00"  #             data, both flat
        "1700487c0000"  #                 0x7c60: GDT's limit and address
    )
    return (code + MARK + b"\0").ljust(SECTOR - 2, b"\0") + b"\x55\xaa"


def try_guest(emulator: str, accel: Accel, *, deadline_s: float) -> KvmAnswer:
    """Boot the sector once. Also works with TCG, which shows that the trial itself is sound."""
    with tempfile.TemporaryDirectory(prefix="tokvm-kvm-") as folder:
        disk = Path(folder) / "boot.raw"
        disk.write_bytes(boot_sector())
        os.truncate(disk, DISK)
        argv = [
            emulator,
            *("-machine", f"q35,accel={'kvm' if accel is Accel.KVM else 'tcg'}", "-m", "32", "-nodefaults", "-no-user-config"),
            *("-display", "none", "-no-reboot", "-serial", "stdio"),
            *("-drive", f"file={disk},if=none,id=boot,format=raw", "-device", "ide-hd,drive=boot,bootindex=1"),
        ]
        try:
            done = run(argv, timeout_s=deadline_s, where="the KVM trial")
        except TokvmError as exc:
            return KvmAnswer(Kvm.BROKEN, f"no guest came up within {deadline_s:g} s ({exc.what})")
    if MARK in done.stdout:
        return KvmAnswer(Kvm.WORKS, "a guest booted")
    complaint = done.stderr.decode(errors="replace").strip().splitlines()
    return KvmAnswer(Kvm.BROKEN, complaint[-1] if complaint else f"QEMU ended with {done.code} before the guest spoke")


def _cache_file() -> Path | None:
    runtime = "/run" if os.geteuid() == 0 else os.environ.get("XDG_RUNTIME_DIR", "")
    return Path(runtime) / "tokvm" / "kvm.json" if runtime else None


def _cache_key(emulator: str) -> str:
    """This boot, this QEMU (size and time of the binary: no process needed to learn that it was upgraded)."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    seen = Path(emulator).stat()
    return f"{boot} {Path(emulator).resolve()} {seen.st_size} {seen.st_mtime_ns}"


def _recall(cache: Path | None, key: str) -> KvmAnswer | None:
    try:
        kept = json.loads(cache.read_text()) if cache else {}
        answer = KvmAnswer(Kvm(kept["verdict"]), str(kept["detail"]))
        fresh = kept["key"] == key and (answer.verdict is Kvm.WORKS or 0 <= time.time() - kept["time"] < NO_LASTS_S)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return answer if fresh else None


def _remember(cache: Path | None, key: str, answer: KvmAnswer) -> None:
    if cache is None:
        return
    beside = cache.with_name(f"{cache.name}.{os.getpid()}")
    try:
        cache.parent.mkdir(mode=0o700, exist_ok=True)
        beside.write_text(json.dumps({**asdict(answer), "key": key, "time": time.time()}))
        beside.replace(cache)
    except OSError as exc:
        log.debug("the KVM answer was not kept: %s", exc)
