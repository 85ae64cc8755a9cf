"""Which images do these paths name, and what else may be opened for them?

    base.vmdk [base-flat.vmdk] child.vmdk [child-sesparse.vmdk]

A descriptor's extent files are opened only when they are listed, or when they lie beside the descriptor under a name that
begins with the descriptor's own (disk.vmdk: disk-flat.vmdk, disk-s001.vmdk, …), which is what naming a descriptor means. A
listed extent is no layer of its own. Nothing else that an image says is opened; links are not followed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from tokvm.core.errors import ImageError
from tokvm.core.text import printable
from tokvm.images.base import Layer
from tokvm.images.files import LocalFile, open_file
from tokvm.images.open import open_image
from tokvm.images.vmdk.descriptor import extent_names


class ListedExtents:
    """Implements `images.base.ExtentFiles` for one descriptor: the listed files, and those that bear the descriptor's name."""

    def __init__(self, descriptor: str | Path, listed: Sequence[str | Path]) -> None:
        self._descriptor = Path(descriptor)
        self._listed = [path for path in map(Path, listed) if path != self._descriptor]

    def open(self, name: str) -> LocalFile | None:
        if Path(name).name != name or name in ("", ".", ".."):
            return None
        found = [path for path in self._listed if path.name == name]
        beside = [path for path in found if path.parent == self._descriptor.parent]
        if len(beside or found) > 1:
            what = f"{len(found)} of the listed files are called {name}"
            raise ImageError(what, where=str(self._descriptor), fix="list the right one only")
        if found:
            return open_file((beside or found)[0])
        own = self._descriptor.parent / name
        if name.startswith(f"{self._descriptor.stem}-") and own.suffix == ".vmdk" and os.path.lexists(own):
            return open_file(own, regular=True)  # a device is somebody's only when it is listed
        return None


def open_layers(paths: Sequence[str | Path], expect: Callable[[str], str | None] | None = None) -> list[Layer]:
    """The images among these files, in their order; the caller closes each layer's file. `expect`: the format of a path."""
    formats = [expect(str(path)) if expect else None for path in paths]
    with ExitStack() as on_failure:
        files: list[LocalFile] = []
        for path in paths:
            files.append(open_file(path))
            on_failure.callback(files[-1].close)
        extents = _listed_extents(paths, files, formats)
        layers: list[Layer] = []
        for number, (path, file, format_) in enumerate(zip(paths, files, formats, strict=True)):
            if number in extents:
                file.close()
                continue
            layers.append(open_image(file, expect=format_, extents=ListedExtents(path, paths)))
            on_failure.callback(layers[-1].file.close)
        on_failure.pop_all()
        return layers


def _listed_extents(paths: Sequence[str | Path], files: Sequence[LocalFile], formats: Sequence[str | None]) -> set[int]:
    """Numbers of the files that others name as their extents, so that they are no layers of their own.

    A guest may have written what looks like a descriptor at the start of its raw disk, to have another file left out. So a file
    that is an extent itself must name none of the listed files, and whose format is known to be another is not asked.
    """
    wanted = {
        number: names
        for number, (file, format_) in enumerate(zip(files, formats, strict=True))
        if format_ in (None, "vmdk") and (names := _extent_names(file))
    }
    found: dict[int, int] = {}
    for owner, names in wanted.items():
        for number, path in enumerate(paths):
            if number != owner and Path(path).name in names:
                found[number] = owner
    for number, owner in found.items():
        if number in found.values():
            raise ImageError(
                f"it is an extent of {printable(files[owner].name)}, and names another listed file as its own extent",
                where=files[number].name,
                fix=f"the guest may have written that; say what it is: --format {files[number].name}=raw",
            )
    return set(found)


def _extent_names(file: LocalFile) -> tuple[str, ...]:
    """Of a file that only begins like a descriptor: none. It is refused when it is opened, if it is to be."""
    try:
        return extent_names(file)
    except ImageError:
        return ()
