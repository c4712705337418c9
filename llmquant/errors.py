"""One class per failure that a user can see. Each message says what, where and what to try.

The command line turns every `LlmQuantError` into a short message and its exit status, mostly 2.
Broken invariants of the library itself are `assert`s, never these.
"""

from __future__ import annotations


class LlmQuantError(ValueError):
    """Base of all errors meant for users.

    Args:
        what: the failure in one sentence.
        where: the FQN, file, key or shape it is about.
        hint: what to try next.

    Attributes:
        status: the exit status of the command line.
    """

    status = 2

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        self.what, self.where, self.hint = what, where, hint
        lines = [what]
        if where:
            lines.append(f"  where: {where}")
        if hint:
            lines.append(f"  try:   {hint}")
        super().__init__("\n".join(lines))


class ConfigError(LlmQuantError):
    """A config, scheme or recipe that says something impossible or unknown."""


class UnmatchedKeyError(ConfigError):
    """A key of an `FqnToConfig` that names no quantizable weight."""


class ConflictingConfigError(ConfigError):
    """Two different configs for one (tied) weight."""


class ModelNotFoundError(LlmQuantError):
    """A folder or hub id that is missing or holds no Hugging Face checkpoint."""


class NothingToQuantizeError(LlmQuantError):
    """A model without any weight that the config would quantize."""


class AlreadyQuantizedError(LlmQuantError):
    """A model or weight that is quantized already."""


class NotPreparedError(LlmQuantError):
    """A model to convert that was never prepared for quantization-aware training."""


class BadWeightError(LlmQuantError):
    """A weight whose values cannot be quantized: NaN, infinite, empty, or out of the scale's range."""


class CalibrationError(LlmQuantError):
    """A weight that needs a calibration run and got none, or one that the run cannot say enough about."""


class UnknownArchitectureError(LlmQuantError):
    """A model of which it is not known what feeds what, or one that a change of its weights would break."""


class BudgetError(LlmQuantError):
    """A budget of bits or bytes that no choice of schemes can meet."""


class CheckpointError(LlmQuantError):
    """A checkpoint that is incomplete, truncated, mixed from two saves, or of an unknown version."""


class HeaderError(CheckpointError):
    """A safetensors file that is missing, truncated or foreign, or whose header says something impossible."""


class IndexFileError(CheckpointError):
    """An index of shards that cannot be read, names files outside of its folder, or does not fit the shards."""


class ManifestError(CheckpointError):
    """A manifest that says something impossible of a weight, or contradicts itself or the files."""


class ChecksumError(CheckpointError):
    """Checksums of tensors that are promised and missing, or are none."""


class UnsafePathError(CheckpointError):
    """A file of a checkpoint that lies, or leads, outside of its folder."""


class PickleError(CheckpointError):
    """Weights as pickles: reading them can run whatever code is in them, so they are not read."""


class DocumentError(LlmQuantError):
    """JSON or YAML that cannot be read, is too large, nests too deep, or says a thing twice."""


class ExportError(LlmQuantError):
    """A weight, tokenizer or architecture that another program's format cannot hold as it is."""


class HubError(LlmQuantError):
    """An upload that the hub refused, or that did not get through."""


class NoSpaceError(LlmQuantError):
    """A disk without room for the result."""


class NotEnoughMemoryError(LlmQuantError):
    """A machine, or a limit, without memory for the work."""


class OutputExistsError(LlmQuantError):
    """An output folder that exists already and may not be replaced."""


class UnfinishedRunError(OutputExistsError):
    """Unfinished work beside an output that is of another run, or at which another process is."""


class TextError(LlmQuantError):
    """An evaluation text that is missing, empty or too short."""


class ReportError(LlmQuantError):
    """Results of a study that are missing, damaged or of an unknown version."""


class StudyError(ConfigError):
    """A study that says something impossible or unknown."""


class StudyLockedError(LlmQuantError):
    """A study's folder in which another sweep is at work."""


class WorkerDiedError(LlmQuantError):
    """A process that ended before it had a result: killed, or out of memory."""


class ReferenceFileError(LlmQuantError):
    """A file of reference logits that is cut, changed, of an unknown version, or no such file."""


class UnsupportedOpError(LlmQuantError, NotImplementedError):
    """An operation that a quantized tensor does not support."""


class LoweringError(LlmQuantError):
    """A quantized graph of which some products have no int8 kernel, where all were wanted."""


class GraphMismatchError(LlmQuantError):
    """Two graphs to compare that do not come from one export."""


class MissingDependencyError(LlmQuantError, ImportError):
    """An optional package that this command needs."""


class TaskError(LlmQuantError):
    """A task of lm-eval that is unknown, cannot be loaded here, or cannot be run as asked."""


class ProgramError(LlmQuantError):
    """A program that cannot be executed, or would run without llmquant."""

    status = 126


class ProgramNotFoundError(ProgramError):
    """A program that does not exist."""

    status = 127
