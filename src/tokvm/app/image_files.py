"""Image files as the command line names them: opened, chained, closed again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from tokvm.core.errors import UsageError
from tokvm.images.base import Layer
from tokvm.images.chain import Chain
from tokvm.images.listed import open_layers as open_listed
from tokvm.images.open import FORMATS


@dataclass(frozen=True, slots=True)
class Formats:
    """What the operator says about formats. every: of all files; named: of some, by their path as given."""

    every: str | None = None
    named: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, texts: Sequence[str]) -> Formats:
        """`vhd`, or `FILE=vhd`; several of them. UsageError for a format that is not read here."""
        every: str | None = None
        named: list[tuple[str, str]] = []
        for text in texts:
            path, _, format_ = text.rpartition("=")
            if format_ not in FORMATS:
                what = f"{format_!r} is no format that is read here"
                raise UsageError(what, fix=f"one of {', '.join(FORMATS)}, or FILE=FORMAT")
            if path:
                named.append((path, format_))
            else:
                every = format_
        return cls(every, tuple(named))

    def of(self, path: str) -> str | None:
        return dict(self.named).get(path, self.every)


@contextmanager
def open_layers(paths: Sequence[str], formats: Formats | None = None) -> Iterator[list[Layer]]:
    """The images among these files (see `images.listed`), in their order; closed at the end."""
    layers = open_listed(paths, (formats or Formats()).of)
    try:
        yield layers
    finally:
        for layer in layers:
            layer.file.close()


@contextmanager
def open_chain(paths: Sequence[str], *, force_linkage: bool = False, formats: Formats | None = None) -> Iterator[Chain]:
    """The chain of these files, base first, with its linkage checked."""
    with open_layers(paths, formats) as layers:
        yield Chain.open(layers, force_linkage=force_linkage)
