"""The forced command: one process per command line, as ESXi's shell is, and one per sftp session.

    sshd ─ SSH_ORIGINAL_COMMAND ─┬─► line ─► contract ─► for each command: faults ─► act ─► what it prints, `TAG code`
                                 └─► sftp-server

What no row of the contract allows fails and is recorded in STATE_DIR/violations. Must start fast (no numpy, no site): tests
run it thousands of times.
"""

from __future__ import annotations

import os
import select
import time
from pathlib import Path
from typing import NoReturn

from tokvm.testing.esxi import commands, contract, faults
from tokvm.testing.esxi.contract import Command
from tokvm.testing.esxi.errors import CommandFailed, NotInContract, VimFault
from tokvm.testing.esxi.hostd import hostd_of, with_state
from tokvm.testing.esxi.state import Late, State, Store
from tokvm.testing.persona import forced
from tokvm.testing.persona.connection import kill_connection, wait_for_hangup
from tokvm.testing.persona.forced import DROPPED, NOBODY, Drop, write

SUBSYSTEM = "/usr/lib/vmware/openssh/bin/sftp-server -f LOCAL5 -l INFO"
NOT_FOUND = 127
POLL_S = 0.02
HOSTD_PROGRAMS = ("vim-cmd", "esxcli")


class Persona:
    def __init__(self, folder: Path) -> None:
        self.store = Store(folder)
        self.hostd = hostd_of(self.store)

    def answer_line(self, line: str) -> int:
        """Do what `line` asks. Returns the exit code."""
        if line == SUBSYSTEM:
            from tokvm.testing.esxi.sftp import SftpServer

            SftpServer(self.hostd).serve()
            return 0
        self.store.append("commands.log", {"pid": os.getpid(), "command": line})
        try:
            asked, tag = contract.read_line(line)
            return self._answer(line, asked, tag)
        except NotInContract as refused:
            self.store.append("violations", {"command": line, "why": str(refused)})
            _print(2, f"sh: {(line.split() or [''])[0]}: not found\n")
            return NOT_FOUND
        except Drop:
            kill_connection(self.store)
            return DROPPED
        except BrokenPipeError:
            return NOBODY

    def _answer(self, line: str, asked: list[Command], tag: str) -> int:
        said = ""
        code = 0
        kinds: set[str] = set()
        for command in asked:
            hit = self._hit_by(command.name)
            kinds |= set(hit)
            text, code = self._answer_one(line, command, hit)
            said += text + (f"{tag} {code}\n" if tag else "")
        if "lost_reply" in kinds:
            raise Drop
        if "freeze" in kinds:
            wait_for_hangup(1)
        if "no_answer" in kinds:
            return 0
        if "cut_answer" in kinds:
            _print(1, said[: len(said) // 2])
            return 0
        _print(1, said)
        return 0 if tag else code

    def _hit_by(self, name: str) -> dict[str, faults.Fault]:
        return {one["kind"]: one for one in faults.PLAN.take(self.store, lambda match: match in ("", name))}

    def _answer_one(self, line: str, command: Command, hit: dict[str, faults.Fault]) -> tuple[str, int]:
        """(standard output, exit code) of one command, or the end of all."""
        if "wait" in hit:
            time.sleep(hit["wait"]["seconds"])
        if "hang" in hit:
            wait_for_hangup(1)
        if "drop" in hit:
            raise Drop
        if "late" in hit:
            self._do_late(line, hit["late"]["seconds"])
            raise Drop
        by_hostd = contract.ROWS.get(command.name, ("", ("sh",)))[1][0] in HOSTD_PROGRAMS
        if "hostd_down" in hit and by_hostd:
            _print(2, "Connect to localhost failed: Connection failure.\n")
            return "", 1
        if "error" in hit:
            return self._fail(_planned(hit["error"], by_hostd=by_hostd))
        text, code = self._do(command)
        return self._fail(_planned(hit["error_after"], by_hostd=by_hostd)) if "error_after" in hit else (text, code)

    def _do(self, command: Command) -> tuple[str, int]:
        said: list[str] = []
        try:
            with_state(self.hostd, lambda state: said.append(commands.run(self.hostd, state, command)))
            self._wait_for_answer(command)
        except (VimFault, CommandFailed) as failure:
            return self._fail(failure)
        return said[0], 0

    def _wait_for_answer(self, command: Command) -> None:
        """vim-cmd comes back from a power-on when somebody has answered the question that it waits for, or never."""
        poller = select.poll()
        poller.register(1, 0)
        while commands.open_question(self.store.read(), command):
            if poller.poll(POLL_S * 1000):
                raise BrokenPipeError

    def _fail(self, failure: VimFault | CommandFailed) -> tuple[str, int]:
        options = self.store.read()["options"]
        if isinstance(failure, VimFault):
            return failure.text(style=options["dumps"]), options["fault_code"]
        _print(2, f"{failure.text}\n")
        return "", failure.code

    def _do_late(self, line: str, seconds: float) -> None:
        def act(state: State) -> None:
            state["later"].append(Late(line=line, due=time.time() + seconds))

        with_state(self.hostd, act)


def _planned(fault: faults.Fault, *, by_hostd: bool) -> VimFault | CommandFailed:
    text = fault.get("message", "A general system error occurred: Internal error")
    return VimFault(fault.get("type", "GenericVmConfigFault"), text) if by_hostd else CommandFailed(text)


def _print(file: int, text: str) -> None:
    write(file, text.encode("utf-8", "surrogateescape"))


def main(folder: str) -> NoReturn:
    place = Path(folder)
    forced.run(Store(place), lambda line: Persona(place).answer_line(line))
