"""A whole conversion: from a plain checkpoint and a recipe, or a budget, to a quantized checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from llmquant.checkpoint.crew import ALONE, Crew
from llmquant.checkpoint.origin import Origin
from llmquant.checkpoint.stream import DEFAULT_SHARD_BYTES
from llmquant.config.recipe import Recipe
from llmquant.convert.budget import Budget
from llmquant.convert.calibrated import Calibrating, Reading
from llmquant.convert.listener import Listener, Silent
from llmquant.convert.prepared import Preparation

if TYPE_CHECKING:
    from llmquant.config.fqn import FqnToConfig
    from llmquant.quantize import QuantizationReport
    from llmquant.tune.mixture import Mixture


@dataclass(frozen=True)
class Conversion:
    """What is to become of a checkpoint.

    Attributes:
        recipe: what each weight gets, and what is done to the plain model first.
        reading: the text that is read where anything needs one.
        budget: chooses what each weight gets in the recipe's place.
        rotate_seed: of a rotation.
        imatrix: file of the importance of columns.
        dtype: of what stays in float, by name.
    """

    recipe: Recipe
    reading: Reading = field(default_factory=Reading)
    budget: Budget | None = None
    rotate_seed: int = 0
    imatrix: Path | None = None
    dtype: str = "auto"

    def write(
        self,
        model: str | Origin,
        output: Path,
        *,
        overwrite: bool = False,
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
        crew: Crew = ALONE,
        ignore_memory: bool = False,
        listener: Listener | None = None,
        on_mixture: Callable[[Mixture], object] | None = None,
        on_plain: Callable[[str], object] | None = None,
    ) -> tuple[QuantizationReport, dict[str, object]]:
        """Writes the quantized checkpoint.

        Args:
            model: folder, hub id or `Origin` of the plain one.
            output: the folder to make; it appears when it is complete.
            overwrite: whether an existing one is replaced.
            max_shard_bytes: largest shard.
            crew: tensors at a time.
            ignore_memory: go on where memory will hardly do.
            crew: how many tensors are at work at a time.
            listener: hears how it goes.
            on_mixture: called with what the budget chose.
            on_plain: called when all is written, with the folder of the plain model that was quantized: the given one,
                or its changed copy, which is gone afterwards.

        Returns:
            The report of every weight, and the reports of the changes by name.

        Raises:
            What `quantize_checkpoint`, `quantize_with_data_`, `choose_mixture`, `rotate_`, `awq_` and `smoothquant_`
            raise.
        """
        listener = listener or Silent()
        config, changes = self.recipe.config, self.recipe.changes
        preparation = Preparation(changes, self.rotate_seed, listener)
        with preparation.applied(model, output, config, self.reading, self.imatrix, self.dtype) as plain:
            if self.budget:
                config = self._chosen(self.budget, plain, listener, on_mixture)
            was_read = changes.migrate is not None or self.budget is not None
            work = Calibrating(
                plain, config, self.reading, self.imatrix, self.dtype, was_read=was_read, listener=listener
            )
            report = work.write(output, overwrite, max_shard_bytes, crew, ignore_memory)
            if on_plain:
                on_plain(str(plain))
        return report, preparation.reports

    def _chosen(
        self, budget: Budget, plain: str | Origin, listener: Listener, on_mixture: Callable[[Mixture], object] | None
    ) -> FqnToConfig:
        mixture = budget.choose(plain, self.reading, self.dtype, listener)
        if on_mixture:
            on_mixture(mixture)
        return mixture.config
