"""What a played host's sftp-server does wrong. Apart from the server, which is slower to load."""

from __future__ import annotations

from typing import TypedDict


class SftpSettings(TypedDict):
    """In STATE_DIR/sftp.json, read anew by each session. cap: bytes of one READ. limits: limits@openssh.com is known.
    die_after, freeze_after: bytes of DATA, -1: never. shuffle: answers come in any order."""

    cap: int
    limits: bool
    die_after: int
    freeze_after: int
    shuffle: bool
