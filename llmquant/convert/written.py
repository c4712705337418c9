"""Finished blocks of a model that go straight into the output, and come back from it after an interruption."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from llmquant.tune.journal import Part

if TYPE_CHECKING:
    from llmquant.checkpoint.output import Output
    from llmquant.checkpoint.stream import Job
    from llmquant.tensor import QuantizedTensor


class Written:
    """The parts of a run by blocks (`tune.journal.Parts`), kept where they are needed in the end.

    Args:
        job: what is done.
        out: where to.
    """

    def __init__(self, job: Job, out: Output) -> None:
        self._steps = {step.fqn: step for step in job.work.steps if step.chosen is not None}
        self._out = out

    def load(self, part: str) -> Part | None:
        """The weights and warnings of a part; None if it is not finished."""
        name = _name(part)
        if not self._out.has(name):
            return None
        note = self._out.note(name)
        return Part({fqn: self._weight(fqn) for fqn in note["weights"]}, note["warnings"])

    def save(self, part: str, weights: Mapping[str, QuantizedTensor], warnings: Sequence[str]) -> None:
        """Writes the weights of a part; returns when they are on the disk. Raises `NoSpaceError`."""
        from llmquant.checkpoint.files import no_space_errors
        from llmquant.checkpoint.state import components

        digests: dict[str, str] = {}
        with no_space_errors(self._out.folder):
            for fqn, weight in weights.items():
                digests |= self._out.write(components(fqn, weight))
            self._out.finish(_name(part), digests, {"weights": list(weights), "warnings": list(warnings)})
            self._out.commit()

    def _weight(self, fqn: str) -> QuantizedTensor:
        from llmquant.checkpoint.state import assemble
        from llmquant.checkpoint.steps import entry_of

        step = self._steps[fqn]
        assert step.chosen is not None
        tensors = {key: self._out.read(key, spec) for key, spec in step.written.items()}
        return assemble(fqn, entry_of(*step.chosen), tensors, step.plain[0])


def _name(part: str) -> str:
    """A name that no weight has."""
    return f"block {part or '(rest)'}"
