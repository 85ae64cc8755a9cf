"""What goes wrong, when (`persona.plan`): the kinds of faults of this host.

    [{"match": "checkpoint", "kind": "lost_reply", "skip": 1, "times": 1, …}, …]

`match` is a script's name, or "" for any.

| kind        | what happens                                                                                        |
|-------------|-----------------------------------------------------------------------------------------------------|
| error       | nothing is done; the script reports an error with `type`, `hresult`, `id`, `message`                |
| error_after | it is done, and the script reports the error all the same                                           |
| wait        | `seconds` pass before anything is done                                                              |
| lost_reply  | it is done, but the connection dies before the answer                                               |
| drop        | the connection dies before it is done                                                               |
| hang        | nothing is done and nothing is ever answered                                                        |
| late        | the connection dies at once; it is done `seconds` later, by whatever the host has in hand           |
| cut_answer  | it is done; the answer ends in the middle, exit 0                                                   |
| no_answer   | it is done; PowerShell prints nothing at all, exit 0                                                |
| crash       | nothing is done; PowerShell dies with CLIXML on stderr, exit 1                                      |
"""

from __future__ import annotations

from tokvm.testing.persona.plan import FaultPlan, Planned, Spared

KINDS = frozenset({"error", "error_after", "wait", "lost_reply", "drop", "hang", "late", "cut_answer", "no_answer", "crash"})


class Settings(Spared, total=False):
    seconds: float
    type: str
    hresult: int
    id: str
    message: str


class Fault(Settings, Planned):
    """One of them."""


PLAN = FaultPlan[Fault](KINDS)
