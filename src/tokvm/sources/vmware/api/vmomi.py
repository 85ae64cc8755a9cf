"""pyVmomi, in one place: its types are made while it is imported, so that what a checker sees of it is Any."""

from __future__ import annotations

from typing import Any

import pyVmomi
from pyVmomi import SoapAdapter, VmomiSupport

vim: Any = vars(pyVmomi)["vim"]
vmodl: Any = vars(pyVmomi)["vmodl"]
SoapStubAdapter: Any = SoapAdapter.SoapStubAdapter


def versions() -> list[tuple[str, str]]:
    """(pyVmomi's name, the server's name) of each version of the API that is known here, the newest first."""
    names: Any = getattr(VmomiSupport, "GetServiceVersions")  # noqa: B009
    return [(str(name), str(VmomiSupport.versionIdMap.get(name, ""))) for name in names("vim25")]
