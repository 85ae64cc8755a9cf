"""Doing what a command of the contract asks: its standard output, or how it fails.

All of it is called with the state locked.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from tokvm.testing.esxi import contract, devices, esxcli, locks, paths, records, tasks
from tokvm.testing.esxi.contract import Command
from tokvm.testing.esxi.errors import CommandFailed, NotInContract, VimFault
from tokvm.testing.esxi.hostd import Hostd, find_vm
from tokvm.testing.esxi.state import FLAT, Autostart, State, Vm, chain, present

Act = Callable[[Hostd, State, tuple[str, ...]], str]
CLONE_TITLE = "Destination disk format: VMFS thin-provisioned\nCloning disk '{}'...\nClone: 100% done.\n"


def run(hostd: Hostd, state: State, command: Command) -> str:
    """Standard output; VimFault, CommandFailed, NotInContract."""
    return ACTS[command.name](hostd, state, command.arguments)


def do_late(hostd: Hostd, state: State, line: str) -> None:
    """What a client asked for before its connection broke; nobody hears how it ended."""
    for command in contract.read_line(line)[0]:
        try:
            run(hostd, state, command)
        except (VimFault, CommandFailed) as error:
            hostd.store.append("events.log", {"event": "late refusal", "command": command.name, "why": str(error)})


def _about(read: Callable[[State, Vm], str]) -> Act:
    return lambda _hostd, state, words: read(state, find_vm(state, words[0]))


def _create(hostd: Hostd, state: State, words: tuple[str, ...]) -> str:
    title = "Create Snapshot:\n"
    vm = find_vm(state, words[0])
    try:
        hostd.create(state, vm, words[1], words[2])
    except VimFault as fault:
        raise fault.while_(title, "Create snapshot failed") from None
    return title


def _remove(hostd: Hostd, state: State, words: tuple[str, ...]) -> str:
    title = "Remove Snapshot:\n"
    vm = find_vm(state, words[0])
    asked = next((one for one in vm["snapshots"] if str(one["id"]) == words[1]), None)
    if asked is not None and not asked["name"].startswith("tokvm-"):
        raise NotInContract(f"the snapshot {asked['name']!r} is somebody else's")
    try:
        hostd.remove(state, vm, int(words[1]))
    except VimFault as fault:
        raise fault.while_(title, "Remove snapshot failed") from None
    return title


def _power(act: Callable[[Hostd, State, Vm], None], title: str, failed: str) -> Act:
    def run_it(hostd: Hostd, state: State, words: tuple[str, ...]) -> str:
        vm = find_vm(state, words[0])
        try:
            act(hostd, state, vm)
        except VimFault as fault:
            raise fault.while_(title, failed) from None
        return title

    return run_it


def _autostart_entry(_hostd: Hostd, state: State, words: tuple[str, ...]) -> str:
    vm = find_vm(state, words[0])
    vm["autostart"] = Autostart(
        startOrder=int(words[3]),
        startDelay=int(words[2]),
        waitForHeartbeat=words[6],
        startAction=words[1],
        stopDelay=int(words[5]),
        stopAction=words[4],
    )
    return ""


# busybox


def _local(hostd: Hostd, path: str) -> Path:
    try:
        return paths.local(hostd.store.folder, path)
    except FileNotFoundError:
        raise NotInContract(f"{path!r} is no plain path") from None


def _cat(hostd: Hostd, _state: State, words: tuple[str, ...]) -> str:
    try:
        return _local(hostd, words[0]).read_bytes().decode("utf-8", "surrogateescape")
    except (FileNotFoundError, NotADirectoryError):
        raise CommandFailed(f"cat: can't open '{words[0]}': No such file or directory") from None


def _ls(hostd: Hostd, _state: State, words: tuple[str, ...]) -> str:
    try:
        names = sorted(os.listdir(_local(hostd, words[0])))  # noqa: PTH208
    except (FileNotFoundError, NotADirectoryError):
        raise CommandFailed(f"ls: {words[0]}: No such file or directory") from None
    return "".join(f"{name}\n" for name in names if not name.startswith("."))


def _dd(hostd: Hostd, state: State, words: tuple[str, ...]) -> str:
    if not _local(hostd, words[0]).exists():
        raise CommandFailed(f"dd: can't open '{words[0]}': No such file or directory")
    if words[0] in locks.locked(state):
        raise CommandFailed(f"dd: can't open '{words[0]}': Device or resource busy")
    return ""  # what it counts is on standard error


def _claim(hostd: Hostd, _state: State, words: tuple[str, ...]) -> str:
    try:
        file = os.open(_local(hostd, words[1]), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise CommandFailed(f"sh: can't create {words[1]}: File exists") from None
    except (FileNotFoundError, NotADirectoryError):
        raise CommandFailed(f"sh: can't create {words[1]}: nonexistent directory") from None
    with os.fdopen(file, "wb") as out:
        out.write(_bytes(words[0]))
    return ""


def _write(hostd: Hostd, _state: State, words: tuple[str, ...]) -> str:
    path = _local(hostd, words[1])
    fresh = path.with_name(f"{path.name}.new")
    try:
        fresh.write_bytes(_bytes(words[0]))
    except (FileNotFoundError, NotADirectoryError):
        raise CommandFailed(f"sh: can't create {words[1]}.new: nonexistent directory") from None
    fresh.replace(path)
    return ""


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _rm(hostd: Hostd, _state: State, words: tuple[str, ...]) -> str:
    _local(hostd, words[0]).unlink(missing_ok=True)
    return ""


def _mkdir(hostd: Hostd, _state: State, words: tuple[str, ...]) -> str:
    _local(hostd, words[0]).mkdir(parents=True, exist_ok=True)
    return ""


def _rmdir(hostd: Hostd, _state: State, words: tuple[str, ...]) -> str:
    try:
        _local(hostd, words[0]).rmdir()
    except FileNotFoundError:
        raise CommandFailed(f"rmdir: '{words[0]}': No such file or directory") from None
    except OSError:
        raise CommandFailed(f"rmdir: '{words[0]}': Directory not empty") from None
    return ""


# vmkfstools


def _clone(hostd: Hostd, state: State, words: tuple[str, ...]) -> str:
    """The disk as it was when the source was frozen, flat; a chain is read through."""
    from tokvm.testing.esxi import vmdks

    source, target = words
    layer = state["layers"].get(source)
    if layer is None:
        raise CommandFailed(f"Failed to open '{source}': The system cannot find the file specified (25).", 255)
    if _local(hostd, target).exists():
        raise CommandFailed("Failed to clone disk: The file already exists (39).", 255)
    if not _local(hostd, paths.folder_of(target)).is_dir():
        raise CommandFailed("Failed to clone disk: The system cannot find the file specified (25).", 255)
    locked = locks.locked(state)
    for one in chain(state, source):
        extent = paths.extent_of(one)
        shared = one["kind"] == FLAT and not one["live"] and state["options"]["base_stays_locked"] != "all"
        if extent in locked and not shared:  # a base in use is opened by many readers at once
            raise CommandFailed(f"Failed to open '{source}': Failed to lock the file (16392).", 255)
    vmdks.clone(hostd.store, hostd.backend, layer, target)
    return CLONE_TITLE.format(source)


def _unclone(hostd: Hostd, _state: State, words: tuple[str, ...]) -> str:
    path = _local(hostd, words[0])
    if not path.exists():
        raise CommandFailed("Failed to delete virtual disk: The system cannot find the file specified (25).", 255)
    path.with_name(f"{path.stem}-flat.vmdk").unlink(missing_ok=True)
    path.unlink()
    return ""


ACTS: dict[str, Act] = {
    "getallvms": lambda _hostd, state, _words: records.all_vms(state),
    "get.summary": _about(records.summary),
    "device.getdevices": _about(devices.devices),
    "power.getstate": _about(lambda _state, vm: records.power_state(vm)),
    "snapshot.get": _about(lambda _state, vm: records.snapshots(vm)),
    "get.tasklist": _about(tasks.task_list),
    "message": _about(lambda _state, vm: records.message(vm)),
    "task_info": lambda _hostd, state, words: tasks.task_info(state, words[0]),
    "get_autostartseq": lambda _hostd, state, _words: records.autostart(state),
    "hostsummary": lambda _hostd, state, _words: records.host_summary(state),
    "process list": lambda _hostd, state, _words: esxcli.process_list(state),
    "filesystem list": lambda _hostd, state, _words: esxcli.filesystem_list(state),
    "cat": _cat,
    "ls": _ls,
    "date": lambda _hostd, _state, _words: f"{int(time.time())}\n",
    "dd": _dd,
    "snapshot.create": _create,
    "snapshot.remove": _remove,
    "mkdir": _mkdir,
    "clone": _clone,
    "unclone": _unclone,
    "rmdir": _rmdir,
    "rm": _rm,
    "claim": _claim,
    "write": _write,
    "update_autostartentry": _autostart_entry,
    "power.shutdown": _power(lambda hostd, state, vm: hostd.shut_down(state, vm), "", ""),
    "power.off": _power(
        lambda hostd, state, vm: hostd.power_off(state, vm, "vim-cmd"), "Powering off VM:\n", "Power off failed"
    ),
    "power.on": _power(lambda hostd, state, vm: hostd.power_on(state, vm, "vim-cmd"), "Powering on VM:\n", "Power on failed"),
}


def open_question(state: State, command: Command) -> bool:
    """vim-cmd waits as long as the power-on that it asked for waits for an answer."""
    vms = [vm for vm in present(state) if command.arguments and str(vm["vmid"]) == command.arguments[0]]
    return command.name == "power.on" and bool(vms) and vms[0]["question"] != ""
