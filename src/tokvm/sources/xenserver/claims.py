"""Whose VM is it? A mark in `other-config:tokvm-owner` that the first one sets and nobody overwrites.

`vm-param-add` is the compare-and-set: xapi refuses it when the key exists. Whatever it says, the holder is who is read back.
"""

from __future__ import annotations

import logging

from tokvm.core.errors import UsageError
from tokvm.sources.xenserver.faults import Fault, XenServerError
from tokvm.sources.xenserver.xe import Xe

log = logging.getLogger(__name__)

OWNER = "tokvm-owner"


def owner(xe: Xe, vm: str) -> str | None:
    """Who holds the VM; an empty mark is none."""
    return xe.key(vm, "other-config", OWNER) or None


def claim(xe: Xe, vm: str, name: str) -> str:
    """Set our mark unless there is one; returns the holder."""
    if not name or "\0" in name or name != name.strip():
        raise UsageError(f"{name!r} cannot own a VM", fix="give an owner that is not empty and has no blanks around it")
    holder = owner(xe, vm)
    if holder is not None:
        return holder
    try:
        xe.act("vm-param-add", f"uuid={vm}", "param-name=other-config", f"{OWNER}={name}")
    except XenServerError as failed:
        if failed.fault is not Fault.DUPLICATE_KEY:
            raise
    holder = owner(xe, vm)
    if holder is None:
        raise xe.confused(("vm-param-add", f"uuid={vm}"), "the owner's mark was set but is not there when read back")
    log.info("VM %s is held by %s", vm, holder)
    return holder


def release(xe: Xe, vm: str, name: str) -> None:
    """Remove the mark if it is ours."""
    if owner(xe, vm) != name:
        return
    remove_key(xe, vm, "other-config", OWNER)


def remove_key(xe: Xe, vm: str, name: str, key: str) -> None:
    """Remove one key of a map; gone already is success."""
    try:
        xe.act("vm-param-remove", f"uuid={vm}", f"param-name={name}", f"param-key={key}")
    except XenServerError as failed:
        if failed.fault is not Fault.NO_SUCH_KEY:
            raise
