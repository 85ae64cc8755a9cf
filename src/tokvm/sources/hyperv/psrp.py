"""PowerShell over WinRM (PSRP), for `powershell.PowerShell`: the same scripts and data, the same answers, another wire.

    request  tag, base64(script), base64(JSON)  ─►  three strings, the arguments of BOOTSTRAP in a runspace that stays
    answer   one string, base64(JSON)           ─►  framed as powershell.Answer takes it

    WinrmHost.converse ─► PsrpTalk: one WSMan shell (a wsmprovhost.exe on the host), one runspace, one request at a time

Nothing else of PSRP's objects is believed: an answer that is not exactly one string is none. A shell whose request did not end
is left alone: to delete it would kill an order half-way. The host ends it by itself after IDLE_S.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from typing import TYPE_CHECKING, Any

from pypsrp.complex_objects import PSInvocationState
from pypsrp.exceptions import WSManFaultError
from pypsrp.powershell import PowerShell, RunspacePool

from tokvm.core.errors import ConnectionLost, SourceError
from tokvm.core.text import readable
from tokvm.remote.conversation import IsWhole, Reply, Talk
from tokvm.sources.hyperv import winrm_errors
from tokvm.sources.hyperv.faults import HyperVError
from tokvm.sources.hyperv.powershell import BEGIN, END, WHOLE
from tokvm.sources.hyperv.winrm import TooLate, WinrmConfig, Wsman, certificate
from tokvm.sources.hyperv.winrm_errors import ANY, NOTHING_YET

if TYPE_CHECKING:
    from tokvm.remote.recording import Exchange, Recorder

log = logging.getLogger(__name__)

IDLE_S = 600  # a shell that nobody asks anything any more; longer than the longest order of ours is watched for
CLOSE_S = 5.0

# The inside of powershell.BOOTSTRAP, with arguments for its standard input, and a value for its standard output.
BOOTSTRAP = """\
param($tag,$script,$json)
$ProgressPreference='SilentlyContinue'
$ErrorActionPreference='Stop'
Remove-TypeData -TypeName System.Array -ErrorAction SilentlyContinue
$utf8=New-Object System.Text.UTF8Encoding $false
try{
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
$Error.Clear()
[Convert]::ToBase64String($utf8.GetBytes($json))
"""


class WinrmHost:
    """Implements `source.Reached`."""

    def __init__(self, config: WinrmConfig, recorder: Recorder | None = None) -> None:
        self.config = config
        self._recorder = recorder
        if recorder is not None:
            recorder.hide(config.password)

    @property
    def where(self) -> str:
        return self.config.where

    def converse(self, command: str) -> Talk:
        """A new shell, made when it is first asked. command: ssh's way of starting PowerShell, of no use here."""
        return PsrpTalk(self.config) if self._recorder is None else RecordedPsrp(self.config, self._recorder)

    def fingerprint(self) -> str:
        """`SHA256:…` of the certificate that the host proved to have; "" without TLS."""
        return f"SHA256:{hashlib.sha256(certificate(self.config)).hexdigest()}" if self.config.tls else ""

    def close(self) -> None:
        """Nothing is kept here: each conversation has its own connection."""


class _Pool(RunspacePool):
    """One whose opening may take a while: a busy host is slow to start a wsmprovhost.exe."""

    def _receive(self, id: str | None = None, timeout: int | None = None) -> list[tuple[int, Any]]:  # noqa: A002 - its name
        try:
            return super()._receive(id, timeout)
        except WSManFaultError as fault:
            if fault.code != NOTHING_YET:
                raise
            return []


class PsrpTalk:
    """One shell with one runspace. One thread at a time. See `remote.conversation.Talk`."""

    def __init__(self, config: WinrmConfig) -> None:
        self._config = config
        self._wsman: Wsman | None = None
        self._pool: RunspacePool | None = None
        self._over = False
        self._busy = False

    @property
    def is_over(self) -> bool:
        return self._over

    def request(self, data: bytes, is_whole: IsWhole, *, timeout_s: float) -> Reply:
        """Run one request of `powershell.request`.

        ConnectionLost when no answer came in time or the connection broke: it may have been carried out. SourceError when the
        host refused to do it, or answered nonsense.
        """
        if self._over:
            raise ConnectionLost("the conversation is over", where=self._config.where)
        self._over = self._busy = True  # until it is answered, whatever happens in between
        worked = self._pool is not None
        try:
            text, stderr = self._run(data, timeout_s)
        except SourceError:
            raise
        except TooLate as exc:
            raise self._late(timeout_s) from exc
        except ANY as exc:
            raise self._explained(exc, worked=worked) from exc
        framed = b"\n".join((b"", BEGIN, text, END, b""))
        if not is_whole(framed):
            raise HyperVError(
                "a script was answered with what belongs to no request of ours",
                where=self._config.where,
                fix="run with -vv to see the host's words, and report this with the Windows version",
            )
        self._over = self._busy
        return Reply(framed, stderr)

    def close(self) -> None:
        """Tell the host that nobody needs the shell any more."""
        self._over = True
        if self._wsman is None:
            return
        if self._pool is not None and not self._busy:
            self._wsman.give(CLOSE_S)
            with contextlib.suppress(*ANY):
                self._pool.close()
        self._wsman.close()
        self._wsman = self._pool = None

    def _run(self, data: bytes, timeout_s: float) -> tuple[bytes, bytes]:
        """(the answer in base64, what PowerShell said of errors)"""
        pool = self._opened(timeout_s)
        shell = PowerShell(pool).add_script(BOOTSTRAP, use_local_scope=True)
        for argument in _arguments(data):
            shell.add_argument(argument)
        shell.begin_invoke()
        while shell.state == PSInvocationState.RUNNING:
            shell.poll_invoke()
        said = " ".join(readable(str(record), limit=500) for record in shell.streams.error).encode()
        if shell.state != PSInvocationState.COMPLETED:
            raise self._broken_off(shell.state, said.decode())
        text = _one_string(shell.output)
        self._busy = False
        self._forget(shell)
        return text, said

    def _opened(self, timeout_s: float) -> RunspacePool:
        if self._wsman is None:
            self._wsman = Wsman(self._config)
        self._wsman.give(timeout_s)
        if self._pool is None:
            pool = _Pool(self._wsman, idle_timeout=IDLE_S)
            pool.open()
            self._pool = pool
        return self._pool

    def _forget(self, shell: PowerShell) -> None:
        """Let the host forget the pipeline. The answer is here already: a failure ends the session and nothing else."""
        try:
            shell.close()
        except ANY as exc:
            log.debug("%s: a pipeline could not be closed: %s", self._config.where, exc)
            self._busy = True

    def _broken_off(self, state: int, said: str) -> SourceError:
        if state == PSInvocationState.FAILED:
            return HyperVError(
                f"PowerShell did not run the script to its end{': ' + said if said else ''}",
                where=self._config.where,
                fix="the host must offer powershell in full language mode; try Enter-PSSession to it",
            )
        return ConnectionLost(
            "the host stopped the script, as far as is known",
            where=self._config.where,
            fix="run the same command again; it asks the host first how far it got",
        )

    def _late(self, timeout_s: float) -> ConnectionLost:
        return ConnectionLost(
            f"a script did not answer within {timeout_s:g} s",
            where=self._config.where,
            fix="run the same command again; it asks the host first how far it got",
        )

    def _explained(self, exc: BaseException, *, worked: bool) -> SourceError:
        host, port, where = self._config.host, self._config.port, self._config.where
        return winrm_errors.explained(exc, worked=worked, doing="running a script", host=host, port=port, where=where)


class RecordedPsrp(PsrpTalk):
    """One that writes down what it does."""

    def __init__(self, config: WinrmConfig, recorder: Recorder) -> None:
        super().__init__(config)
        self._recorder = recorder

    def request(self, data: bytes, is_whole: IsWhole, *, timeout_s: float) -> Reply:
        from tokvm.remote.recording import Kind

        exchange: Exchange = self._recorder.sent(Kind.REQUEST, self._config.where, BOOTSTRAP, stdin=data)
        try:
            reply = super().request(data, is_whole, timeout_s=timeout_s)
        except BaseException as error:
            exchange.failed(error)
            raise
        exchange.ended(code=reply.code, stdout=reply.stdout, stderr=reply.stderr)
        return reply


def _arguments(data: bytes) -> list[str]:
    """(tag, script, JSON), the last two in base64, of what `powershell.request` makes."""
    *arguments, whole, rest = data.decode("ascii").split("\n")
    if len(arguments) != 3 or whole.encode() != WHOLE or rest:
        raise AssertionError("powershell.request has another form")
    return arguments


def _one_string(output: list[object]) -> bytes:
    if len(output) != 1 or not isinstance(output[0], str):
        kinds = ", ".join(type(one).__name__ for one in output[:5])
        raise ValueError(f"{len(output)} values ({kinds}) where one string was expected")
    return output[0].encode("ascii")
