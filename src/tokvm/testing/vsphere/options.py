"""How the played vSphere behaves, and what it remembers, in STATE_DIR/state.json (persona.store).

STATE_DIR/  state.json    below; every call reads it anew, so that a test may change it at any time
            faults.json   what goes wrong (faults.py)
            calls.log     every call and every request for bytes, one JSON line each
            violations    what no client of ours may ask for
            clock         clock.py
            tls/          CA, certificates
            port host-port run/
"""

from __future__ import annotations

from typing import TypedDict

from tokvm.testing.persona.store import Store as FolderStore

CLOSE, CHUNKED = "close", "chunked"


class Options(TypedDict):
    """
    page                  objects in a page of the PropertyCollector, 0: as many as are asked for
    queued_s, running_s   how long every task is, by the clock
    areas, span           changed areas, and bytes, in one answer of QueryChangedDiskAreas at most
    empty_pages           the gaps before changed areas are answers of their own
    cbt_star_fails        changeId `*` ends in FileFault
    lease_s               the timeout of a lease; lease_ready_s: how long it is initializing
    lease_encoding        of its streams: close or chunked
    lease_star            its URLs name no host, but `*`
    lease_truncates       of several disks on a lease those after the first end early and say nothing
    end_marker            streams have it
    full_answers          /folder ignores Range and says 200
    free_licence          writes are RestrictedVersion
    denied                privileges that the user lacks
    api_version           pyVmomi's name of the newest that is spoken
    only                  calls that are answered, any other is a violation; []: all that are played (contract.TOKVM_CALLS)
    """

    vcenter: bool
    user: str
    password: str
    datacenter: str
    datacenter_folder: str
    cluster: str
    ha: bool
    drs: bool
    page: int
    queued_s: float
    running_s: float
    areas: int
    empty_pages: bool
    span: int
    cbt_star_fails: bool
    lease_s: float
    lease_ready_s: float
    lease_encoding: str
    lease_star: bool
    lease_truncates: bool
    end_marker: bool
    full_answers: bool
    free_licence: bool
    denied: list[str]
    api_version: str
    only: list[str]


class Override(TypedDict):
    """A VM's own settings in its cluster; "" where it follows the cluster's."""

    restart_priority: str
    drs: str


class Tracking(TypedDict):
    """Changed block tracking of one VM. tracks: whether it has begun; since: when it was asked for (wall clock). uuid: another
    with every reset. number: of the next moment. reverts: how many
    there were. marks: freeze → `uuid/number`; one that is not in it was not tracked. seen:
    freezes that were looked at."""

    enabled: bool
    tracks: bool
    since: float
    uuid: str
    number: int
    reverts: int
    marks: dict[str, str]
    seen: list[str]


class State(TypedDict):
    options: Options
    overrides: dict[str, Override]
    tracking: dict[str, Tracking]
    versions: dict[str, int]
    extra: dict[str, dict[str, str]]


Store = FolderStore[State]

NEWEST = "vim.version.v8_0_2_0"


def default_options(*, vcenter: bool) -> Options:
    return Options(
        vcenter=vcenter,
        user="administrator@vsphere.local" if vcenter else "root",
        password="Zwei%20 & <Drei>",
        datacenter="DC 1" if vcenter else "ha-datacenter",
        datacenter_folder="Region+Süd" if vcenter else "",
        cluster="Cluster" if vcenter else "",
        ha=vcenter,
        drs=vcenter,
        page=0,
        queued_s=0.01,
        running_s=0.02,
        areas=2,
        empty_pages=True,
        span=1 << 40,
        cbt_star_fails=False,
        lease_s=300.0,
        lease_ready_s=0.05,
        lease_encoding=CLOSE,
        lease_star=not vcenter,
        lease_truncates=True,
        end_marker=True,
        full_answers=False,
        free_licence=False,
        denied=[],
        api_version=NEWEST,
        only=[],
    )
