"""/folder and leases against a real HTTPS server that answers as told: ranges, refusals, logins, certificates."""

from __future__ import annotations

import contextlib
import hashlib
import os
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tokvm.core.errors import ConnectionLost, ImageError, SourceError
from tokvm.remote.tls import CertificateRefused, TlsTrust
from tokvm.sources.vmware.api.channel import Locked
from tokvm.sources.vmware.api.folder import Folder, FolderFile
from tokvm.sources.vmware.api.web import Peer, Web
from tokvm.testing.certificates import Authority, fingerprint, server_context

PATH = "[ds 1] vm/disk-flat.vmdk"
COOKIE = 'vmware_soap_session="secret"'


class Login:
    """A session that may expire."""

    def __init__(self) -> None:
        self.number = 0
        self.renewed = 0

    def cookie(self) -> str:
        return f'vmware_soap_session="{self.number}"'

    def renew(self, cookie: str) -> None:
        if cookie == self.cookie():
            self.number += 1
            self.renewed += 1


@dataclass
class Server:
    """answer: (status, headers, body, bytes of the body to send) for a request; None: as /folder does."""

    data: bytes
    login: Login = field(default_factory=Login)
    answers: list[Callable[[Any], bool]] = field(default_factory=list)
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    connections: int = 0
    port: int = 0


def ranged(handler: Any, data: bytes) -> None:
    first, last = (int(text) for text in handler.headers["Range"].removeprefix("bytes=").split("-"))
    last = min(last, len(data) - 1)
    handler.send_response(206)
    handler.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
    handler.send_header("Content-Length", str(last - first + 1))
    handler.end_headers()
    handler.wfile.write(data[first : last + 1])


def page(status: int, text: str) -> Callable[[Any], bool]:
    def answer(handler: Any) -> bool:
        body = f"<html><head><title>Error</title><style>p {{}}</style></head><body><p>{text}</p></body></html>".encode()
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)
        return True

    return answer


def raw(status: int, headers: dict[str, str], body: bytes, *, cut: bool = False) -> Callable[[Any], bool]:
    def answer(handler: Any) -> bool:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body)
        if cut:
            handler.close_connection = True
        return True

    return answer


def hang_up(handler: Any) -> bool:
    handler.close_connection = True
    handler.connection.close()
    return True


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    made = Authority(tmp_path / "tls")
    made.server("one")
    return made


@pytest.fixture
def server(authority: Authority) -> Iterator[Server]:
    played = Server(os.urandom(5 * 4096 + 512))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            played.connections += 1
            super().setup()

        def log_message(self, *_: object) -> None: ...

        def do_GET(self) -> None:
            played.requests.append((self.path, self.headers.get("Range", ""), self.headers.get("Cookie", "")))
            if played.answers and played.answers.pop(0)(self):
                return
            if self.headers.get("Cookie") != played.login.cookie():
                page(401, "Unauthorized")(self)
            elif "Range" in self.headers:
                ranged(self, played.data)
            else:
                raw(200, {"Content-Length": str(len(played.data))}, played.data)(self)

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    httpd.handle_error = lambda *_: None  # type: ignore[method-assign]
    httpd.socket = server_context(authority.folder / "one.pem").wrap_socket(httpd.socket, server_side=True)
    played.port = httpd.server_address[1]
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield played
    httpd.shutdown()
    httpd.server_close()
    thread.join()


@pytest.fixture
def web(server: Server, authority: Authority) -> Iterator[Web]:
    made = Web(Peer("127.0.0.1", server.port, TlsTrust.of(ca_file=str(authority.certificate)), server.login), silence_s=5)
    yield made
    made.close()


@pytest.fixture
def file(web: Web) -> FolderFile:
    return Folder(web, datacenter="DC 1", twice=True).open(PATH)


def read(file: FolderFile, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    file.read_into(offset, memoryview(buffer))
    return bytes(buffer)


def test_a_file_is_read_by_ranges_and_its_last_sector_first_of_all(server: Server, file: FolderFile) -> None:
    assert file.size == len(server.data)
    assert server.requests[1][1] == f"bytes={len(server.data) - 512}-{len(server.data) - 1}"
    assert server.requests[0][0] == "/folder/vm/disk-flat.vmdk?dcPath=DC%25201&dsName=ds%25201"
    for offset, length in ((0, 1), (511, 2), (4096, 9000), (len(server.data) - 1, 1), (0, len(server.data))):
        assert read(file, offset, length) == server.data[offset : offset + length]
    assert file.is_unchanged()


def test_a_file_that_ends_before_a_read_says_so_without_asking(server: Server, file: FolderFile) -> None:
    before = len(server.requests)
    with pytest.raises(ImageError, match="ends"):
        read(file, len(server.data) - 10, 11)
    assert len(server.requests) == before


@pytest.mark.slow
def test_connections_are_used_again(server: Server, file: FolderFile) -> None:
    for _ in range(20):
        read(file, 0, 512)
    assert server.connections == 1


@pytest.mark.slow
def test_many_threads_read_at_once(server: Server, file: FolderFile) -> None:
    wrong: list[int] = []

    def work(number: int) -> None:
        for step in range(20):
            at = (number * 977 + step * 131) % (len(server.data) - 700)
            if read(file, at, 700) != server.data[at : at + 700]:
                wrong.append(at)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert server.connections <= 5


def test_a_whole_file_in_answer_to_a_range_is_refused(server: Server, file: FolderFile) -> None:
    server.answers.append(raw(200, {"Content-Length": str(len(server.data))}, server.data))
    with pytest.raises(SourceError, match="whole file"):
        read(file, 4096, 512)


ODD_RANGES = ["", "bytes 0-511/20992", "bytes 4096-4606/20992", "bytes 4096-4607/*", "bytes 4096-4607/4100"]


@pytest.mark.parametrize("said", [*ODD_RANGES, "bytes 0-4607/20992"])
@pytest.mark.slow
def test_another_range_than_the_one_asked_for_is_refused(server: Server, file: FolderFile, said: str) -> None:
    server.answers.append(raw(206, {"Content-Range": said, "Content-Length": "512"}, bytes(512)))
    with pytest.raises((SourceError, ImageError)):
        read(file, 4096, 512)


def test_an_answer_that_does_not_end_is_not_read_to_its_end(server: Server, file: FolderFile) -> None:
    """In chunks it may be of any length, whatever its Content-Range says."""
    sent: list[int] = []

    def endless(handler: Any) -> bool:
        handler.send_response(206)
        handler.send_header("Content-Range", f"bytes 4096-4607/{len(server.data)}")
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        with contextlib.suppress(OSError):
            while len(sent) < 200:
                handler.wfile.write(b"100000\r\n" + bytes(1 << 20) + b"\r\n")
                sent.append(1 << 20)
        handler.close_connection = True
        return True

    server.answers.append(endless)
    with pytest.raises(SourceError, match="more than the part"):
        read(file, 4096, 512)
    assert len(sent) < 200


@pytest.mark.parametrize("headers", [{"Connection": "close"}, {"Content-Length": "4096"}], ids=["close", "keep"])
def test_an_answer_left_unread_leaves_no_socket_open(server: Server, web: Web, headers: dict[str, str]) -> None:
    server.answers.append(raw(200, headers, bytes(100), cut=True))
    with web.get("/folder/x") as answer:
        socket: ssl.SSLSocket = vars(answer.fp.raw)["_sock"]
        assert socket.fileno() >= 0
    assert (answer.isclosed(), socket.fileno()) == (True, -1)


def test_a_file_that_changed_its_size_is_noticed(server: Server, file: FolderFile) -> None:
    server.data += b"more"
    with pytest.raises(ImageError, match="size changed"):
        read(file, 0, 512)
    assert not file.is_unchanged()


def test_a_header_that_was_written_to_is_noticed(server: Server, file: FolderFile) -> None:
    server.data = b"\xff" * 16 + server.data[16:]
    assert not file.is_unchanged()


def test_an_answer_that_breaks_off_is_a_lost_connection(server: Server, file: FolderFile) -> None:
    headers = {"Content-Range": f"bytes 0-1023/{len(server.data)}", "Content-Length": "1024"}
    server.answers.append(raw(206, headers, server.data[:100], cut=True))
    with pytest.raises(ConnectionLost):
        read(file, 0, 1024)
    assert read(file, 0, 1024) == server.data[:1024]


def test_a_connection_that_was_closed_while_it_lay_idle_is_made_again(server: Server, file: FolderFile) -> None:
    server.answers.append(hang_up)
    assert read(file, 0, 512) == server.data[:512]


def test_a_server_that_hangs_up_each_time_is_a_lost_connection(server: Server, file: FolderFile) -> None:
    server.answers += [hang_up, hang_up]
    with pytest.raises(ConnectionLost):
        read(file, 0, 512)


def test_a_silent_server_is_given_up(server: Server, authority: Authority) -> None:
    quiet = threading.Event()
    trust = TlsTrust.of(ca_file=str(authority.certificate))
    web = Web(Peer("127.0.0.1", server.port, trust, server.login), silence_s=0.3)
    server.answers.append(lambda _handler: quiet.wait(5) or True)
    with pytest.raises(ConnectionLost):
        Folder(web, datacenter="DC", twice=False).open(PATH)
    quiet.set()
    web.close()


def test_an_expired_session_is_renewed_once_and_the_read_goes_on(server: Server, file: FolderFile) -> None:
    cookie = server.login.cookie()
    server.answers.append(page(401, "Unauthorized"))
    assert read(file, 0, 512) == server.data[:512]
    assert (server.login.renewed, server.requests[-1][2] != cookie) == (1, True)


def test_who_may_not_read_files_is_told_which_privileges_that_takes(server: Server, web: Web) -> None:
    server.answers += [page(401, "no"), page(401, "no")]
    with pytest.raises(SourceError, match="401") as refused:
        Folder(web, datacenter="DC", twice=False).open(PATH)
    assert "Datastore.FileManagement" in refused.value.fix


def test_a_locked_file_is_told_by_the_words_of_the_page(server: Server, web: Web) -> None:
    server.answers.append(page(500, "Failed to open disk: NFC_FILE_LOCKED &amp; so on"))
    with pytest.raises(Locked, match="NFC_FILE_LOCKED & so on"):
        Folder(web, datacenter="DC", twice=False).open(PATH)
    server.answers.append(page(500, "something else broke"))
    with pytest.raises(SourceError, match="something else") as other:
        Folder(web, datacenter="DC", twice=False).open(PATH)
    assert not isinstance(other.value, Locked)


def test_a_lock_that_shows_at_the_last_sector_only_is_seen(server: Server, web: Web) -> None:
    server.answers += [lambda _: False, page(500, "NFC_FILE_LOCKED")]
    with pytest.raises(Locked):
        Folder(web, datacenter="DC", twice=False).open(PATH)


@pytest.mark.parametrize(
    ("status", "kind"), [(404, SourceError), (503, ConnectionLost), (302, SourceError), (204, SourceError)]
)
def test_other_answers_are_refused(server: Server, web: Web, status: int, kind: type[Exception]) -> None:
    server.answers.append(page(status, "x") if status != 204 else raw(204, {}, b""))
    with pytest.raises(kind):
        Folder(web, datacenter="DC", twice=False).open(PATH)


def test_a_descriptor_is_read_whole_and_a_huge_one_is_not(server: Server, web: Web) -> None:
    folder = Folder(web, datacenter="DC", twice=False)
    assert folder.read_text("[ds] vm/disk.vmdk") == server.data
    assert server.requests[-1][1] == ""
    server.data = bytes(2 << 20)
    with pytest.raises(ImageError, match="larger"):
        folder.read_text("[ds] vm/disk.vmdk")


# ---- whom we talk to


def open_with(trust: TlsTrust, server: Server) -> FolderFile:
    web = Web(Peer("127.0.0.1", server.port, trust, server.login), silence_s=5)
    try:
        return Folder(web, datacenter="DC", twice=False).open(PATH)
    finally:
        web.close()


def test_a_pinned_certificate_is_enough(server: Server, authority: Authority) -> None:
    pin = fingerprint(authority.folder / "one.pem")
    assert open_with(TlsTrust.of(fingerprints=(pin,)), server).size == len(server.data)
    assert open_with(TlsTrust(pins=frozenset({"00" * 32})).with_pin(fingerprint(authority.folder / "one.pem", "sha1")), server)


def test_nothing_is_sent_to_a_server_with_another_certificate(server: Server, authority: Authority, tmp_path: Path) -> None:
    other = Authority(tmp_path / "other")
    pin = hashlib.sha256(b"another").hexdigest()
    for trust in (TlsTrust.of(fingerprints=(pin,)), TlsTrust.of(ca_file=str(other.certificate)), TlsTrust()):
        with pytest.raises(CertificateRefused) as refused:
            open_with(trust, server)
        assert fingerprint(authority.folder / "one.pem") in refused.value.what
        assert "--tls-fingerprint" in refused.value.fix
    assert server.requests == []


def test_a_certificate_for_another_name_is_refused(server: Server, authority: Authority) -> None:
    trust = TlsTrust.of(ca_file=str(authority.certificate))
    web = Web(Peer("127.0.0.2", server.port, trust, server.login), silence_s=5)
    with pytest.raises((CertificateRefused, ConnectionLost)):
        Folder(web, datacenter="DC", twice=False).open(PATH)
    assert server.requests == []


def test_a_peer_without_a_login_gets_no_cookie(server: Server, authority: Authority) -> None:
    web = Web(Peer("127.0.0.1", server.port, TlsTrust.of(ca_file=str(authority.certificate))), silence_s=5)
    with pytest.raises(SourceError, match="401"):
        Folder(web, datacenter="DC", twice=False).open(PATH)
    assert [cookie for _, _, cookie in server.requests] == [""]
    web.close()
