"""The error tree. An error says what happened, where, and what to do next; its class is the exit code.

`docs/errors.md` is generated from these classes (`python -m tokvm.core.errors`)."""

from __future__ import annotations

from typing import ClassVar


class TokvmError(Exception):
    """Anything tokvm can explain.

    what: one sentence, no trailing stop. where: the file, device, host or VM it is about, with an offset
    when there is one (`disk.vhd@0x200`). fix: what the operator does next.
    """

    exit_code: ClassVar[int] = 1
    meaning: ClassVar[str] = "an error of no finer class"

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.fix = fix

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}\n  next: {self.fix}" if self.fix else text


class UsageError(TokvmError):
    exit_code = 2
    meaning = "the command line, the configuration or the name given cannot be used"


class ImageError(TokvmError):
    exit_code = 3
    meaning = "a disk image or stream is damaged, hostile, or not what its parent expects; nothing of it was believed"


class SourceError(TokvmError):
    exit_code = 4
    meaning = "the source hypervisor refused, failed, or answered something tokvm does not understand"


class ConnectionLost(SourceError):
    exit_code = 5
    meaning = "the source could not be reached, the connection broke, or it went silent; run the same command again to go on"


class HostKeyError(SourceError):
    exit_code = 6
    meaning = "the source's SSH host key is unknown or has changed; nothing was sent to it"


class BudgetExceeded(TokvmError):
    exit_code = 7
    meaning = "the downtime budget would be or was passed; the cutover was rolled back and the source runs"


class TargetError(TokvmError):
    exit_code = 8
    meaning = "the target failed: an I/O error, no space, or it changed its meaning; nothing after the last checkpoint counts"


class UnsafeTarget(TargetError):
    exit_code = 9
    meaning = "an interlock refused the target; not one byte was written to it"


class Blocked(TokvmError):
    exit_code = 10
    meaning = "this VM cannot be migrated as it stands; every blocker is listed"


class JournalError(TokvmError):
    exit_code = 11
    meaning = "the journal is locked by another run, damaged, or refuses the transition"


class NotOff(SourceError):
    exit_code = 12
    meaning = "the source VM is not proved off by two witnesses; the target was not touched"


class DomainError(TokvmError):
    exit_code = 13
    meaning = "libvirt refused the domain, or it did not come to life"


class VerifyError(TokvmError):
    exit_code = 14
    meaning = "the target does not hold the bytes that the manifest says were written"


class NeedsPerson(TokvmError):
    exit_code = 15
    meaning = "tokvm will not choose: a person must look first; the message holds the one command to run"


class RolledBack(TokvmError):
    exit_code = 16
    meaning = "the cutover failed and was rolled back; the source runs"


class GuestError(TokvmError):
    exit_code = 17
    meaning = "the guest on the disks could not be inspected or morphed, or its rehearsal failed; the disks hold what they held"


def all_errors() -> list[type[TokvmError]]:
    """Every class of the tree, by exit code."""
    found: list[type[TokvmError]] = []
    waiting: list[type[TokvmError]] = [TokvmError]
    while waiting:
        cls = waiting.pop()
        found.append(cls)
        waiting.extend(cls.__subclasses__())
    return sorted(found, key=lambda cls: cls.exit_code)


def errors_page() -> str:
    """The text of docs/errors.md."""
    rows = "\n".join(f"| {cls.exit_code} | `{cls.__name__}` | {cls.meaning} |" for cls in all_errors())
    return (
        "# Exit codes and errors\n\n"
        "Generated from `src/tokvm/core/errors.py` by `python -m tokvm.core.errors > docs/errors.md`.\n"
        "Every error prints what happened, where, and what to do next. 0 is success, 130 is Ctrl-C.\n\n"
        "| exit code | class | what it means |\n|---|---|---|\n" + rows + "\n"
    )


if __name__ == "__main__":
    print(errors_page(), end="")
