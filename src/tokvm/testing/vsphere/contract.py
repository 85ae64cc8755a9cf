"""docs/vsphere-calls.md as a set: the calls that tokvm sends. The endpoint plays more, for tests by pyVmomi alone."""

from __future__ import annotations

TOKVM_CALLS = (
    "ConsolidateVMDisks_Task",
    "ContinueRetrievePropertiesEx",
    "CreateContainerView",
    "CreateSnapshot_Task",
    "CurrentTime",
    "DestroyView",
    "ExportSnapshot",
    "HasPrivilegeOnEntities",
    "HttpNfcLeaseAbort",
    "HttpNfcLeaseComplete",
    "HttpNfcLeaseProgress",
    "Login",
    "Logout",
    "PowerOffVM_Task",
    "PowerOnVM_Task",
    "QueryChangedDiskAreas",
    "ReconfigVM_Task",
    "ReconfigureAutostart",
    "ReconfigureComputeResource_Task",
    "RemoveSnapshot_Task",
    "RetrievePropertiesEx",
    "RetrieveServiceContent",
    "ShutdownGuest",
)
