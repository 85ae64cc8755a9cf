"""From a plan's choices to targets that can be opened."""

from __future__ import annotations

from tokvm.app.plan import TargetChoice
from tokvm.targets.open import TargetSpec


def target_spec(path: str, overwrite: str | None) -> TargetSpec:
    """`overwrite` repeats the size or serial of what may be lost; without it a target with content is refused."""
    return TargetSpec(path=path, force=overwrite is not None, confirm=overwrite)


def spec_of(choice: TargetChoice) -> TargetSpec:
    return target_spec(choice.path, choice.overwrite)
