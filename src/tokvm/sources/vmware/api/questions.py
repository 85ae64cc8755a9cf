"""A VM that asks a question stands still until a person answers: we show it, and never answer it."""

from __future__ import annotations

from typing import Any

from tokvm.core.errors import SourceError
from tokvm.core.text import readable


def text_of(question: Any) -> str:
    choices = getattr(getattr(question, "choice", None), "choiceInfo", None) or ()
    answers = ", ".join(readable(str(one.label), limit=60) for one in choices)
    return readable(str(question.text), limit=300) + (f" (answers: {answers})" if answers else "")


def raise_if_asked(question: Any, *, where: str) -> None:
    if question is not None:
        raise SourceError(
            f"the VM waits for an answer: {text_of(question)}",
            where=where,
            fix="answer it in the vSphere client, then run the same command again",
        )
