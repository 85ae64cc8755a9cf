"""Tasks: queued, running, then success or error, each after its time, whoever looks or not."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pyVmomi import vim, vmodl

from tokvm.testing.vsphere.clock import Clock, moment

LOOK_S = 0.02
Act = Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Pace:
    """How long tasks are queued, and run before they act; the clock's seconds."""

    queued_s: float
    running_s: float


class Tasks:
    def __init__(self, clock: Clock, failed: Callable[[str, BaseException], None]) -> None:
        """failed: told of an act that ended in what is no fault of the API, a defect of ours."""
        self._clock = clock
        self._failed = failed
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._numbers = itertools.count(1)
        self._infos: dict[str, Any] = {}
        self._threads: list[threading.Thread] = []

    def begin(self, name: str, entity: Any, entity_name: str, user: str, act: Act, pace: Pace) -> Any:
        """Start a task `VirtualMachine.createSnapshot` on an object; `act` returns its result or raises its fault."""
        key = f"task-{next(self._numbers)}"
        task = vim.Task(key, None)
        info = vim.TaskInfo(
            key=key,
            task=task,
            descriptionId=name,
            entity=entity,
            entityName=entity_name,
            state=vim.TaskInfo.State.queued,
            cancelled=False,
            cancelable=False,
            reason=vim.TaskReasonUser(userName=user),
            queueTime=moment(self._clock.now()),
            eventChainId=next(self._numbers),
        )
        with self._lock:
            self._infos[key] = info
            thread = threading.Thread(target=self._run, args=(info, act, pace), name=key, daemon=True)
            self._threads.append(thread)
        thread.start()
        return task

    def info(self, key: str) -> Any:
        """TaskInfo as it is now; KeyError."""
        with self._lock:
            held = self._infos[key]
            fields = {one.name: getattr(held, one.name) for one in held._GetPropertyList()}
        return vim.TaskInfo(**{name: value for name, value in fields.items() if value is not None})

    def keys_of(self, entity: Any = None) -> list[str]:
        """In order of their beginning."""
        with self._lock:
            return [key for key, one in self._infos.items() if entity is None or one.entity == entity]

    def under_way(self, entity: Any) -> Any:
        """The task that works on the object, or None."""
        busy = (vim.TaskInfo.State.queued, vim.TaskInfo.State.running)
        with self._lock:
            return next((one.task for one in self._infos.values() if one.entity == entity and one.state in busy), None)

    def forget(self) -> None:
        """As after a restart of vpxd: what has ended is not known any more."""
        busy = (vim.TaskInfo.State.queued, vim.TaskInfo.State.running)
        with self._lock:
            self._infos = {key: one for key, one in self._infos.items() if one.state in busy}

    def close(self) -> None:
        """Tasks that have not acted yet never will."""
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def _run(self, info: Any, act: Act, pace: Pace) -> None:
        if not self._pass(pace.queued_s):
            return
        self._set(info, state=vim.TaskInfo.State.running, startTime=moment(self._clock.now()), progress=0)
        if not self._pass(pace.running_s):
            return
        self._set(info, progress=50)
        try:
            result = act()
        except vmodl.MethodFault as fault:
            self._end(info, state=vim.TaskInfo.State.error, error=fault)
        except BaseException as exc:  # noqa: BLE001  whoever runs the test must see it
            self._failed(info.key, exc)
            self._end(info, state=vim.TaskInfo.State.error, error=vmodl.fault.SystemError(reason=repr(exc), msg=repr(exc)))
        else:
            self._end(info, state=vim.TaskInfo.State.success, result=result, progress=None)

    def _pass(self, seconds: float) -> bool:
        """Let so much of the clock's time pass, which tests may move; False when everything ends before."""
        due = self._clock.now() + seconds
        while (left := due - self._clock.now()) > 0:
            if self._ended.wait(min(left, LOOK_S)):
                return False
        return True

    def _end(self, info: Any, **fields: Any) -> None:
        self._set(info, completeTime=moment(self._clock.now()), **fields)

    def _set(self, info: Any, **fields: Any) -> None:
        with self._lock:
            for name, value in fields.items():
                setattr(info, name, value)
