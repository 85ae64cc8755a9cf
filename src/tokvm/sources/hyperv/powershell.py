"""Asking a Windows host in PowerShell, over ssh.

    ssh HOST powershell.exe … -EncodedCommand BOOTSTRAP        one constant command line, the same under cmd.exe and PowerShell
    stdin    base64(UTF-8 script) \\n  base64(UTF-8 JSON data) \\n  @@X \\n
    stdout   anything  @@B  base64(UTF-8 JSON answer), in lines  @@E  anything
    answer   {"ok": true, "value": …}    or    {"ok": false, "type", "message", "hresult", "id"}

Names and paths travel as JSON in base64: no shell, no code page and no console width touches them. Scripts are constant files
beside this module (`scripts/`); nothing is ever put into their text. Without the line @@X nothing runs: a broken connection
must not run half a request. stderr is CLIXML, in the host's language and code page: it is logged and never read for meaning.
The page is docs/hyperv-commands.md.
"""

from __future__ import annotations

import base64
import binascii
import json
import logging
import time
from functools import cache
from importlib.resources import files
from typing import Protocol

from tokvm.core.errors import ConnectionLost, SourceError
from tokvm.core.text import readable
from tokvm.core.units import MiB
from tokvm.remote.process import Completed, ProgramError
from tokvm.sources.hyperv.faults import Failure, HyperVError, explain

log = logging.getLogger(__name__)

ASK_S = 120.0  # PowerShell and its Hyper-V module take 1 to 5 s to load, on a busy host far longer
ACT_S = 300.0
AGAIN_BELOW_S = 20.0  # a question that failed sooner is asked once more: the connection broke, the host is not hanging
MOST_ANSWER = 8 * MiB

BOOTSTRAP = """\
$ProgressPreference='SilentlyContinue'
$ErrorActionPreference='Stop'
$utf8=New-Object System.Text.UTF8Encoding $false
try{
$from=[Console]::In
$script=$from.ReadLine()
$json=$from.ReadLine()
if($from.ReadLine() -cne '@@X'){throw 'TokvmCutShort'}
$code=[ScriptBlock]::Create($utf8.GetString([Convert]::FromBase64String($script)))
$data=ConvertFrom-Json -InputObject $utf8.GetString([Convert]::FromBase64String($json))
Remove-TypeData -TypeName System.Array -ErrorAction SilentlyContinue
$found=@(& $code $data)
if($found.Count -ne 1){throw ('TokvmValues'+$found.Count)}
$answer=@{ok=$true;value=$found[0]}
}catch{
$e=$_.Exception
while($e.InnerException){$e=$e.InnerException}
$answer=@{ok=$false;type=$e.GetType().FullName;message=[string]$e.Message;hresult=[int]$e.HResult;id=[string]$_.FullyQualifiedErrorId}
}
$json=ConvertTo-Json -InputObject $answer -Depth 8 -Compress
$text=[Convert]::ToBase64String($utf8.GetBytes($json),'InsertLineBreaks')
[Console]::Out.Write("`r`n@@B`r`n"+$text+"`r`n@@E`r`n")
exit 0
"""

COMMAND = "powershell.exe -NoProfile -NonInteractive -ExecutionPolicy Bypass -EncodedCommand " + base64.b64encode(
    BOOTSTRAP.encode("utf-16-le")
).decode("ascii")

BEGIN, END, WHOLE = b"@@B", b"@@E", b"@@X"

Value = dict[str, object]


class Host(Protocol):
    """What is needed of `remote.ssh.SshHost` for questions."""

    @property
    def where(self) -> str: ...

    def run_line(
        self,
        command: str,
        *,
        timeout_s: float = ...,
        check: bool = ...,
        input: bytes | None = ...,  # noqa: A002 - its name there
    ) -> Completed: ...


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


def request(script: str, data: Value) -> bytes:
    """What goes to the bootstrap's standard input."""
    parts = (script.encode("utf-8"), json.dumps(data).encode("ascii"))
    return b"\n".join([*(base64.b64encode(part) for part in parts), WHOLE, b""])


class PowerShell:
    """One host's PowerShell. Thread-safe."""

    def __init__(self, host: Host) -> None:
        self._host = host

    @property
    def where(self) -> str:
        return self._host.where

    def ask(self, script: str, data: Value, *, timeout_s: float = ASK_S) -> Value:
        begun = time.monotonic()
        try:
            return self.act(script, data, timeout_s=timeout_s)
        except ConnectionLost:
            if time.monotonic() - begun > AGAIN_BELOW_S:
                raise
            return self.act(script, data, timeout_s=timeout_s)

    def act(self, script: str, data: Value, *, timeout_s: float = ACT_S) -> Value:
        log.debug("%s: %s %s", self.where, script, data)
        try:
            done = self._host.run_line(COMMAND, timeout_s=timeout_s, check=False, input=request(script_text(script), data))
        except ProgramError as failed:
            raise confused(self.where, script, failed.what) from failed
        if done.stderr.strip():
            log.debug("%s: %s: stderr: %s", self.where, script, readable(done.stderr.decode("utf-8", "replace"), limit=2000))
        return self._value(script, done)

    def _value(self, script: str, done: Completed) -> Value:
        framed = _framed(done.stdout)
        if framed is None:
            raise _no_answer(self.where, script, done)
        try:
            answer = _parse(framed)
        except (ValueError, RecursionError) as exc:
            raise confused(self.where, script, str(exc)) from exc
        if isinstance(answer, Failure):
            raise explain(answer, script=script, where=self.where)
        return answer


def confused(where: str, script: str, what: str) -> HyperVError:
    """An answer that makes no sense."""
    return HyperVError(
        f"the script {script}.ps1 was answered with something tokvm does not understand: {what}",
        where=where,
        fix="run with --debug to see the host's words, and report this with the Windows version",
    )


def _framed(stdout: bytes) -> bytes | None:
    """What is between the last pair of our lines; None without one. What a profile or a login banner prints is around it."""
    lines = stdout.replace(b"\r", b"").split(b"\n")
    begins = [number for number, line in enumerate(lines) if line.strip() == BEGIN]
    if not begins or END not in (inside := [line.strip() for line in lines[begins[-1] + 1 :]]):
        return None
    return b"".join(inside[: inside.index(END)])


def _parse(framed: bytes) -> Value | Failure:
    """ValueError for anything that the bootstrap does not write."""
    if len(framed) > MOST_ANSWER:
        raise ValueError(f"{len(framed)} bytes of answer; at most {MOST_ANSWER} are allowed")
    try:
        answer = json.loads(base64.b64decode(framed, validate=True).decode("utf-8"))
    except (binascii.Error, UnicodeDecodeError) as exc:
        raise ValueError(f"it is not base64 of UTF-8: {exc}") from exc
    if not isinstance(answer, dict):
        raise ValueError("it is no object")  # noqa: TRY004 - it is about the text
    if answer.get("ok") is True and isinstance(answer.get("value"), dict):
        value: Value = answer["value"]
        return value
    if answer.get("ok") is False:
        return Failure.parse(answer)
    raise ValueError("it says neither what was found nor what failed")


def _no_answer(where: str, script: str, done: Completed) -> SourceError:
    """The bootstrap did not get to its end: no PowerShell, a policy that forbids it, or a host that went down meanwhile."""
    said = readable((done.stderr or done.stdout).decode("utf-8", "replace").strip(), limit=300)
    return HyperVError(
        f"PowerShell did not run {script}.ps1 to its end (exit code {done.code})" + (f": {said}" if said else ""),
        where=where,
        fix="the host must be Windows with OpenSSH and powershell.exe in full language mode; try: "
        f'ssh {where.removeprefix("ssh://")} powershell.exe -NoProfile -Command "Get-VM"',
    )
