"""PowerShell over WinRM, against a service that speaks WS-Management and PSRP: logins, trust, lost connections, nonsense."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pypsrp.encryption import WinRMEncryption
from tests.sources.test_hyperv_scripts import PAGE, errors

from tokvm.core.errors import ConnectionLost, SourceError, UsageError
from tokvm.remote.recording import recording
from tokvm.remote.tls import CertificateRefused, TlsTrust
from tokvm.sources.hyperv import powershell, psrp, winrm
from tokvm.sources.hyperv.faults import Fault, HyperVError
from tokvm.sources.hyperv.powershell import PowerShell
from tokvm.sources.hyperv.psrp import WinrmHost
from tokvm.sources.hyperv.winrm import WinrmConfig, WinrmPlace
from tokvm.testing.certificates import Authority, fingerprint
from tokvm.testing.hyperv import winrm_server
from tokvm.testing.hyperv.host import HostOptions, HyperVHost, MachineSpec, build_host
from tokvm.testing.hyperv.winrm_server import DENIED, PASSWORD, USER, WinrmServer

pytestmark = pytest.mark.slow

NAME = "te'st “ü” [1] $(reboot)\n中文 ]]> & \\x5f_x000A_"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture
def host(tmp_path: Path) -> Iterator[HyperVHost]:
    with build_host(tmp_path / "host", machines=[MachineSpec(NAME)], options=HostOptions(banner=True)) as made:
        yield made


@pytest.fixture(params=["https", "http"])
def server(request: pytest.FixtureRequest, host: HyperVHost, authority: Authority, tmp_path: Path) -> Iterator[WinrmServer]:
    certificate = authority.server("hv1") if request.param == "https" else None
    with WinrmServer(host, tmp_path / "winrm", certificate=certificate) as made:
        yield made
        assert host.violations() == []


@pytest.fixture
def secure(host: HyperVHost, authority: Authority, tmp_path: Path) -> Iterator[WinrmServer]:
    with WinrmServer(host, tmp_path / "winrm", certificate=authority.server("hv1")) as made:
        yield made


def config(server: WinrmServer, authority: Authority, **changed: Any) -> WinrmConfig:
    tls = server.binding is not None
    trust = TlsTrust.of(ca_file=str(authority.certificate)) if tls else TlsTrust()
    known = {"port": server.port, "trust": trust, "tls": tls, "where": "hyperv+winrm://hv1", "silence_s": 10.0}
    return WinrmConfig(**{"host": server.address, "user": USER, "password": PASSWORD, **known, **changed})


@pytest.fixture
def shell(server: WinrmServer, authority: Authority) -> Iterator[PowerShell]:
    made = PowerShell(WinrmHost(config(server, authority)))
    yield made
    made.close()


def test_one_shell_answers_question_after_question(shell: PowerShell, server: WinrmServer, host: HyperVHost) -> None:
    for _ in range(3):
        listed = shell.ask("list", {})
        assert listed == {"host": "HV1", "machines": [{"id": host.id(NAME), "name": NAME, "state": 2}]}
    assert shell.ask("inspect", {"vm": host.id(NAME)})["name"] == NAME
    assert shell.act("start", {"vm": host.id(NAME)}) == {"state": 2}
    assert server.opened == 1
    shell.close()
    assert len(server.closed) == 1
    assert server.shells == {}


def test_hostile_texts_pass_unharmed(shell: PowerShell, host: HyperVHost) -> None:
    line = '{"v":1,"owner":"\' \\" $(reboot) `x` ]]> &amp; _x000A_ \\u00e4\\ud800"}'
    data: dict[str, object] = {"vm": host.id(NAME), "expect": None, "write": line}
    assert shell.act("record", data)["record"] == line
    assert shell.act("checkpoint", {"vm": host.id(NAME), "mark": NAME, "types": ["Production"]})["checkpoints"]
    assert host.checkpoints(NAME)[0]["name"] == NAME


def test_a_failure_is_data(shell: PowerShell, host: HyperVHost) -> None:
    with pytest.raises(HyperVError) as failed:
        shell.ask("power", {"vm": "11111111-1111-4111-8111-111111111111"})
    assert failed.value.fault is Fault.NO_SUCH_VM
    host.fault(
        "start", "error", type="System.IO.IOException", hresult=-2147024864, id="IOException", message="\x1b[31mwird verwendet"
    )
    with pytest.raises(HyperVError) as failed:
        shell.act("start", {"vm": host.id(NAME)})
    assert failed.value.fault is Fault.IN_USE
    assert "\x1b" not in str(failed.value)


def test_the_bootstrap_does_what_the_one_over_ssh_does() -> None:
    """Whoever changes one must change the other: from the script to the answer they are the same lines."""
    lines = psrp.BOOTSTRAP.splitlines()
    begin = next(number for number, line in enumerate(lines) if line.startswith("$code="))
    end = next(number for number, line in enumerate(lines) if line.startswith("$json="))
    assert end - begin == 10
    assert "\n".join(lines[begin : end + 1]) in powershell.BOOTSTRAP


def test_the_bootstrap_parses_and_stands_on_the_page() -> None:
    assert errors(psrp.BOOTSTRAP) == []
    assert psrp.BOOTSTRAP in PAGE.read_text(encoding="utf-8")


def test_a_question_is_asked_once_more_and_an_order_is_not(shell: PowerShell, host: HyperVHost) -> None:
    assert shell.ask("list", {})
    host.fault("list", "lost_reply")
    assert shell.ask("list", {})["machines"]
    host.fault("start", "lost_reply", times=0)
    with pytest.raises(ConnectionLost):
        shell.act("start", {"vm": host.id(NAME)})
    assert host.commands().count("start") == 1


@pytest.mark.parametrize("kind", ["drop", "lost_reply", "late"])
def test_a_connection_that_breaks_under_an_order(shell: PowerShell, host: HyperVHost, kind: str) -> None:
    host.fault("checkpoint", kind, seconds=0.1)
    with pytest.raises(ConnectionLost) as lost:
        shell.act("checkpoint", {"vm": host.id(NAME), "mark": "tokvm-x", "types": ["Production"]})
    assert "run the same command again" in lost.value.fix
    assert shell.ask("list", {})  # the next one has a new connection


def test_shells_that_the_host_forgot_are_made_anew(shell: PowerShell, server: WinrmServer, host: HyperVHost) -> None:
    assert shell.ask("list", {})
    server.forget_shells()
    assert shell.ask("list", {})
    assert server.opened == 2


def test_an_order_goes_to_a_shell_that_is_there(
    shell: PowerShell, server: WinrmServer, host: HyperVHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokvm.sources.hyperv.sessions.PROVED_S", 0.0)
    assert shell.ask("list", {})
    server.forget_shells()
    server.cut_connections()
    assert shell.act("start", {"vm": host.id(NAME)}) == {"state": 2}
    assert host.commands().count("start") == 1


def test_an_answer_counts_though_the_connection_breaks_behind_it(
    shell: PowerShell, server: WinrmServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_shell: object) -> None:
        server.cut_connections()
        raise ConnectionResetError

    with monkeypatch.context() as patch:
        patch.setattr("pypsrp.powershell.PowerShell.close", broken)
        assert shell.ask("list", {})
    assert shell.ask("list", {})
    assert server.opened == 2


def test_a_host_that_is_slow_to_begin(server: WinrmServer, authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winrm, "OPERATION_S", 1)
    server.slow_to_open_s = 2.5
    shell = PowerShell(WinrmHost(config(server, authority)))
    assert shell.ask("list", {})
    shell.close()


def test_a_script_that_takes_its_time(shell: PowerShell, host: HyperVHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winrm, "OPERATION_S", 1)
    host.fault("list", "wait", seconds=2.5)
    assert shell.ask("list", {}, timeout_s=30)


def test_a_script_that_never_answers_is_given_up_in_time(server: WinrmServer, authority: Authority, host: HyperVHost) -> None:
    shell = PowerShell(WinrmHost(config(server, authority)))
    assert shell.ask("list", {})
    host.fault("list", "wait", seconds=20)
    begun = time.monotonic()
    with pytest.raises(ConnectionLost, match="within 2 s"):
        shell.act("list", {}, timeout_s=2)
    assert time.monotonic() - begun < 6
    shell.close()
    assert server.closed == []  # what may still run is not killed


@pytest.mark.parametrize(("kind", "says"), [("crash", "to its end"), ("no_answer", "0 values")])
def test_no_answer_at_all(shell: PowerShell, host: HyperVHost, kind: str, says: str) -> None:
    host.fault("list", kind, times=0)
    with pytest.raises(SourceError, match=says):
        shell.ask("list", {})


def test_a_wrong_login_is_no_lost_connection(server: WinrmServer, authority: Authority) -> None:
    for changed in ({"password": "wrong"}, {"user": "nobody"}):
        shell = PowerShell(WinrmHost(config(server, authority, **changed)))
        with pytest.raises(SourceError, match="refused the login") as refused:
            shell.ask("list", {})
        assert not isinstance(refused.value, ConnectionLost)
        assert PASSWORD not in str(refused.value)
        shell.close()
    assert server.opened == 0


def test_a_user_without_rights(server: WinrmServer, authority: Authority) -> None:
    server.denies = DENIED
    shell = PowerShell(WinrmHost(config(server, authority)))
    with pytest.raises(HyperVError) as refused:
        shell.ask("list", {})
    assert refused.value.fault is Fault.ACCESS_DENIED
    shell.close()


# Whom we trust


def test_only_the_right_certificate_is_talked_to(secure: WinrmServer, authority: Authority, tmp_path: Path) -> None:
    pinned = fingerprint(authority.server("hv1"))
    other = Authority(tmp_path / "other").certificate
    right = [TlsTrust.of(ca_file=str(authority.certificate)), TlsTrust.of(fingerprints=(pinned,))]
    wrong = [TlsTrust(), TlsTrust.of(ca_file=str(other)), TlsTrust.of(fingerprints=("00" * 32,))]
    for trust in right:
        host = WinrmHost(config(secure, authority, trust=trust))
        assert host.fingerprint().removeprefix("SHA256:") == pinned.replace(":", "").lower()
        shell = PowerShell(host)
        assert shell.ask("list", {})
        shell.close()
    opened = secure.opened
    for trust in wrong:
        host = WinrmHost(config(secure, authority, trust=trust))
        for reach in (host.fingerprint, lambda host=host: PowerShell(host).ask("list", {})):
            with pytest.raises(CertificateRefused) as refused:
                reach()
            assert pinned in str(refused.value)
            assert "--tls-fingerprint" in refused.value.fix
    assert secure.opened == opened


def test_a_name_that_is_not_the_certificates(host: HyperVHost, authority: Authority, tmp_path: Path) -> None:
    certificate = authority.server("another", hosts=("DNS:another.example",))
    with WinrmServer(host, tmp_path / "winrm", certificate=certificate) as server, pytest.raises(CertificateRefused):
        PowerShell(WinrmHost(config(server, authority))).ask("list", {})


def test_a_login_is_bound_to_the_certificate(secure: WinrmServer, authority: Authority) -> None:
    """Whoever sits between us and the host with a certificate that we trust cannot pass our login on."""
    secure.binding = b"tls-server-end-point:" + bytes(32)
    with pytest.raises(SourceError, match="refused the login"):
        PowerShell(WinrmHost(config(secure, authority))).ask("list", {})


def test_over_http_nothing_is_sent_in_clear(host: HyperVHost, authority: Authority, tmp_path: Path) -> None:
    with WinrmServer(host, tmp_path / "winrm", certificate=None) as server, _Tap(server.port) as tap:
        shell = PowerShell(WinrmHost(config(server, authority, port=tap.port)))
        shell.ask("list", {})
        shell.close()
        assert b"HTTP-SPNEGO-session-encrypted" in tap.heard
        assert b"Envelope" not in tap.heard
        assert b"Basic" not in tap.heard


@pytest.mark.parametrize("code", [200, 500, 503])
def test_over_http_an_answer_in_clear_is_not_believed(
    host: HyperVHost, authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """Who sits between us and the host can let the login pass, and then answer himself: that the VM is off, say."""
    with WinrmServer(host, tmp_path / "winrm", certificate=None) as server:
        shell = PowerShell(WinrmHost(config(server, authority)))
        assert shell.ask("list", {})
        reply, asked = winrm_server._Connection._reply, []

        def in_clear(self: Any, status: int, body: bytes, *, login: str = "", kind: str = "") -> None:
            if not kind.startswith("multipart"):
                reply(self, status, body, login=login, **({"kind": kind} if kind else {}))
                return
            asked.append(body)
            reply(self, code, opened[-1])  # what the host said last

        opened: list[bytes] = []
        seal = WinRMEncryption.wrap_message

        def remembered(self: Any, text: bytes) -> Any:
            opened.append(text)
            return seal(self, text)

        monkeypatch.setattr(WinRMEncryption, "wrap_message", remembered)
        monkeypatch.setattr(winrm_server._Connection, "_reply", in_clear)
        with pytest.raises(SourceError, match="in clear"):
            shell.ask("list", {})
        assert asked
        shell.close()


def test_a_redirection_is_not_followed_and_a_proxy_not_used(secure: WinrmServer, authority: Authority) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "HTTP_PROXY", "http_proxy"):
            patch.setenv(name, "http://127.0.0.1:9")
        shell = PowerShell(WinrmHost(config(secure, authority)))
        assert shell.ask("list", {})
        shell.close()
    elsewhere: list[bytes] = []
    with _Peer(lambda peer: elsewhere.append(peer.recv(1))) as other:
        answer = b"HTTP/1.1 307 x\r\nLocation: http://127.0.0.1:%d/wsman\r\nContent-Length: 0\r\n\r\n" % other.port
        assert isinstance(_asked_of(answer, authority), ConnectionLost)
    assert elsewhere == []


# Bytes that are no answer


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 500 x\r\nContent-Length: 3\r\n\r\n<a>",
        b"HTTP/1.1 200 OK\r\nContent-Length: 24\r\n\r\n<!DOCTYPE a><a>&b;</a>\r\n",
        b"HTTP/1.1 401 x\r\nWWW-Authenticate: Basic realm=x\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 401 x\r\nWWW-Authenticate: Negotiate !!!\r\nContent-Length: 0\r\n\r\n",
        b'HTTP/1.1 200 OK\r\nContent-Type: multipart/encrypted;boundary="x"\r\nContent-Length: 4\r\n\r\nabcd',
        b"",
    ],
)
def test_nonsense_is_told_and_nothing_else(answer: bytes, authority: Authority) -> None:
    told = _asked_of(answer, authority)
    assert isinstance(told, SourceError)
    assert told.fix


def test_an_endless_answer_ends(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winrm, "MOST_RECEIVED", 1 << 20)
    begin = b"HTTP/1.1 200 OK\r\nContent-Length: 999999999999\r\n\r\n"
    assert "more than" in str(_asked_of(begin, authority, more=b"x" * 65536))


def test_a_silent_host_is_given_up(authority: Authority) -> None:
    begun = time.monotonic()
    assert isinstance(_asked_of(None, authority, silence_s=3.0), ConnectionLost)
    assert time.monotonic() - begun < 8


def _asked_of(answer: bytes | None, authority: Authority, *, more: bytes = b"", silence_s: float = 10.0) -> SourceError:
    """What becomes of a question to a host that answers every request with this. None: with nothing at all."""
    with _Peer(lambda peer: _answer(peer, answer, more)) as peer:
        where = WinrmConfig(
            "127.0.0.1", USER, PASSWORD, peer.port, TlsTrust(), silence_s, tls=False, where="hyperv+winrm://hv1"
        )
        talk = psrp.PsrpTalk(where)
        with pytest.raises(SourceError) as told:
            talk.request(powershell.request("", {}, "00" * 8), lambda _: True, timeout_s=20)
        talk.close()
        return told.value


def _answer(peer: socket.socket, answer: bytes | None, more: bytes) -> None:
    while peer.recv(1 << 16):
        if answer is None:
            continue
        peer.sendall(answer)
        while more:
            peer.sendall(more)
        if not answer:
            return


class _Peer:
    """A listener on loopback; `serve` is given each connection."""

    def __init__(self, serve: Callable[[socket.socket], None]) -> None:
        self._serve = serve
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])

    def _loop(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._one, args=(peer,), daemon=True).start()

    def _one(self, peer: socket.socket) -> None:
        with peer:
            try:
                self._serve(peer)
            except OSError:
                return

    def __enter__(self) -> _Peer:
        threading.Thread(target=self._loop, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()


class _Tap(_Peer):
    """Passes connections on to a port, and hears what is said in both directions."""

    def __init__(self, port: int) -> None:
        super().__init__(self._through)
        self._to = port
        self.heard = b""

    def _through(self, near: socket.socket) -> None:
        with socket.create_connection(("127.0.0.1", self._to)) as far:
            back = threading.Thread(target=self._pass, args=(far, near), daemon=True)
            back.start()
            self._pass(near, far)

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                self.heard += data
                sink.sendall(data)
        except OSError:
            return

    def __enter__(self) -> _Tap:
        super().__enter__()
        return self


# What is told of it


def test_secrets_are_in_no_transcript_and_in_no_log(
    server: WinrmServer, authority: Authority, host: HyperVHost, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with recording(tmp_path / "T", verb="ls", typed=["tokvm"]) as recorder:
        reached = WinrmHost(config(server, authority), recorder)
        shell = PowerShell(reached)
        shell.ask("list", {})
        shell.act("record", {"vm": host.id(NAME), "expect": None, "write": f"somebody left it here: {PASSWORD}"})
        host.fault("start", "lost_reply")
        with pytest.raises(ConnectionLost):
            shell.act("start", {"vm": host.id(NAME)})
        shell.close()
    (path,) = (tmp_path / "T").glob("*.jsonl")
    events = [json.loads(line) for line in path.read_text(encoding="ascii").splitlines()]
    sent = [event for event in events if event["event"] == "sent"]
    assert [event["kind"] for event in sent] == ["request"] * len(sent)
    assert sent[0]["command"].startswith("param($tag")
    answers = [event for event in events if event["event"] == "ended"]
    assert host.id(NAME) in str(answers[0]["stdout_decoded"])
    assert answers[-1]["error"]["class"] == "ConnectionLost"
    assert "REMOVED" in path.read_text(encoding="ascii")
    for text in (path.read_text(encoding="ascii"), repr(config(server, authority))):
        assert PASSWORD not in text
        assert json.dumps(PASSWORD)[1:-1] not in text
        assert json.dumps(json.dumps(PASSWORD)[1:-1])[1:-1] not in text
    assert {record.name.partition(".")[0] for record in caplog.records} == {"tokvm"}  # no library's words, which hold logins


# Where it is


@pytest.mark.parametrize(
    ("text", "expected", "where"),
    [
        ("hv1", ("Administrator", "hv1", 5986, 445), "hyperv+winrm://Administrator@hv1:5986"),
        ("u@hv1.example:5985", ("u", "hv1.example", 5985, 445), "hyperv+winrm://u@hv1.example:5985"),
        ("DOM%5Cadmin@hv1/", ("DOM\\admin", "hv1", 5986, 445), "hyperv+winrm://DOM%5Cadmin@hv1:5986"),
        ("DOM\\admin@hv1", ("DOM\\admin", "hv1", 5986, 445), "hyperv+winrm://DOM%5Cadmin@hv1:5986"),
        ("a%40b@[fe80::1]:77?smb=1445", ("a@b", "fe80::1", 77, 1445), "hyperv+winrm://a%40b@[fe80::1]:77?smb=1445"),
    ],
)
def test_a_place(text: str, expected: tuple[str, str, int, int], where: str) -> None:
    place = WinrmPlace.parse(text, user="Administrator")
    assert (place.user, place.host, place.port, place.smb_port) == expected
    assert place.where == where
    assert WinrmPlace.parse(where.removeprefix("hyperv+winrm://"), user="x") == place


@pytest.mark.parametrize(
    "text", ["", "u@", "u:pw@hv1", "u%3Apw@hv1", "hv1:0", "hv1:99999", "hv1/x", "-hv1", "hv 1", "u%0a@hv1", "hv1?x=1"]
)
def test_no_place(text: str) -> None:
    with pytest.raises(UsageError):
        WinrmPlace.parse(text, user="Administrator")


def test_plain_http_has_no_certificate_to_trust() -> None:
    place = WinrmPlace.parse("hv1:5985", user="x")
    assert place.config("pw", TlsTrust(), silence_s=1).tls is False
    assert WinrmPlace.parse("hv1:5986", user="x").config("pw", TlsTrust(), silence_s=1).tls is True
    assert WinrmPlace.parse("hv1:80", user="x").config("pw", TlsTrust(), silence_s=1).tls is True
    for trust in (TlsTrust.of(ca_file="/x"), TlsTrust.of(fingerprints=("00" * 32,))):
        with pytest.raises(UsageError, match="no TLS"):
            place.config("pw", trust, silence_s=1)


def test_the_environment_is_left_as_it_was() -> None:
    assert "NTLM_USER_FILE" not in os.environ
