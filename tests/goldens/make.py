"""Makes the golden checkpoints of the current format version: `python tests/goldens/make.py` from the root.

Run it once for a new version of the format, into a new folder. What lies in an older folder never changes: these files
stand for the checkpoints that people have. How codes and scales are chosen may change; only loading is tested.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from cases import CASES  # noqa: E402
from models import CONFIGS, load, save  # noqa: E402

from llmquant import QuantizedTensor, quantize_  # noqa: E402
from llmquant.checkpoint.manifest import FORMAT_VERSION  # noqa: E402
from llmquant.config.fqn import FqnToConfig  # noqa: E402
from llmquant.config.schemes import parse_scheme  # noqa: E402

_SMALL = dict(vocab_size=24, hidden_size=32, intermediate_size=40)
_EXPERTS = dict(vocab_size=24, hidden_size=16, intermediate_size=20, num_hidden_layers=1, num_local_experts=2)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    # A row of 40 has a short last group; 7 linear weights a layer make room for every case of the table.
    "llama": ("llama-tied", dict(_SMALL, num_hidden_layers=-(-len(CASES) // 7))),
    "gpt2": ("gpt2", dict(vocab_size=24, n_embd=20, n_layer=1)),
    "gpt-oss": ("gpt-oss", dict(_EXPERTS, head_dim=8)),
    "mixtral": ("mixtral", _EXPERTS),
}


def config_of(name: str, model: Any) -> FqnToConfig:
    """For the Llama one case a weight, in turn; for the others what the tests use elsewhere."""
    if name != "llama":
        return CONFIGS[MODELS[name][0]]
    linear = [fqn for fqn, p in model.named_parameters() if "_proj" in fqn and p.dim() == 2]
    cases = dict(zip(linear, (case.config.with_algorithm("rtn") for case in CASES), strict=False))
    assert len(cases) == len(CASES)
    return FqnToConfig({**cases, "_embedding": parse_scheme("int8")})


def expectation(model: Any) -> dict[str, Any]:
    """What a loaded model must hold and say."""
    tokens = [[1, 5, 9, 17, 3, 20, 11]]
    with torch.no_grad():
        logits = model(torch.tensor(tokens), use_cache=False).logits
    values = {
        fqn: p.dequantize(torch.float32) if isinstance(p, QuantizedTensor) else p.detach()
        for fqn, p in model.named_parameters()
    }
    hashes = {fqn: hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest() for fqn, value in values.items()}
    return {"tokens": tokens, "sha256": hashes, "logits": [round(value, 6) for value in logits[0, -1].tolist()]}


def main() -> None:
    """Writes every model that is not there yet."""
    for name, (family, overrides) in MODELS.items():
        folder = HERE / f"v{FORMAT_VERSION}" / name
        if folder.exists():
            print(f"{folder.name}: kept")
            continue
        with tempfile.TemporaryDirectory() as plain:
            model = load(save(family, Path(plain), **overrides))
            quantize_(model, config_of(name, model))
            model.save_pretrained(folder, max_shard_size="30KB" if name == "llama" else "1GB")
        for path in folder.glob("*.safetensors"):
            path.chmod(0o644)
        (folder / "expected.json").write_text(json.dumps(expectation(load(folder)), indent=1) + "\n")


if __name__ == "__main__":
    main()
