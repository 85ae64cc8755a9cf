"""Text from outside (names, paths, answers of hosts, strings in images), made fit to be shown."""

from __future__ import annotations


def printable(text: str) -> str:
    """Control characters, terminal escapes and lone surrogates are shown (`\\x1b`), not obeyed. Nothing is left out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def readable(text: str, *, limit: int = 300) -> str:
    """`printable`, for one line of a message: cut where it gets long."""
    shown = printable(text[:limit])
    return shown + "…" if len(text) > limit else shown
