"""The model card of a quantized checkpoint: what it came from, how it was made, what it costs, how to load it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from llmquant.checkpoint.inspect import Inspection, inspect_checkpoint
from llmquant.checkpoint.source import locate, read_config
from llmquant.config.base import from_dict
from llmquant.errors import ConfigError, LlmQuantError

TAG = "llmquant"
_KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag", "datasets")
"""What a card takes over from the original's."""

_LOAD = """```python
import llmquant  # pip install llmquant; registers the format with transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

Programs that never heard of llmquant: `llmquant run -- transformers serve {name}`. Other formats:
`llmquant export {name} --to gguf -o model.gguf`."""


def model_card(
    folder: str | Path,
    *,
    repo_id: str | None = None,
    base_model: str | None = None,
    evaluation: str | Path | Mapping[str, Any] | None = None,
) -> str:
    """A card in Markdown, with the hub's metadata in front, read from a quantized folder.

    Args:
        folder: what llmquant quantized.
        repo_id: where it will lie on the hub; without it the snippet names the folder.
        base_model: hub id of the original; None looks for it in the original's card and config.json.
        evaluation: what `llmquant eval --json` wrote: a path, or its content.

    Raises:
        ModelNotFoundError, CheckpointError: for a folder that is no quantized checkpoint.
        ConfigError: for an evaluation that is none.
    """
    path = locate(folder)
    found, config = inspect_checkpoint(path), read_config(path)
    if found.save_id is None:
        raise ConfigError("the model is not quantized by llmquant", where=str(path), hint="llmquant quantize first")
    original = front_matter(path / "README.md")
    base = base_model or _base(original, config)
    name = repo_id or path.resolve().name
    parts = [
        f"---\n{yaml.safe_dump(_metadata(original, base, found), sort_keys=False)}---",
        f"# {name.rpartition('/')[2]}",
        _introduction(base),
        f"## Recipe\n\n{_recipe(found)}",
        f"## Size\n\n{_sizes(found, config)}",
        *([f"## Evaluation\n\n{_evaluation(read_evaluation(evaluation))}"] if evaluation else []),
        f"## How to load it\n\n{_LOAD.format(name=name)}",
    ]
    return "\n\n".join(parts) + "\n"


def is_own(readme: Path) -> bool:
    """Whether a README is the card of a checkpoint of llmquant, not that of its original."""
    return TAG in (front_matter(readme).get("tags") or [])


def front_matter(readme: Path) -> dict[str, Any]:
    """The metadata of a card; empty where there is none to read."""
    try:
        start, block, _ = readme.read_text(encoding="utf-8").split("---\n", 2)
        found = yaml.safe_load(block) if not start.strip() else None
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def read_evaluation(evaluation: str | Path | Mapping[str, Any]) -> Mapping[str, Any]:
    """The content of an evaluation. Raises `ConfigError` for what `llmquant eval --json` did not write."""
    content: Any = evaluation
    if not isinstance(evaluation, Mapping):
        try:
            content = json.loads(Path(evaluation).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot read the evaluation: {error}", where=str(evaluation)) from error
    if not isinstance(content, Mapping) or not isinstance(content.get("perplexity"), Mapping):
        raise ConfigError("this is no evaluation", where=str(evaluation)[:200], hint="llmquant eval OUT --json FILE")
    return content


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown, its first column to the left."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _metadata(original: Mapping[str, Any], base: str | None, found: Inspection) -> dict[str, Any]:
    formats = sorted({row.format for row in found.rows if row.quantized})
    return {
        **({"base_model": base, "base_model_relation": "quantized"} if base else {}),
        "library_name": "transformers",
        **{key: original[key] for key in _KEPT if key in original},
        "tags": [TAG, "quantized", *formats],
    }


def _base(original: Mapping[str, Any], config: Mapping[str, Any]) -> str | None:
    """The original's hub id: only what looks like one is taken."""
    named = [original.get("base_model"), config.get("_name_or_path")]
    return next((n for n in named if isinstance(n, str) and n.count("/") == 1 and " " not in n and n[0] != "/"), None)


def _introduction(base: str | None) -> str:
    of = f" of [{base}](https://huggingface.co/{base})" if base else ""
    return (
        f"A quantized copy{of}, made with llmquant. Its weights are safetensors; nothing else is needed to read them."
    )


def _recipe(found: Inspection) -> str:
    """The keys of the recipe in their order, then how many weights came to what."""
    lines = [f"- `{key}`: {_scheme(value)}" for key, value in found.config]
    counts: dict[str, int] = {}
    for row in found.rows:
        if row.quantized:
            assert row.block is not None
            shared = f"{row.block[0]} x {row.block[1]}"
            name = f"{row.activation}-{row.format}" if row.activation else row.format
            key = f"{name}, {shared} weights share a {row.scale.replace('+zero', ' scale and a zero point')}"
            counts[key if "+zero" in row.scale else f"{key} scale"] = 1 + counts.get(
                key if "+zero" in row.scale else f"{key} scale", 0
            )
    return "\n".join([*lines, "", *(f"- {count} weights: {what}" for what, count in counts.items())])


def _scheme(value: Any) -> str:
    if value is None:
        return "kept in float"
    try:
        config = from_dict(value)
    except (LlmQuantError, TypeError, ValueError):  # a later version may say more
        return f"`{json.dumps(value)}`"
    return f"`{config.scheme}` by {config.algorithm}"


def _sizes(found: Inspection, config: Mapping[str, Any]) -> str:
    totals, elements = found.totals(), sum(row.elements for row in found.rows)
    plain = 4 if config.get("dtype") == "float32" else 2
    rows = [
        (f"original ({8 * plain} bits)", _megabytes(elements * plain), f"{8 * plain:.2f}"),
        ("this model", _megabytes(totals["bytes"]), _number(totals["bits_per_weight"])),
        ("its quantized weights", _megabytes(totals["bytes_quantized"]), _number(totals["bits_per_quantized_weight"])),
    ]
    return table(("", "size", "bits per weight"), rows)


def _evaluation(record: Mapping[str, Any]) -> str:
    perplexity, protocol = record["perplexity"], record.get("protocol") or {}
    rows = [
        ("perplexity", f"{_number(perplexity.get('value'))} ± {_number(perplexity.get('stderr'))}"),
        ("perplexity of the original", _number(perplexity.get("baseline"))),
        ("KL to the original, nats a token", _number((record.get("kl") or {}).get("mean"), 4)),
        ("same first choice as the original", _percent(record.get("top1"))),
    ]
    known = [row for row in rows if row[1] != "-"]
    facts = [
        f"{protocol[key]} {what}"
        for key, what in (("windows", "windows"), ("context", "tokens each"))
        if key in protocol
    ]
    where = f"On {protocol.get('text', 'a text')}" + (f", {', '.join(facts)}" if facts else "")
    return table(("measure", "value"), known) + f"\n\n{where}, logits in {protocol.get('dtype', 'unknown')}."


def _megabytes(count: Any) -> str:
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"


def _number(value: Any, digits: int = 2) -> str:
    return f"{value:.{digits}f}" if isinstance(value, int | float) else "-"


def _percent(value: Any) -> str:
    return f"{100 * value:.1f} %" if isinstance(value, int | float) else "-"
