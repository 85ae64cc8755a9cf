"""/folder of the played vSphere, by http.client: ranges, locks, double encoding, who may."""

from __future__ import annotations

import base64
import http.client
from typing import Any
from urllib.parse import quote

import pytest
from tests.persona.conftest import BuildVSphere, MiB
from tests.persona.vsphere_client import connected, machine, result, snapshot

from tokvm.testing.esxi.host import DatastoreSpec, DiskSpec, MachineSpec
from tokvm.testing.vsphere.host import VSphere
from tokvm.testing.vsphere.sessions import IDLE_S

pytestmark = pytest.mark.slow

FLAT, DELTA, DESCRIPTOR = "web/web-flat.vmdk", "web/web-000001-sesparse.vmdk", "web/web.vmdk"


def _build(build_vsphere: BuildVSphere, *, running: bool = True, store: str = "VMFS-6", **options: Any) -> VSphere:
    spec = MachineSpec("web", disks=[DiskSpec(MiB)], running=running)
    vsphere = build_vsphere(spec, esxi={"datastores": (DatastoreSpec("data store+1", type=store),)}, **options)
    if not running:
        vsphere.host.write_disk("web", 0, offset=0, data=bytes(range(256)) * 2048)
    return vsphere


def _basic(vsphere: VSphere) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{vsphere.user}:{vsphere.password}".encode()).decode()}


def _path(vsphere: VSphere, file: str, *, times: int | None = None, datacenter: str = "") -> str:
    """times: how often the names are percent-encoded; None: as the endpoint needs it."""
    vcenter = vsphere.options["vcenter"]
    names = {"dcPath": datacenter or ("Region+Süd/DC 1" if vcenter else "ha-datacenter"), "dsName": "data store+1"}
    for _ in range(times if times is not None else 1 + vcenter):
        names = {name: quote(value, safe="") for name, value in names.items()}
    return f"/folder/{quote(file)}?{'&'.join(f'{name}={value}' for name, value in names.items())}"


def _ask(vsphere: VSphere, path: str, headers: dict[str, str] | None = None, *, verb: str = "GET") -> tuple[int, Any, bytes]:
    """(status, headers, body), by basic auth unless something else is given."""
    link = http.client.HTTPSConnection("127.0.0.1", vsphere.port, context=vsphere.client_context(), timeout=20)
    try:
        link.request(verb, path, headers={**_basic(vsphere), **(headers or {})})
        answer = link.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        link.close()


@pytest.mark.parametrize("vcenter", [True, False])
def test_a_vm_that_is_off_is_read_by_ranges(build_vsphere: BuildVSphere, vcenter: bool) -> None:
    vsphere = _build(build_vsphere, running=False, vcenter=vcenter)
    disk = vsphere.host.read_disk("web")
    path = _path(vsphere, FLAT)
    for first, last in ((0, 0), (1000, 1999), (MiB - 512, MiB - 1)):
        status, headers, body = _ask(vsphere, path, {"Range": f"bytes={first}-{last}"})
        assert (status, headers["Content-Range"]) == (206, f"bytes {first}-{last}/{MiB}")
        assert body == disk[first : last + 1]
    status, headers, body = _ask(vsphere, path, {"Range": f"bytes={MiB - 100}-{MiB + 5000}"})
    assert (status, len(body)) == (206, 100)  # short: the file's end
    assert _ask(vsphere, path, {"Range": f"bytes={MiB}-"})[0] == 416
    status, headers, body = _ask(vsphere, path)
    assert (status, body == disk) == (200, True)
    status, headers, body = _ask(vsphere, path, verb="HEAD")
    assert (status, headers["Content-Length"], body) == (200, str(MiB), b"")
    assert _ask(vsphere, _path(vsphere, "web/none.vmdk"))[0] == 404
    assert _ask(vsphere, _path(vsphere, "../state.json"))[0] == 404


@pytest.mark.parametrize(
    ("store", "file", "statuses"),
    [
        # off, running, running with a snapshot on top, off with a snapshot
        ("VMFS-6", FLAT, (206, 500, 500, 206)),
        ("VMFS-6", DELTA, (404, 404, 500, 206)),
        ("VMFS-6", DESCRIPTOR, (206, 206, 206, 206)),
        ("NFS", FLAT, (206, 500, 206, 206)),
    ],
)
def test_who_has_a_file_open_locks_it(
    build_vsphere: BuildVSphere, store: str, file: str, statuses: tuple[int, int, int, int]
) -> None:
    vsphere = _build(build_vsphere, running=False, store=store)
    path = _path(vsphere, file)

    def ask() -> int:
        status, _, body = _ask(vsphere, path, {"Range": "bytes=0-511"})
        assert (b"NFC_FILE_LOCKED" in body) is (status == 500)
        return status

    with connected(vsphere) as instance:
        vm = machine(instance, vsphere)
        seen = [ask()]
        result(vm.PowerOnVM_Task())
        seen.append(ask())
        snapshot(vm)
        seen.append(ask())
        result(vm.PowerOffVM_Task())
        seen.append(ask())
    assert tuple(seen) == statuses


def test_vcenter_wants_the_names_encoded_twice(build_vsphere: BuildVSphere) -> None:
    vsphere = _build(build_vsphere, running=False)
    assert _ask(vsphere, _path(vsphere, DESCRIPTOR, times=2))[0] == 200
    assert _ask(vsphere, _path(vsphere, DESCRIPTOR, times=1))[0] == 404
    assert _ask(vsphere, _path(vsphere, DESCRIPTOR, datacenter="DC 1"))[0] == 404  # the whole path of the inventory


def test_esxi_wants_them_encoded_once(build_vsphere: BuildVSphere) -> None:
    vsphere = _build(build_vsphere, running=False, vcenter=False)
    assert _ask(vsphere, _path(vsphere, DESCRIPTOR, times=1))[0] == 200
    assert _ask(vsphere, _path(vsphere, DESCRIPTOR, times=2))[0] == 404
    assert _ask(vsphere, _path(vsphere, DESCRIPTOR, datacenter="DC 1"))[0] == 404


def test_a_cookie_or_a_password_is_needed_and_a_cookie_expires(build_vsphere: BuildVSphere) -> None:
    vsphere = _build(build_vsphere, running=False)
    path = _path(vsphere, DESCRIPTOR)
    nobody = {"Authorization": ""}
    status, headers, _ = _ask(vsphere, path, nobody)
    assert (status, headers["WWW-Authenticate"].partition(" ")[0]) == (401, "Basic")
    wrong = {"Authorization": "Basic " + base64.b64encode(b"root:no").decode()}
    assert _ask(vsphere, path, wrong)[0] == 401
    with connected(vsphere) as instance:
        cookie = {**nobody, "Cookie": instance._stub.cookie.split(";")[0]}
        assert _ask(vsphere, path, cookie)[0] == 200
        vsphere.clock.move(IDLE_S + 1)
        assert _ask(vsphere, path, cookie)[0] == 401
    vsphere.set_options(denied=["Datastore.FileManagement"])
    assert _ask(vsphere, path)[0] == 403


def test_reading_keeps_a_session_awake(build_vsphere: BuildVSphere) -> None:
    vsphere = _build(build_vsphere, running=False)
    with connected(vsphere) as instance:
        cookie = {"Authorization": "", "Cookie": instance._stub.cookie.split(";")[0]}
        for _ in range(3):
            vsphere.clock.move(IDLE_S - 60)
            assert _ask(vsphere, _path(vsphere, DESCRIPTOR), cookie)[0] == 200


def test_a_server_that_ignores_ranges_says_200_from_the_start(build_vsphere: BuildVSphere) -> None:
    vsphere = _build(build_vsphere, running=False, full_answers=True)
    status, headers, body = _ask(vsphere, _path(vsphere, FLAT), {"Range": "bytes=4096-8191"})
    assert (status, headers["Content-Range"]) == (200, None)
    assert body == vsphere.host.read_disk("web")


def test_answers_break_off_come_late_or_are_something_else(build_vsphere: BuildVSphere) -> None:
    vsphere = _build(build_vsphere, running=False)
    path = _path(vsphere, FLAT)
    vsphere.fault("folder", "cut_answer", bytes=1000)
    with pytest.raises(http.client.IncompleteRead) as broken:
        _ask(vsphere, path, {"Range": "bytes=0-65535"})
    assert broken.value.partial == vsphere.host.read_disk("web")[:1000]
    vsphere.fault("folder", "drop")
    with pytest.raises((OSError, http.client.HTTPException)):
        _ask(vsphere, path)
    vsphere.fault("folder", "status", status=503, text="503 Service Unavailable")
    status, _, body = _ask(vsphere, path)
    assert (status, b"Service Unavailable" in body) == (503, True)
    vsphere.fault("folder", "logged_out")
    assert _ask(vsphere, path)[0] == 401
    assert _ask(vsphere, path)[0] == 200


def test_what_lies_elsewhere_is_not_there_and_noted(build_vsphere: BuildVSphere) -> None:
    vsphere = _build(build_vsphere, running=False)
    assert _ask(vsphere, "/ui/")[0] == 404
    assert _ask(vsphere, _path(vsphere, FLAT), verb="PUT")[0] == 404
    assert len(vsphere.violations()) == 2
