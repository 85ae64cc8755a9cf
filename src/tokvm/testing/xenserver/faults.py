"""What goes wrong, when (`persona.plan`): the kinds of faults of this host.

    [{"match": "xe vdi-export", "kind": "stall", "skip": 1, "times": 1, "at": 1048576, …}, …]

`match` is a piece of the command line.

| kind          | what happens                                                                                       |
|---------------|----------------------------------------------------------------------------------------------------|
| refuse        | nothing is done; `text` (or an API error `code`) on stderr, exit 1                                 |
| wait          | `seconds` pass before anything is done                                                             |
| lost_reply    | it is done, but the connection dies before the answer                                              |
| mute          | it is done, but xe says nothing and ends with exit 0                                               |
| drop          | the connection dies before it is done                                                              |
| hang          | nothing is done and nothing is ever answered                                                       |
| late          | the connection dies at once; it is done `seconds` later (`hidden`: not shown in current-operations)|
| short         | export: ends after `at` bytes, exit 0                                                              |
| fail          | export: ends after `at` bytes with an error and exit 1                                             |
| cut           | export: the connection dies after `at` bytes                                                       |
| stall         | export: after `at` bytes nothing more comes and nothing ends, as from a stopped process            |
| flip          | export: bit 0 of byte `at` (negative: from the end) is turned over                                 |
| slow          | export: at most `rate` bytes a second                                                              |
| new_identity  | export: another uuid and timestamp each time                                                       |
| wrong_parent  | export: the delta names a parent that is not the base                                              |
| full          | export: the whole disk instead of the delta                                                        |
| http_500      | export: the stream is an HTTP error page, exit 0 (xen-api 4603)                                    |
"""

from __future__ import annotations

from tokvm.testing.persona.plan import FaultPlan, Planned, Spared

EXPORT_KINDS = frozenset({"short", "fail", "cut", "stall", "flip", "slow", "new_identity", "wrong_parent", "full", "http_500"})
COMMAND_KINDS = frozenset({"refuse", "wait", "lost_reply", "mute", "drop", "hang", "late"})


class Settings(Spared, total=False):
    at: int
    seconds: float
    rate: float
    text: str
    code: str
    hidden: bool


class Fault(Settings, Planned):
    """One of them."""


PLAN = FaultPlan[Fault](EXPORT_KINDS | COMMAND_KINDS)
