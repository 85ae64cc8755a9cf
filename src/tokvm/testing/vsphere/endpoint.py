"""The played vSphere itself: what is asked over HTTPS, checked, hurt as planned, done, answered.

    exchange ─┬─ POST /sdk ─► call ─ log ─ faults ─ session ─ licence, privilege ─ table.ROWS ─► reply | fault
              ├─ GET /folder/…  folder.py
              └─ GET /nfc/…     leases.py

What has no row is MethodNotFound, and noted as a violation: whoever sent it must not rely on it.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pyVmomi import vim, vmodl

from tokvm.testing.certificates import fingerprint
from tokvm.testing.vsphere import faults, soap, table
from tokvm.testing.vsphere.clock import Clock
from tokvm.testing.vsphere.collector import Collector, gone
from tokvm.testing.vsphere.folder import Folder
from tokvm.testing.vsphere.ground import Ground
from tokvm.testing.vsphere.inventory import Inventory
from tokvm.testing.vsphere.leases import Leases
from tokvm.testing.vsphere.listener import Cut, Exchange
from tokvm.testing.vsphere.options import Options, Store
from tokvm.testing.vsphere.permissions import check_allowed
from tokvm.testing.vsphere.sessions import Session, Sessions
from tokvm.testing.vsphere.tasks import Pace, Tasks
from tokvm.testing.vsphere.tracking import Tracker

OPEN = frozenset({"RetrieveServiceContent", "Login", "CurrentTime"})
Hit = Mapping[str, faults.Fault]


class Endpoint:
    """One process's (or thread's) worth of vSphere: sessions, tasks and leases die with it."""

    def __init__(self, folder: Path, host: Path) -> None:
        """folder: our state directory. host: the played ESXi host's."""
        self.store: Store = Store(folder)
        self.ground = Ground(host)
        self.clock = Clock(folder)
        self.sessions = Sessions(self.clock)
        self.tasks = Tasks(self.clock, self._task_failed)
        self.tracker = Tracker(self.store, self.ground)
        self.leases = Leases(self)
        self.inventory = Inventory(self)
        self.collector = Collector(self.inventory)
        self.folder = Folder(self)
        self.ending = threading.Event()
        self._local = threading.local()

    @property
    def options(self) -> Options:
        return self.store.read()["options"]

    def close(self) -> None:
        self.ending.set()
        self.tasks.close()

    def answer(self, exchange: Exchange) -> None:
        try:
            self._route(exchange)
        except (Cut, OSError):
            raise
        except Exception as exc:  # noqa: BLE001  a defect of ours is no answer of a vSphere: whoever runs the test must see it
            self.violation(exchange.raw_path, f"the endpoint itself failed: {exc!r}\n{''.join(traceback.format_exc())[-2000:]}")
            exchange.send(500, b"")

    def _route(self, exchange: Exchange) -> None:
        if exchange.verb == "POST" and exchange.raw_path in ("/sdk", "/sdk/"):
            self._answer_call(exchange)
        elif exchange.verb == "GET" and exchange.raw_path == "/sdk/vimServiceVersions.xml":
            versions = soap.service_versions(self.options["api_version"])
            exchange.send(200, versions, {"Content-Type": "text/xml"})
        elif exchange.verb in ("GET", "HEAD") and exchange.raw_path.startswith("/folder"):
            self.folder.answer(exchange, self.plan("folder", exchange))
        elif exchange.verb == "GET" and exchange.raw_path.startswith("/nfc/"):
            self.leases.answer(exchange, self.plan("nfc", exchange))
        else:
            self.violation(f"{exchange.verb} {exchange.raw_path}", "no such resource")
            exchange.send(404)

    # What everybody uses

    def caller(self) -> Session:
        """Whose call this thread is at."""
        found: Session = self._local.session
        return found

    @property
    def thumbprint(self) -> str:
        """SHA-1 of the certificate that lease URLs lead to, as vSphere says it."""
        name = "esxi" if self.options["vcenter"] else "vsphere"
        return fingerprint(self.store.path("tls", f"{name}.pem"), "sha1")

    def lease_address(self) -> str:
        """HOST:PORT of lease URLs. Real ones have no port; `*` stands for the host that the API was reached at."""
        options = self.options
        port = self.store.path("host-port" if options["vcenter"] and not options["lease_star"] else "port").read_text().strip()
        return f"{'*' if options['lease_star'] else '127.0.0.1'}:{port}"

    def violation(self, what: str, why: str) -> None:
        self.store.append("violations", {"command": what[:300], "why": why})

    def log(self, **fields: object) -> None:
        self.store.append("calls.log", fields)

    def plan(self, what: str, exchange: Exchange) -> Hit:
        """The faults that hit a call or request; those that end it at once, do."""
        hit = {one["kind"]: one for one in faults.PLAN.take(self.store, lambda match: match in ("", what))}
        if "wait" in hit:
            time.sleep(hit["wait"].get("seconds", 1.0))
        if "hang" in hit:
            exchange.wait_for_hangup()
        if "drop" in hit:
            raise Cut
        if "status" in hit:
            page = f"<html><body><h1>{hit['status'].get('text', 'error')}</h1></body></html>".encode()
            exchange.send(hit["status"].get("status", 503), page, {"Content-Type": "text/html"})
            raise Cut
        return hit

    def begin_task(self, call: soap.Call, session: Session, act: Any, *, name: str, entity: Any, entity_name: str) -> Any:
        """A task that does `act`, unless another is at work on the entity; hurt as planned for this call."""
        other = self.tasks.under_way(entity)
        if other is not None:
            text = "Another task is already in progress."
            raise vim.fault.TaskInProgress(task=other, msg=text)
        hit: Hit = getattr(self._local, "hit", {})
        options = self.options
        slow = hit["slow_task"].get("seconds", 1.0) if "slow_task" in hit else 0.0
        pace = Pace(options["queued_s"], options["running_s"] + slow)

        def hurt() -> Any:
            if "task_error" in hit:
                raise faults.make(hit["task_error"])
            result = act()
            if "task_late_error" in hit:
                raise faults.make(hit["task_late_error"])
            return result

        return self.tasks.begin(name, entity, entity_name, session.user, hurt, pace)

    def _task_failed(self, key: str, exc: BaseException) -> None:
        text = "".join(traceback.format_exception(exc))[-2000:]
        self.violation(key, f"the endpoint itself failed: {text}")

    # Calls

    def _answer_call(self, exchange: Exchange) -> None:
        session = self.sessions.of(exchange.headers.get("Cookie", ""))
        if session is None:
            session = self.sessions.begin()
            exchange.cookie = session.set_cookie
        newest = self.options["api_version"]
        try:
            call = soap.parse_call(exchange.body(), exchange.headers.get("SOAPAction", ""), newest)
        except soap.UnknownMethod as unknown:
            self.violation(unknown.method, str(unknown))
            self._send_fault(exchange, soap.not_found(unknown.this, unknown.method), newest)
            return
        except (soap.BadRequest, ValueError) as bad:
            self.violation(getattr(bad, "method", ""), str(bad))
            self._send_fault(exchange, vmodl.fault.InvalidRequest(msg=f"Unable to parse the request: {bad}"), newest)
            return
        self._serve_call(exchange, call, session)

    def _serve_call(self, exchange: Exchange, call: soap.Call, session: Session) -> None:
        self.log(method=call.method, object=f"{call.kind}:{call.moid}", session=session.key, user=session.user)
        hit = self.plan(call.method, exchange)
        if "logged_out" in hit:
            self.sessions.end(session)
            session.user = ""
        self._local.hit, self._local.session = hit, session
        try:
            if "fault" in hit:
                raise faults.make(hit["fault"])
            value = self._do(call, session)
            if "fault_after" in hit:
                raise faults.make(hit["fault_after"])
            status, said = 200, soap.reply(call, value)
        except vmodl.MethodFault as fault:
            status, said = 500, soap.fault(fault, call.version)
        finally:
            self._local.hit = {}
        if "lost_reply" in hit:
            raise Cut
        exchange.send(status, said, _XML, cut_at=len(said) // 2 if "cut_answer" in hit else -1)

    def _do(self, call: soap.Call, session: Session) -> Any:
        if call.method not in OPEN and not session.user:
            text = "The session is not authenticated."
            raise vim.fault.NotAuthenticated(object=call.this, privilegeId="System.View", msg=text)
        with self.inventory.look():
            return self._do_row(call, session)

    def _do_row(self, call: soap.Call, session: Session) -> Any:
        if not self.inventory.exists(call.this):
            raise gone(call.this)
        row = table.ROWS.get((call.kind, call.method)) or table.ROWS.get(("", call.method))
        only = self.options["only"]
        if row is None or (only and call.method not in only):
            why = "the endpoint does not play it" if row is None else "it is not in the contract"
            self.violation(f"{call.kind}.{call.method}", why)
            raise soap.not_found(call.this, call.method)
        check_allowed(self, call)
        return row(self, call, session)

    @staticmethod
    def _send_fault(exchange: Exchange, fault: Any, version: str) -> None:
        exchange.send(500, soap.fault(fault, version), _XML)


_XML = {"Content-Type": "text/xml; charset=utf-8", "Cache-Control": "no-cache"}
