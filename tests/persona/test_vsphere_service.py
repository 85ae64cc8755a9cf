"""The played vSphere as a service: TLS, sessions, versions, what it refuses, faults of connections."""

from __future__ import annotations

import hashlib
import http.client
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any

import pytest
from pyVim.connect import SmartConnect
from pyVmomi import SoapAdapter, vim, vmodl
from tests.persona.conftest import BuildEsxi, BuildVSphere, MiB
from tests.persona.vsphere_client import connected, disks, machine, read, snapshot, wait

from tokvm.testing import pids
from tokvm.testing.esxi.host import DiskSpec, MachineSpec
from tokvm.testing.sshd import Lifetime
from tokvm.testing.vsphere.contract import TOKVM_CALLS
from tokvm.testing.vsphere.host import VSphere
from tokvm.testing.vsphere.sessions import IDLE_S

pytestmark = pytest.mark.slow

BROKEN = (OSError, HTTPException)


def _post(vsphere: VSphere, body: bytes, *, action: str = "urn:vim25/8.0.2.0") -> tuple[int, bytes]:
    link = http.client.HTTPSConnection("127.0.0.1", vsphere.port, context=vsphere.client_context(), timeout=20)
    try:
        link.request("POST", "/sdk", body, {"SOAPAction": action, "Content-Type": "text/xml"})
        answer = link.getresponse()
        return answer.status, answer.read()
    finally:
        link.close()


def _envelope(body: str) -> bytes:
    return f'<E xmlns="http://schemas.xmlsoap.org/soap/envelope/"><Body>{body}</Body></E>'.encode()


@pytest.mark.parametrize(("vcenter", "kind"), [(True, "VirtualCenter"), (False, "HostAgent")])
def test_the_real_client_connects_and_learns_what_it_is(build_vsphere: BuildVSphere, vcenter: bool, kind: str) -> None:
    vsphere = build_vsphere(vcenter=vcenter)
    with connected(vsphere) as instance:
        assert instance.content.about.apiType == kind
        assert instance._stub.version == "vim.version.v8_0_2_0"  # the newest that we speak, not the client's
        assert instance.content.sessionManager.currentSession.userName == vsphere.user
        assert instance.CurrentTime().tzinfo is not None
    assert vsphere.violations() == []


def test_nobody_gets_in_without_the_ca(build_vsphere: BuildVSphere) -> None:
    vsphere = build_vsphere()
    with pytest.raises(ssl.SSLCertVerificationError):
        SmartConnect(
            host="127.0.0.1",
            port=vsphere.port,
            user=vsphere.user,
            pwd=vsphere.password,
            sslContext=ssl.create_default_context(),  # pyVmomi left alone asks nobody for a certificate
        )
    assert vsphere.calls() == []


def test_the_certificate_satisfies_strict_verification(build_vsphere: BuildVSphere) -> None:
    vsphere = build_vsphere()
    context = vsphere.client_context()
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    link = http.client.HTTPSConnection("localhost", vsphere.port, context=context, timeout=20)
    link.request("GET", "/sdk/vimServiceVersions.xml")
    assert b"<version>8.0.2.0</version>" in link.getresponse().read()
    link.close()


def test_a_renewed_certificate_is_another_one(build_vsphere: BuildVSphere) -> None:
    vsphere = build_vsphere()
    before = vsphere.fingerprint
    vsphere.new_certificate()
    assert vsphere.fingerprint != before
    shown = ssl.PEM_cert_to_DER_cert(ssl.get_server_certificate(("127.0.0.1", vsphere.port), ca_certs=str(vsphere.ca_file)))
    assert hashlib.sha256(shown).hexdigest() == vsphere.fingerprint.replace(":", "").lower()


@contextmanager
def _stub(vsphere: VSphere, version: str = "vim.version.v8_0_2_0") -> Iterator[tuple[Any, Any]]:
    """(a client that has not logged in, the service content)"""
    stub = SoapAdapter.SoapStubAdapter("127.0.0.1", vsphere.port, version=version, sslContext=vsphere.client_context())
    try:
        yield stub, vim.ServiceInstance("ServiceInstance", stub).RetrieveContent()
    finally:
        stub.DropConnections()


def test_a_wrong_password_is_refused(build_vsphere: BuildVSphere) -> None:
    vsphere = build_vsphere()
    with _stub(vsphere) as (_, content):
        for user, password in ((vsphere.user, "wrong"), ("nobody", vsphere.password)):
            with pytest.raises(vim.fault.InvalidLogin):
                content.sessionManager.Login(user, password, None)


def test_before_login_and_after_logout_only_the_service_content_is_told(build_vsphere: BuildVSphere) -> None:
    vsphere = build_vsphere()
    with _stub(vsphere) as (_, content):
        with pytest.raises(vim.fault.NotAuthenticated):
            content.rootFolder.name  # noqa: B018
        content.sessionManager.Login(vsphere.user, vsphere.password, None)
        assert content.rootFolder.name == "Datacenters"
        content.sessionManager.Logout()
        with pytest.raises(vim.fault.NotAuthenticated):
            content.rootFolder.name  # noqa: B018


def test_a_session_ends_after_half_an_hour_of_nothing_and_not_before(build_vsphere: BuildVSphere) -> None:
    vsphere = build_vsphere()
    with connected(vsphere) as instance:
        for _ in range(3):
            vsphere.clock.move(IDLE_S - 60)
            instance.CurrentTime()
        root = instance.content.rootFolder
        vsphere.clock.move(IDLE_S + 1)
        with pytest.raises(vim.fault.NotAuthenticated):
            root.name  # noqa: B018
        instance.RetrieveContent().sessionManager.Login(vsphere.user, vsphere.password, None)
        assert root.name == "Datacenters"


def test_a_restart_forgets_sessions_and_keeps_the_address(build_vsphere: BuildVSphere) -> None:
    vsphere = build_vsphere()
    with connected(vsphere) as instance:
        root = instance.content.rootFolder
        port = vsphere.port
        vsphere.restart()
        assert vsphere.port == port
        with pytest.raises(BROKEN):  # the connection of before
            root.name  # noqa: B018
        with pytest.raises(vim.fault.NotAuthenticated):
            root.name  # noqa: B018


def test_what_is_not_played_is_method_not_found_and_noted(build_vsphere: BuildVSphere) -> None:
    vsphere = build_vsphere()
    with connected(vsphere) as instance:
        with pytest.raises(vmodl.fault.MethodNotFound):
            machine(instance, vsphere).Destroy_Task()
        assert [row["command"] for row in vsphere.violations()] == ["VirtualMachine.Destroy_Task"]
        assert machine(instance, vsphere).storage is None  # a property of the type, but none of ours
        assert "storage" in str(vsphere.violations()[-1])


def test_the_contract_is_what_the_page_says_and_can_be_all_that_is_answered(build_vsphere: BuildVSphere) -> None:
    page = (Path(__file__).parents[2] / "docs" / "vsphere-calls.md").read_text(encoding="utf-8")
    assert [one for one in TOKVM_CALLS if one not in page] == []
    vsphere = build_vsphere(only=[*TOKVM_CALLS])
    with connected(vsphere) as instance:
        assert read(machine(instance, vsphere), "name") == {"name": "web"}
        with pytest.raises(vmodl.fault.MethodNotFound):
            machine(instance, vsphere).name  # noqa: B018  a Fetch
    assert "not in the contract" in str(vsphere.violations())


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        (b"no xml at all", b"InvalidRequestFault"),
        (_envelope('<Nothing xmlns="urn:vim25"><_this type="Folder">group-d1</_this></Nothing>'), b"MethodNotFoundFault"),
        (
            _envelope('<Login xmlns="urn:vim25"><_this type="SessionManager">SessionManager</_this></Login>'),
            b"InvalidRequestFault",
        ),
        (
            _envelope('<Login xmlns="urn:vim25"><_this type="SessionManager">SessionManager</_this><who>a</who></Login>'),
            b"InvalidRequestFault",
        ),
    ],
    ids=["no xml", "unknown method", "a parameter is missing", "an unknown parameter"],
)
def test_what_no_real_client_would_send_is_refused_and_noted(build_vsphere: BuildVSphere, body: bytes, fault: bytes) -> None:
    vsphere = build_vsphere()
    status, answer = _post(vsphere, body)
    assert status == 500
    assert fault in answer
    assert len(vsphere.violations()) == 1


def test_an_object_that_is_gone_is_managed_object_not_found(build_vsphere: BuildVSphere) -> None:
    with connected(build_vsphere()) as instance:
        with pytest.raises(vmodl.fault.ManagedObjectNotFound):
            vim.VirtualMachine("vm-77", instance._stub).name  # noqa: B018
        with pytest.raises(vmodl.fault.ManagedObjectNotFound):
            read(vim.VirtualMachine("vm-77", instance._stub), "name")


def test_an_old_client_gets_nothing_that_it_does_not_know(build_vsphere: BuildVSphere) -> None:
    vsphere = build_vsphere(MachineSpec("web", disks=[DiskSpec(MiB)], fields={"encrypted": True}))
    with _stub(vsphere, "vim.version.version10") as (stub, content):
        content.sessionManager.Login(vsphere.user, vsphere.password, None)
        config: Any = vim.VirtualMachine(vsphere.moid("web"), stub).config
        assert disks(config)[0].backing.sharing == "sharingNone"  # of 6.0
        assert config.keyId is None  # of 6.5
    with connected(vsphere) as instance:
        assert machine(instance, vsphere).config.keyId is not None


# Faults of the plan


def test_a_lost_reply_was_done_and_a_dropped_call_was_not(build_vsphere: BuildVSphere) -> None:
    vsphere = build_vsphere()
    with connected(vsphere) as instance:
        vm = machine(instance, vsphere)
        for kind in ("drop", "lost_reply"):
            vsphere.fault("CreateSnapshot_Task", kind)
            with pytest.raises(BROKEN):
                vm.CreateSnapshot_Task(kind, "", memory=False, quiesce=False)
        for task in vm.recentTask:
            wait(task)
        assert [one["name"] for one in vsphere.host.snapshots("web")] == ["lost_reply"]
    assert vsphere.faults_left() == []


def test_an_answer_that_is_cut_cannot_be_read(build_vsphere: BuildVSphere) -> None:
    vsphere = build_vsphere()
    with connected(vsphere) as instance:
        vsphere.fault("Fetch", "cut_answer")
        with pytest.raises(Exception, match=r"no element|IncompleteRead|unclosed|EOF"):
            machine(instance, vsphere).config  # noqa: B018


def test_planned_faults_of_calls_and_of_tasks(build_vsphere: BuildVSphere) -> None:
    vsphere = build_vsphere()
    with connected(vsphere) as instance:
        vm = machine(instance, vsphere)
        vsphere.fault("CreateSnapshot_Task", "fault", name="vim.fault.InvalidName", fields={"name": "a"})
        with pytest.raises(vim.fault.InvalidName):
            vm.CreateSnapshot_Task("a", "", memory=False, quiesce=False)
        vsphere.fault("CreateSnapshot_Task", "task_error", name="vim.fault.FilesystemQuiesceFault", text="no")
        error = wait(vm.CreateSnapshot_Task("b", "", memory=False, quiesce=False)).error
        assert (type(error), error.msg) == (vim.fault.FilesystemQuiesceFault, "no")
        assert vsphere.host.snapshots("web") == []
        vsphere.fault("CreateSnapshot_Task", "task_late_error")
        assert wait(vm.CreateSnapshot_Task("c", "", memory=False, quiesce=False)).state == "error"
        assert len(vsphere.host.snapshots("web")) == 1


def test_a_client_that_is_logged_out_in_between_is_told_so(build_vsphere: BuildVSphere) -> None:
    vsphere = build_vsphere()
    with connected(vsphere) as instance:
        vsphere.fault("PowerOffVM_Task", "logged_out")
        with pytest.raises(vim.fault.NotAuthenticated):
            machine(instance, vsphere).PowerOffVM_Task()
        assert vsphere.host.is_running("web")


def test_a_hanging_call_answers_nobody_until_the_client_gives_up(build_vsphere: BuildVSphere) -> None:
    vsphere = build_vsphere()
    vsphere.fault("CurrentTime", "hang")
    link = http.client.HTTPSConnection("127.0.0.1", vsphere.port, context=vsphere.client_context(), timeout=0.3)
    body = _envelope('<CurrentTime xmlns="urn:vim25"><_this type="ServiceInstance">ServiceInstance</_this></CurrentTime>')
    link.request("POST", "/sdk", body)
    with pytest.raises(TimeoutError):
        link.getresponse()
    link.close()
    assert _post(vsphere, body)[0] == 200


def test_a_free_licence_reads_and_does_not_write(build_vsphere: BuildVSphere) -> None:
    vsphere = build_vsphere(vcenter=False, free_licence=True)
    with connected(vsphere) as instance:
        vm = machine(instance, vsphere)
        assert vm.name == "web"
        assert instance.content.licenseManager.licenses[0].editionKey == "esxBasic"
        for call in (
            lambda: vm.CreateSnapshot_Task("a", "", memory=False, quiesce=False),
            vm.ShutdownGuest,
            vm.PowerOffVM_Task,
        ):
            with pytest.raises(vim.fault.RestrictedVersion):
                call()


def test_a_privilege_that_is_missing_is_named(build_vsphere: BuildVSphere) -> None:
    vsphere = build_vsphere(denied=["VirtualMachine.State.CreateSnapshot", "VirtualMachine.Config.ChangeTracking"])
    with connected(vsphere) as instance:
        vm = machine(instance, vsphere)
        with pytest.raises(vim.fault.NoPermission) as refused:
            snapshot(vm)
        assert refused.value.privilegeId == "VirtualMachine.State.CreateSnapshot"
        with pytest.raises(vim.fault.NoPermission):
            vm.ReconfigVM_Task(vim.vm.ConfigSpec(changeTrackingEnabled=True))
        wait(vm.ReconfigVM_Task(vim.vm.ConfigSpec(annotation="mine")))
        manager = instance.content.authorizationManager
        held = manager.FetchUserPrivilegeOnEntities([vm], vsphere.user)[0].privileges
        assert "VirtualMachine.State.RemoveSnapshot" in held
        assert "VirtualMachine.State.CreateSnapshot" not in held
        session = instance.content.sessionManager.currentSession.key
        wanted = ["VirtualMachine.State.CreateSnapshot", "VApp.Export"]
        assert [one.isGranted for one in manager.HasPrivilegeOnEntities([vm], session, wanted)[0].privAvailability] == [
            False,
            True,
        ]


def test_in_a_process_of_its_own_it_outlives_and_is_found_again(build_esxi: BuildEsxi, tmp_path: Path) -> None:
    host = build_esxi()
    first = VSphere(host, vcenter=True, lifetime=Lifetime.OUTLIVES_US)
    again = VSphere(host, vcenter=True, lifetime=Lifetime.OUTLIVES_US)
    note = host.folder / "run" / "vcenter.pid"
    try:
        assert pids.noted(note) is not None
        assert again.port == first.port
        with connected(again) as instance:
            snapshot(machine(instance, again))
        assert len(host.snapshots("web")) == 1
    finally:
        again.close()
    assert pids.noted(note) is None
    assert again.violations() == []
