"""Which images do these paths name, and what else may be opened for them?

    base.vmdk [base-flat.vmdk] child.vmdk [child-sesparse.vmdk]

A descriptor's extent files are opened only when they are listed, or when they lie beside the descriptor under a name that
begins with the descriptor's own (disk.vmdk: disk-flat.vmdk, disk-s001.vmdk, …), which is what naming a descriptor means. A
listed extent is no layer of its own. Nothing else that an image says is opened; links are not followed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from tokvm.core.errors import ImageError
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
        if name.startswith(f"{self._descriptor.stem}-") and own.suffix == ".vmdk" and own.exists():
            return open_file(own)
        return None


def open_layers(paths: Sequence[str | Path], expect: Callable[[str], str | None] | None = None) -> list[Layer]:
    """The images among these files, in their order; the caller closes each layer's file. `expect`: the format of a path."""
    with ExitStack() as on_failure:
        files: list[LocalFile] = []
        for path in paths:
            files.append(open_file(path))
            on_failure.callback(files[-1].close)
        wanted = {(number, name) for number, file in enumerate(files) for name in extent_names(file)}
        layers: list[Layer] = []
        for number, (path, file) in enumerate(zip(paths, files, strict=True)):
            if any(Path(path).name == name and number != other for other, name in wanted):
                file.close()
                continue
            extents = ListedExtents(path, paths)
            layers.append(open_image(file, expect=expect(str(path)) if expect else None, extents=extents))
            on_failure.callback(layers[-1].file.close)
        on_failure.pop_all()
        return layers
