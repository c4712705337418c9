"""What a study is about, from a YAML file or from the command line, checked before anything runs.

```yaml
name: small
models: [./SmolLM2-135M]                 # folders or hub ids
recipes:                                 # names, paths or schemes, as for `llmquant quantize --recipe`
  - int8
  - {recipe: int4-g64, algorithms: [search, gptq]}
bits: [4.25]                             # budgets: a scheme for each weight
schemes: [int3-g64, int4-g64, int6-g64]  # what they choose from
texts: [builtin]
context: 2048
windows: 8
```
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from llmquant.documents import read_yaml
from llmquant.errors import DocumentError, StudyError

Metric = Literal["quality", "noise", "size", "speed", "layers", "tasks"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]

DEFAULT_METRICS: tuple[Metric, ...] = ("quality", "noise", "size", "speed", "layers")


def _listed(value: Any) -> Any:
    """A single item, or several with commas, as a list: what the command line has."""
    if isinstance(value, str):
        return [item.strip() for item in value.split(",") if item.strip()]
    return [value] if isinstance(value, int | float | Mapping) else value


Names = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_listed)]


class Part(BaseModel):
    """What all parts of a study share: unknown keys are refused, and nothing changes after the check."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class RecipeEntry(Part):
    """A recipe of a study.

    Attributes:
        recipe: name, path or scheme.
        algorithms: for this recipe alone, in place of the study's.
        label: its name in results; several algorithms are added to it.
    """

    recipe: str = Field(min_length=1)
    algorithms: Names | None = None
    label: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return {"recipe": value} if isinstance(value, str) else value


class Calibration(Part):
    """What is read where a recipe needs a text.

    Attributes:
        text: `builtin`, `wikitext2` (its train split), or a path.
        tokens: how many; None is 65536 for algorithms that go block by block, else 8192.
        seed: which windows of the text.
    """

    text: str = "builtin"
    tokens: int | None = Field(default=None, ge=1)
    seed: int = 0


class ReferencePart(Part):
    """How the 16-bit model runs.

    Attributes:
        dtype: to compute in; None is the study's.
    """

    dtype: Dtype | None = None


class Speed(Part):
    """What tokens per second are measured on: a prompt of so many tokens, so many new ones, so many rounds.

    The peak of memory is that of reading such a prompt, too.
    """

    prompt: int = Field(default=256, ge=1)
    new: int = Field(default=32, ge=2)
    rounds: int = Field(default=3, ge=1)


class TaskOptions(Part):
    """How tasks run: a folder with tasks of one's own, at most so many documents, so many at a time."""

    path: str | None = None
    limit: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=1, ge=1)


class Resources(Part):
    """What a cell takes of a cluster (`--engine ray`), and how often a killed worker's cell is tried again.

    Attributes:
        cpus: None is the threads of a cell.
        gpus: may be a fraction.
        memory: bytes, None says nothing.
        retries: after the first attempt.
    """

    cpus: float | None = Field(default=None, gt=0)
    gpus: float = Field(default=0, ge=0)
    memory: int | None = Field(default=None, gt=0)
    retries: int = Field(default=2, ge=0)


class Study(Part):
    """Models and what is to be tried on each; every pair of a model and a candidate is measured on every text.

    Paths are relative to where the command runs.

    Attributes:
        name: of the study.
        models: folders or hub ids of 16-bit models.
        recipes: see `RecipeEntry`.
        bits: budgets, in bits per quantized weight.
        schemes: what budgets choose from; empty is the usual ones.
        algorithms: each is tried with each recipe and budget whose format has it; empty is what recipes say.
        texts: what is measured on: `builtin`, `wikitext2` (its test split) or paths.
        context, windows: as for `llmquant eval`; 0 windows are all.
        dtype: what quality is computed in. float32 keeps the noise of 16-bit arithmetic out of the comparison. Sizes
            and speed are those of the model's own dtype, in which people run it.
        metrics: what is measured; `tasks` is added where tasks are named.
        tasks: names for lm-eval.
        task_options, calibration, reference, speed, resources: see their classes.
    """

    name: str = Field(default="study", min_length=1)
    models: Names = Field(min_length=1)
    recipes: Annotated[tuple[RecipeEntry, ...], BeforeValidator(_listed)] = ()
    bits: Annotated[tuple[Annotated[float, Field(gt=0)], ...], BeforeValidator(_listed)] = ()
    schemes: Names = ()
    algorithms: Names = ()
    texts: Names = Field(default=("builtin",), min_length=1)
    context: int = Field(default=2048, ge=2)
    windows: int = Field(default=8, ge=0)
    dtype: Dtype = "float32"
    metrics: Annotated[tuple[Metric, ...], BeforeValidator(_listed)] = Field(default=DEFAULT_METRICS, min_length=1)
    tasks: Names = ()
    task_options: TaskOptions = TaskOptions()
    calibration: Calibration = Calibration()
    reference: ReferencePart = ReferencePart()
    speed: Speed = Speed()
    resources: Resources = Resources()

    @model_validator(mode="after")
    def _complete(self) -> Study:
        if not self.recipes and not self.bits:
            raise ValueError("there is nothing to try: name recipes, or bits")
        if self.schemes and not self.bits:
            raise ValueError("schemes are what bits choose from, and there are no bits")
        if "tasks" in self.metrics and not self.tasks:
            raise ValueError("the metric tasks needs tasks: [names]")
        return self

    def measures(self, metric: Metric) -> bool:
        """Whether a metric is asked for."""
        return metric in self.metrics or (metric == "tasks" and bool(self.tasks))


def load_study(path: str | Path) -> Study:
    """A study from a YAML file; without a name it gets the file's.

    Raises:
        StudyError: for a file that cannot be read, and for keys and values that cannot be, with the place of each.
    """
    return parse_study(read_study(path), str(path))


def read_study(path: str | Path) -> dict[str, Any]:
    """What a study's file says, not yet checked. Raises `StudyError`."""
    path = Path(path)
    try:
        content = read_yaml(path)
    except DocumentError as error:
        raise StudyError(f"cannot read the study: {error.what}", where=str(path)) from error
    if not isinstance(content, Mapping):
        raise StudyError("a study is a mapping", where=str(path), hint=f"with the keys {', '.join(Study.model_fields)}")
    return {"name": path.stem, **content}


def parse_study(content: Mapping[str, Any], where: str) -> Study:
    """A study from plain values. Raises `StudyError`, which names every problem, its place and what is allowed."""
    try:
        return Study.model_validate(dict(content))
    except ValidationError as error:
        problems = [_problem(detail) for detail in error.errors()]
        count = "" if len(problems) == 1 else f"{len(problems)} problems: "
        raise StudyError(count + "\n  ".join(problems), where=where, hint="llmquant sweep --help") from error


def _problem(detail: Any) -> str:
    """One line about one place: `recipes[1].algoritms: unknown key; did you mean algorithms?`"""
    place, message = _place(detail["loc"]), str(detail["msg"]).removeprefix("Value error, ")
    if detail["type"] == "extra_forbidden":
        return f"{place}: unknown key; {_near(detail['loc'])}"
    if detail["type"] in ("value_error", "missing"):
        return f"{place}: {message}" if place else message
    return f"{place}: {message}, not {detail['input']!r}"


def _place(loc: Sequence[Any]) -> str:
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f"{'.' if text else ''}{part}"
    return text


def _near(loc: Sequence[Any]) -> str:
    """What an unknown key may have meant, among the keys of its own part."""
    known = list(_part_at(loc[:-1]).model_fields)
    near = difflib.get_close_matches(str(loc[-1]), known, n=2)
    return f"did you mean {' or '.join(near)}?" if near else f"allowed are {', '.join(known)}"


def _part_at(loc: Sequence[Any]) -> type[Part]:
    parts: dict[str, type[Part]] = {
        "recipes": RecipeEntry,
        "task_options": TaskOptions,
        "calibration": Calibration,
        "reference": ReferencePart,
        "speed": Speed,
        "resources": Resources,
    }
    return parts.get(str(loc[0]), Study) if loc else Study
