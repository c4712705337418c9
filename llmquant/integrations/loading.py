"""Loading models and tokenizers through transformers, with llmquant registered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmquant.checkpoint.config_file import read_config
from llmquant.checkpoint.source import refuse_pickles
from llmquant.errors import ModelNotFoundError


def load(path: str | Path, **kwargs: Any) -> Any:
    """`AutoModelForCausalLM.from_pretrained(path, **kwargs)`, with llmquant registered.

    Of a checkpoint nothing is executed unless it is asked for (`trust_remote_code=True`, `use_safetensors=False`).

    Raises:
        ModelNotFoundError: for an architecture that transformers does not know.
        PickleError: where the weights are pickles.
    """
    import transformers
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    import llmquant.integrations.transformers  # noqa: F401  (registers the quantizer)

    kind = _model_type(Path(path))
    if kind is not None and kind not in CONFIG_MAPPING and not kwargs.get("trust_remote_code"):
        raise ModelNotFoundError(
            f"transformers {transformers.__version__} does not know the architecture {kind!r}",
            where=str(path),
            hint="llmquant.load_raw gives its tensors by key; or trust_remote_code=True for code that you trust",
        )
    if Path(path).is_dir() and kwargs.get("use_safetensors") is not False:
        refuse_pickles(Path(path))
    return AutoModelForCausalLM.from_pretrained(path, **{"trust_remote_code": False, **kwargs})


def _model_type(folder: Path) -> str | None:
    """As config.json of a local folder says."""
    return read_config(folder)["model_type"] if (folder / "config.json").is_file() else None


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer beside a model. Raises `ModelNotFoundError` where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelNotFoundError(
            f"no tokenizer can be loaded: {error}", where=str(path), hint="copy the original's tokenizer files there"
        ) from error
