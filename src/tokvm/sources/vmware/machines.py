"""Which Vmid is a VM now, and is it still that one? Every question about a VM goes through `Machines.look`.

    uuid (config.uuid, the BIOS uuid) ──► Vmid ──► get.summary, .vmx: the same uuid, the same path?  ──► the answers of the rest
                                             ▲                    no: list all anew, once
                                             └── all Vmids, each asked who it is

A Vmid is the host's own number: registering a VM anew, a restart of the host or a move gives it another, and may give it to
another VM. Before anything is changed, `look` has just seen who bears the number.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tokvm.core.errors import SourceError
from tokvm.core.machine import PowerState
from tokvm.core.text import readable
from tokvm.sources.vmware.faults import EsxError, Fault
from tokvm.sources.vmware.fields import Fields, confused
from tokvm.sources.vmware.listings import possible_vmids
from tokvm.sources.vmware.marks import is_uuid
from tokvm.sources.vmware.places import Datastores, folder_of
from tokvm.sources.vmware.shell import Answer, Command, Shell, vim
from tokvm.sources.vmware.vmx import Dictionary

log = logging.getLogger(__name__)

_POWER = {"poweredOn": PowerState.RUNNING, "poweredOff": PowerState.OFF, "suspended": PowerState.SUSPENDED}
_ESCAPES = {"%2f": "/", "%2F": "/", "%5c": "\\", "%5C": "\\", "%25": "%"}
_VMX = re.compile(r'^[ \t]*vmPathName = "(\[.{1,4000}\.vmx)",?[ \t]*$', re.MULTILINE)
_MOST_GUESSES = 4
_GETALLVMS = vim("vmsvc/getallvms")


@dataclass(frozen=True, slots=True)
class Summary:
    """What get.summary says. question: the VM waits for a person's answer. boot: when it was last powered on."""

    vmid: int
    uuid: str
    name: str
    vmx: str
    power: PowerState
    boot: str
    question: str
    consolidation_needed: bool
    fault_tolerance: str
    template: bool
    tools_running: bool

    @classmethod
    def parse(cls, fields: Fields, vmid: int) -> Summary:
        runtime, config, guest = fields.item("runtime"), fields.item("config"), fields.item_or_none("guest")
        uuid = config.text("uuid").lower()
        if fields.reference("vm") != f"vim.VirtualMachine:{vmid}" or not is_uuid(uuid):
            raise fields.refuse("it is about another VM")
        question = runtime.item_or_none("question")
        return cls(
            vmid=vmid,
            uuid=uuid,
            name=unescaped(config.text("name")),
            vmx=config.text("vmPathName"),
            power=_POWER.get(runtime.text("powerState"), PowerState.UNKNOWN),
            boot=runtime.text_or_none("bootTime") or "",
            question="" if question is None else question.text_or_none("text") or "a question",
            consolidation_needed=runtime.truth("consolidationNeeded"),
            fault_tolerance=runtime.text_or_none("faultToleranceState") or "notConfigured",
            template=config.truth("template"),
            tools_running=guest is not None and guest.text_or_none("toolsRunningStatus") == "guestToolsRunning",
        )


@dataclass(frozen=True, slots=True)
class Place:
    """Where a VM is registered. vmx: path from the root; folder: its directory."""

    vmid: int
    vmx: str

    @property
    def folder(self) -> str:
        return folder_of(self.vmx)

    @property
    def vmsd(self) -> str:
        return self.vmx.removesuffix(".vmx") + ".vmsd"

    def file(self, name: str) -> str:
        return f"{self.folder}/{name}"


@dataclass(frozen=True, slots=True)
class Seen:
    """One VM, just seen."""

    place: Place
    summary: Summary
    settings: Dictionary

    @property
    def vmid(self) -> int:
        return self.place.vmid

    @property
    def texts(self) -> tuple[str, ...]:
        """What people wrote, for dumps in which it stands unescaped."""
        return texts_of(self.settings)


class Machines:
    """The VMs of one host. Thread-safe: what is kept is only a first guess."""

    def __init__(self, shell: Shell) -> None:
        self._shell = shell
        self._places: dict[str, Place] = {}
        self._stores: Datastores | None = None
        self.over: set[str] = set()
        """Tasks that were seen to be over, and so are for ever."""

    @property
    def where(self) -> str:
        return self._shell.where

    def stores(self, *, anew: bool = False) -> Datastores:
        if self._stores is None or anew:
            self._stores = Datastores.ask(self._shell)
        return self._stores

    def all(self) -> list[Summary]:
        """All VMs. One whose answer cannot be believed is left out, with a warning."""
        found, odd = self._survey()
        for text in odd:
            log.warning("%s: left out: %s", self.where, text)
        return found

    def _survey(self) -> tuple[list[Summary], list[str]]:
        """All VMs, and what is wrong with the answers that cannot be believed."""
        found: list[Summary] = []
        odd: list[str] = []
        for answer, vmid in self._summaries():
            if answer.refusal() is not None:  # it went, or it was a line of somebody's annotation
                continue
            try:
                found.append(self._summary(answer, vmid))
            except SourceError as refused:
                odd.append(f"Vmid {vmid}: {refused.what}")
        return found, odd

    def _summary(self, answer: Answer, vmid: int) -> Summary:
        """What does not parse by itself does so when the texts in it are known; the .vmx that it names has them."""
        try:
            return Summary.parse(answer.fields(), vmid)
        except SourceError:
            for vmx in list(dict.fromkeys(_VMX.findall(answer.text)))[:_MOST_GUESSES]:
                settings = self._shell.ask([("cat", self._path(vmx))])[0]
                if settings.code:
                    continue
                said = Summary.parse(answer.fields(known=texts_of(self._settings(settings))), vmid)
                if said.vmx == vmx and _is_of(self._settings(settings), said.uuid):
                    return said
            raise

    def _summaries(self) -> list[tuple[Answer, int]]:
        text = self._shell.ask_one(*_GETALLVMS)
        try:
            vmids = possible_vmids(text)
        except ValueError as exc:
            raise confused(self.where, " ".join(_GETALLVMS), str(exc)) from exc
        answers = self._shell.ask([vim("vmsvc/get.summary", vmid) for vmid in vmids])
        return list(zip(answers, vmids, strict=True))

    def look(self, uuid: str, more: Callable[[Place], Sequence[Command]] = lambda _: ()) -> tuple[Seen, list[Answer]]:
        """The VM as it is now, and the answers to the commands of `more`. EsxError when this host has it no more."""
        place = self._places.get(uuid) or self._find(uuid)
        for attempt in (1, 2):
            first, settings, *rest = self._shell.ask([vim("vmsvc/get.summary", place.vmid), ("cat", place.vmx), *more(place)])
            seen = self._believed(uuid, place, first, settings, first_try=attempt == 1)
            if seen is not None:
                return seen, rest
            if attempt == 1:
                place = self._find(uuid)
        raise confused(self.where, first.what, "the VM's number or place changes again and again")

    def _believed(self, uuid: str, place: Place, summary: Answer, settings: Answer, *, first_try: bool) -> Seen | None:
        """None when the number is another VM's now, or the VM lies elsewhere."""
        refusal = summary.refusal()
        if refusal is not None and refusal.fault is Fault.NO_SUCH_VM:
            return None
        if settings.code:
            summary.checked()
            if not first_try:
                raise self._unreadable(settings)
            return None
        found = self._settings(settings)
        said = Summary.parse(summary.fields(known=texts_of(found)), place.vmid)
        if said.uuid != uuid or self._path(said.vmx) != place.vmx:
            return None
        if not _is_of(found, uuid):
            raise confused(self.where, settings.what, f"its uuid.bios is not that of VM {uuid}")
        self._places[uuid] = place
        return Seen(place, said, found)

    def _unreadable(self, settings: Answer) -> SourceError:
        _, said = self._shell.said(settings.command)
        return SourceError(
            f"the VM's .vmx cannot be read: {readable(said.strip(), limit=200)}",
            where=self.where,
            fix="look whether its datastore is there, and the file",
        )

    def _settings(self, answer: Answer) -> Dictionary:
        """A .vmx, whose texts can be read."""
        try:
            found = Dictionary(answer.text)
            texts_of(found)
            _is_of(found, "")
        except ValueError as exc:
            raise confused(self.where, answer.what, str(exc)) from exc
        return found

    def _find(self, uuid: str) -> Place:
        self._places.pop(uuid, None)
        everything, odd = self._survey()
        found = [one for one in everything if one.uuid == uuid]
        if not found and odd:
            raise SourceError(
                f"it may be one of {len(odd)} whose answers cannot be believed: {odd[0]}",
                where=f"{self.where} VM {uuid}",
                fix="take quotes that end a line out of its notes and file names; a guest's host name may hold one, too",
            )
        if not found:
            raise EsxError(
                "this host has no such VM (any more)",
                where=f"{self.where} VM {uuid}",
                fix="look with `tokvm ls`; vMotion may have moved it: name the host that runs it in the source's URL, and keep "
                "it there (DRS to manual)",
                fault=Fault.NO_SUCH_VM,
            )
        if len(found) > 1:
            raise SourceError(
                f"{len(found)} VMs have this uuid: "
                + ", ".join(f"{readable(one.name)} ({readable(one.vmx)})" for one in found),
                where=f"{self.where} VM {uuid}",
                fix="one is a copy that was registered as moved; give it another uuid (uuid.bios in its .vmx, while it is off)",
            )
        return Place(found[0].vmid, self._path(found[0].vmx))

    def _path(self, vmx: str) -> str:
        """The datastores are listed anew when one is not known: it may have been mounted or renamed since."""
        try:
            path = self.stores().path(vmx)
        except SourceError:
            path = self.stores(anew=True).path(vmx)
        if not path.endswith(".vmx") or "/" not in path.removeprefix(f"{self.stores().of(path).mount}/"):
            raise confused(
                self.where, "vim-cmd vmsvc/get.summary", f"{readable(repr(vmx), limit=200)} is no .vmx in a directory"
            )
        return path


def texts_of(settings: Dictionary) -> tuple[str, ...]:
    """ValueError when one is said twice."""
    return tuple(text for key in ("displayName", "annotation") if (text := settings.get(key)))


def _is_of(settings: Dictionary, uuid: str) -> bool:
    """Is this .vmx that VM's? An encrypted one does not say."""
    said = re.sub(r"[ -]", "", settings.get("uuid.bios")).lower()
    return said in ("", uuid.replace("-", ""))


def unescaped(name: str) -> str:
    """vSphere writes %, / and \\ of a name as %25, %2f and %5c."""
    parts = name.split("%")
    found = parts[0]
    for part in parts[1:]:
        sign = _ESCAPES.get(f"%{part[:2]}")
        found += f"%{part}" if sign is None else sign + part[2:]
    return found
