"""What goes wrong, when (`persona.plan`): the kinds of faults of this host.

    [{"match": "snapshot.create", "kind": "lost_reply", "skip": 1, "times": 1, …}, …]

`match` is a row's name in `contract.ROWS`, `claim` or `write`, or "" for any command. Each command of a line is hit by itself.

| kind        | what happens                                                                                        |
|-------------|-----------------------------------------------------------------------------------------------------|
| error       | nothing is done; hostd's fault `type` with `message`, or what a program of the shell says (`message`)|
| error_after | it is done, and the command fails all the same                                                      |
| hostd_down  | nothing is done: hostd does not answer vim-cmd and esxcli                                           |
| wait        | `seconds` pass before anything is done                                                              |
| lost_reply  | it is done, but the connection dies before the answer                                               |
| drop        | the connection dies before it is done                                                               |
| hang        | nothing is done and nothing is ever answered                                                        |
| freeze      | it is done and nothing is ever answered                                                             |
| late        | the connection dies at once; it is done `seconds` later, by whatever the host has in hand           |
| cut_answer  | it is done; the line's answer ends in the middle, exit 0                                            |
| no_answer   | it is done; nothing at all is printed, exit 0                                                       |
"""

from __future__ import annotations

from tokvm.testing.persona.plan import FaultPlan, Planned, Spared

KINDS = frozenset(
    {
        "error", "error_after", "hostd_down", "wait", "lost_reply", "drop", "hang", "freeze", "late", "cut_answer", "no_answer",
    }
)  # fmt: skip


class Settings(Spared, total=False):
    seconds: float
    type: str
    message: str


class Fault(Settings, Planned):
    """One of them."""


PLAN = FaultPlan[Fault](KINDS)
