"""Asking a Windows host in PowerShell, over ssh.

    ssh HOST powershell.exe … -EncodedCommand BOOTSTRAP        one constant command line, the same under cmd.exe and PowerShell
    stdin    tag \n  base64(UTF-8 script) \n  base64(UTF-8 JSON data) \n  @@X \n      then the next request, or the end
    stdout   anything  @@B  base64(UTF-8 JSON answer), in lines  @@E  anything
    answer   {"tag", "ok": true, "value": …}    or    {"tag", "ok": false, "type", "message", "hresult", "id"}

Names and paths travel as JSON in base64: no shell, no code page and no console width touches them. Scripts are constant files
beside this module (`scripts/`); nothing is ever put into their text. Without the line @@X nothing runs: a broken connection
must not run half a request. An answer bears its request's tag, a random one, and is taken for no other's. stderr is CLIXML, in
the host's language and code page: it is logged and never read for meaning. The page is docs/hyperv-commands.md.

A question is asked once more when its PowerShell turns out to be gone. An order is given only to a PowerShell that has answered
just now, and once: it may have been carried out, whatever is heard of it.
"""

from __future__ import annotations

import base64
import binascii
import json
import logging
import secrets
import time
from functools import cache
from importlib.resources import files
from typing import Protocol

from tokvm.core.errors import ConnectionLost, SourceError
from tokvm.core.text import readable
from tokvm.core.units import MiB
from tokvm.remote.conversation import Reply, Talk
from tokvm.remote.process import ProgramError
from tokvm.sources.hyperv.faults import Failure, HyperVError, explain
from tokvm.sources.hyperv.sessions import Session, Sessions

log = logging.getLogger(__name__)

ASK_S = 120.0  # PowerShell and its Hyper-V module take 1 to 5 s to load, on a busy host far longer
ACT_S = 300.0
AGAIN_BELOW_S = 20.0  # a question that failed sooner is asked once more: the connection broke, the host is not hanging
PING_S = 15.0  # a PowerShell that has answered before and now takes longer is replaced
MOST_ANSWER = 8 * MiB

BOOTSTRAP = """\
$ProgressPreference='SilentlyContinue'
$ErrorActionPreference='Stop'
Remove-TypeData -TypeName System.Array -ErrorAction SilentlyContinue
$utf8=New-Object System.Text.UTF8Encoding $false
$from=[Console]::In
while($null -ne ($tag=$from.ReadLine())){
$script=$from.ReadLine()
$json=$from.ReadLine()
$whole=$from.ReadLine() -ceq '@@X'
try{
if(-not $whole){throw 'TokvmCutShort'}
$code=[ScriptBlock]::Create($utf8.GetString([Convert]::FromBase64String($script)))
$data=ConvertFrom-Json -InputObject $utf8.GetString([Convert]::FromBase64String($json))
$found=@(& $code $data)
if($found.Count -ne 1){throw ('TokvmValues'+$found.Count)}
$answer=@{tag=$tag;ok=$true;value=$found[0]}
}catch{
$e=$_.Exception
while($e.InnerException){$e=$e.InnerException}
$answer=@{tag=$tag;ok=$false;type=$e.GetType().FullName;message=[string]$e.Message;hresult=[int]$e.HResult;id=[string]$_.FullyQualifiedErrorId}
}
$json=ConvertTo-Json -InputObject $answer -Depth 8 -Compress
$text=[Convert]::ToBase64String($utf8.GetBytes($json),'InsertLineBreaks')
[Console]::Out.Write("`r`n@@B`r`n"+$text+"`r`n@@E`r`n")
[Console]::Out.Flush()
if(-not $whole){break}
$Error.Clear()
}
exit 0
"""

# -InputFormat None: the input is ours. Without it PowerShell may read it as well, for $input (ConsoleHost's Executor.cs).
_OPTIONS = "-NoProfile -NonInteractive -ExecutionPolicy Bypass -InputFormat None"
COMMAND = f"powershell.exe {_OPTIONS} -EncodedCommand " + base64.b64encode(BOOTSTRAP.encode("utf-16-le")).decode("ascii")

BEGIN, END, WHOLE = b"@@B", b"@@E", b"@@X"
NO_TAG = "0" * 16

Value = dict[str, object]


class Host(Protocol):
    """What is needed of `remote.ssh.SshHost` for questions."""

    @property
    def where(self) -> str: ...

    def converse(self, command: str) -> Talk: ...


class Asking(Protocol):
    """A host that answers scripts: `PowerShell`, or a double in tests."""

    @property
    def where(self) -> str: ...

    def ask(self, script: str, data: Value, *, timeout_s: float = ...) -> Value:
        """The answer of a script that only reads. Asked once more when the connection just broke."""
        ...

    def act(self, script: str, data: Value, *, timeout_s: float = ...) -> Value:
        """The answer of a script that changes something. Never repeated: after ConnectionLost it may have worked."""
        ...


@cache
def script_text(name: str) -> str:
    """The script `scripts/NAME.ps1` as it is sent."""
    return files("tokvm.sources.hyperv.scripts").joinpath(f"{name}.ps1").read_text("utf-8")


def request(script: str, data: Value, tag: str = NO_TAG) -> bytes:
    """What goes to the bootstrap's standard input. tag: 16 hexadecimal digits, which the answer bears."""
    parts = (script.encode("utf-8"), json.dumps(data).encode("ascii"))
    return b"\n".join([tag.encode("ascii"), *(base64.b64encode(part) for part in parts), WHOLE, b""])


class PowerShell:
    """One host's PowerShell. Thread-safe."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._sessions = Sessions(lambda: host.converse(COMMAND), where=host.where)

    @property
    def where(self) -> str:
        return self._host.where

    def ask(self, script: str, data: Value, *, timeout_s: float = ASK_S) -> Value:
        begun = time.monotonic()
        with self._sessions.lend(timeout_s=timeout_s) as session:
            try:
                return self._value(session, script, data, timeout_s)
            except ConnectionLost as lost:
                if time.monotonic() - begun > AGAIN_BELOW_S:
                    raise
                log.debug("%s: %s is asked once more: %s", self.where, script, lost)
                session.renew()
                return self._value(session, script, data, timeout_s)

    def act(self, script: str, data: Value, *, timeout_s: float = ACT_S) -> Value:
        with self._sessions.lend(timeout_s=timeout_s) as session:
            if not session.is_proved:
                self._prove(session, timeout_s)
            return self._value(session, script, data, timeout_s)

    def close(self) -> None:
        """No PowerShell of ours stays on the host."""
        self._sessions.close()

    def _prove(self, session: Session, timeout_s: float) -> None:
        """Afterwards somebody is there to take an order; or what is in the way, and nothing was ordered."""
        if session.has_answered:
            try:
                self._value(session, "ping", {}, min(PING_S, timeout_s))
            except SourceError as gone:
                log.debug("%s: another PowerShell is started: %s", self.where, gone)
                session.renew()
            else:
                return
        self._value(session, "ping", {}, min(ASK_S, timeout_s))

    def _value(self, session: Session, script: str, data: Value, timeout_s: float) -> Value:
        log.debug("%s: %s %s", self.where, script, data)
        worked = session.has_answered
        answer = Answer(secrets.token_hex(8))
        sent = request(script_text(script), data, answer.tag)
        try:
            reply = session.request(sent, answer.take, timeout_s=timeout_s)
        except ProgramError as failed:
            raise confused(self.where, script, failed.what) from failed
        if reply.stderr.strip():
            log.debug("%s: %s: stderr: %s", self.where, script, readable(reply.stderr.decode("utf-8", "replace"), limit=2000))
        found = answer.found
        if found is None:
            raise self._ended(script, reply) if worked else _no_answer(self.where, script, reply)
        if isinstance(found, ValueError):
            session.renew()
            raise confused(self.where, script, str(found)) from found
        if isinstance(found, Failure):
            raise explain(found, script=script, where=self.where)
        return found

    def _ended(self, script: str, reply: Reply) -> ConnectionLost:
        """It had answered before: what is wrong with it now is not the host's way of being, and the script may have run."""
        return ConnectionLost(
            f"PowerShell ended (exit code {reply.code}) and did not run {script}.ps1 to its end, as far as is known"
            + _said(reply),
            where=self.where,
            fix="run the same command again; it asks the host first how far it got",
        )


class Answer:
    """The answer to the request with this tag, picked out of all that the host says."""

    def __init__(self, tag: str) -> None:
        self.tag = tag
        self.found: Value | Failure | ValueError | None = None
        """ValueError: it is one that the bootstrap does not write. None: there was none, or half of one."""
        self._line = bytearray()
        self._framed: bytearray | None = None

    def take(self, piece: bytes) -> bool:
        """More of what the host says. True when the answer is whole."""
        *lines, rest = piece.split(b"\n")
        for line in lines:
            self._take_line(bytes(self._line + line).strip())
            self._line.clear()
        self._line += rest
        return self.found is not None

    def _take_line(self, line: bytes) -> None:
        if line == BEGIN:
            self._framed = bytearray()
        elif self._framed is not None and self.found is None:
            if line != END:
                self._framed += line
            else:
                self.found = self._parsed(bytes(self._framed))
                self._framed = None

    def _parsed(self, framed: bytes) -> Value | Failure | ValueError | None:
        try:
            answer = _decode(framed)
            tag = answer.get("tag")
            if isinstance(tag, str) and tag != self.tag:  # what a profile printed, or half a session before this one
                log.debug("an answer to %s where %s was asked", readable(tag), self.tag)
                return None
            return _meaning(answer)
        except (ValueError, RecursionError) as exc:
            return ValueError(str(exc))


def confused(where: str, script: str, what: str) -> HyperVError:
    """An answer that makes no sense."""
    return HyperVError(
        f"the script {script}.ps1 was answered with something tokvm does not understand: {what}",
        where=where,
        fix="run with --debug to see the host's words, and report this with the Windows version",
    )


def _decode(framed: bytes) -> Value:
    """ValueError for anything that is no object in base64."""
    if len(framed) > MOST_ANSWER:
        raise ValueError(f"{len(framed)} bytes of answer; at most {MOST_ANSWER} are allowed")
    try:
        answer = json.loads(base64.b64decode(framed, validate=True).decode("utf-8"))
    except (binascii.Error, UnicodeDecodeError) as exc:
        raise ValueError(f"it is not base64 of UTF-8: {exc}") from exc
    if not isinstance(answer, dict):
        raise ValueError("it is no object")  # noqa: TRY004 - it is about the text
    return answer


def _meaning(answer: Value) -> Value | Failure:
    """ValueError for anything that the bootstrap does not write."""
    if not isinstance(answer.get("tag"), str):
        raise ValueError("it does not say which request it answers")  # noqa: TRY004 - it is about the text
    value = answer.get("value")
    if answer.get("ok") is True and isinstance(value, dict):
        return value
    if answer.get("ok") is False:
        return Failure.parse(answer)
    raise ValueError("it says neither what was found nor what failed")


def _no_answer(where: str, script: str, reply: Reply) -> SourceError:
    """The bootstrap did not get to its end: no PowerShell, a policy that forbids it, or a host that went down meanwhile."""
    return HyperVError(
        f"PowerShell did not run {script}.ps1 to its end (exit code {reply.code}){_said(reply)}",
        where=where,
        fix="the host must be Windows with OpenSSH and powershell.exe in full language mode; try: "
        f'ssh {where.removeprefix("ssh://")} powershell.exe -NoProfile -Command "Get-VM"',
    )


def _said(reply: Reply) -> str:
    said = readable((reply.stderr or reply.stdout).decode("utf-8", "replace").strip(), limit=300)
    return f": {said}" if said else ""
