"""What goes wrong, when (`persona.plan`): the kinds of faults of the played vSphere.

    [{"match": "CreateSnapshot_Task", "kind": "lost_reply", "skip": 1, "times": 1, …}, …]

`match` is a method's name on the wire, `folder` or `nfc` for requests of bytes, or "" for any.

| kind        | what happens                                                                                          |
|-------------|-------------------------------------------------------------------------------------------------------|
| fault       | nothing is done; the call's answer is the fault `name` (`vim.fault.InvalidPowerState`) with `fields`  |
| fault_after | it is done, and the answer is the fault all the same                                                  |
| task_error  | the task ends in the fault and has done nothing                                                       |
| task_late_error | the task has done it and ends in the fault all the same                                           |
| slow_task   | the task runs `seconds` longer                                                                        |
| wait        | `seconds` pass before anything is done                                                                |
| lost_reply  | it is done, but the connection breaks before the answer                                               |
| drop        | the connection breaks before it is done                                                               |
| hang        | nothing is done and nothing is ever answered                                                          |
| cut_answer  | it is done; the answer breaks off in the middle (`bytes`: of a stream, after so many)                 |
| logged_out  | the session is gone before the call, as after an hour of nothing                                      |
| status      | the answer is the HTTP status `status` with a page of HTML that holds `text`                          |
"""

from __future__ import annotations

import importlib
from typing import Any

from tokvm.testing.persona.plan import FaultPlan, Planned, Spared

KINDS = frozenset(
    {
        "fault", "fault_after", "task_error", "task_late_error", "slow_task", "wait", "lost_reply", "drop", "hang",
        "cut_answer", "logged_out", "status",
    }
)  # fmt: skip


class Settings(Spared, total=False):
    seconds: float
    name: str
    fields: dict[str, object]
    text: str
    status: int
    bytes: int


class Fault(Settings, Planned):
    """One of them."""


PLAN = FaultPlan[Fault](KINDS)


def make(planned: Fault) -> Any:
    """The pyVmomi fault that a plan names."""
    name = planned.get("name", "vmodl.fault.SystemError")
    at: Any = importlib.import_module("pyVmomi")
    for word in name.split("."):
        at = getattr(at, word)
    fields = dict(planned.get("fields", {}))
    if name == "vmodl.fault.SystemError":
        fields.setdefault("reason", "")
    return at(**fields, msg=planned.get("text", "A general system error occurred"))
