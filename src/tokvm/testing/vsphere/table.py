"""Which call is played by what: (type on the wire, method on the wire) → function. The type "" stands for any."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tokvm.testing.vsphere import cluster, lease_calls, machine_calls, permissions, service

if TYPE_CHECKING:
    from tokvm.testing.vsphere.endpoint import Endpoint
    from tokvm.testing.vsphere.sessions import Session
    from tokvm.testing.vsphere.soap import Call

    Row = Callable[[Endpoint, Call, Session], Any]

ROWS: dict[tuple[str, str], Row] = {
    **service.ROWS,
    **machine_calls.ROWS,
    **lease_calls.ROWS,
    **cluster.ROWS,
    **permissions.ROWS,
}
