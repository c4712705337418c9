"""How much of what rounding to three bits costs does quantization-aware training win back?

Trains a byte-level Llama of four layers from scratch, then goes on twice from there with the same batches and learning
rates: once as it is, once prepared by `llmquant.qat`. Prints the perplexity per byte of the float model, of its rounded
copy (PTQ), of the converted model (QAT), and (PTQ - QAT) / (PTQ - float), which is 1 where nothing is lost.

    python evals/quality/qat.py --train valid.txt --test wiki.test.raw
    python evals/quality/qat.py --train valid.txt --test wiki.test.raw --graph

With --graph both are done in graph mode: static weights and activations, calibrated on batches of the training text
(PTQ) or trained (QAT). Eight bits cost such a model next to nothing; --code-bits 4 leaves it fewer of the codes.

PTQ rounds the float model after its extra steps, by the same scheme and the format's default algorithm. Without texts,
it learns the first four fifths of the text that CPython ships and is measured on the rest.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import llmquant
from llmquant.measure.perplexity import Perplexity, token_nll
from llmquant.measure.text import BUILTIN, load_text
from llmquant.measure.windows import make_windows
from llmquant.pt2e import (
    QuantizationConfig,
    X86Quantizer,
    convert_pt2e,
    get_default_x86_inductor_quantization_config,
    move_exported_model_to_eval,
    move_exported_model_to_train,
    prepare_pt2e,
    prepare_qat_pt2e,
)

GOAL, GRAPH_GOAL = 0.6, 0.5


def main() -> None:
    options = parse_options()
    started = time.perf_counter()
    torch.manual_seed(options.seed)
    train_ids, test = texts(options)
    base = new_model(options)
    train(base, batches(train_ids, options, options.steps, seed=1), options.steps, options.rate, "from scratch")

    seen = list(batches(train_ids, options, 8, seed=3))
    plain, aware = copy.deepcopy(base), prepare(copy.deepcopy(base), options)
    for name, model in (("float", plain), ("QAT", aware)):
        train(model, batches(train_ids, options, options.extra, seed=2), options.extra, options.extra_rate, name)
    rounded, rounded_base = (quantized(copy.deepcopy(model), seen, options) for model in (plain, base))
    aware = convert(aware, options)

    named = {"base": base, "base PTQ": rounded_base, "float": plain, "PTQ": rounded, "QAT": aware}
    found = {name: perplexity(model, test) for name, model in named.items()}
    report(found, options, time.perf_counter() - started)


def prepare(model: Any, options: argparse.Namespace) -> Any:
    """The model with fake quantization."""
    if options.graph:
        return Graph(prepare_qat_pt2e(exported(model.train(), options), quantizer(options, is_qat=True)))
    print(llmquant.qat.prepare(model, weights_of(options), algorithm=options.algorithm), file=sys.stderr)
    return model


def convert(model: Any, options: argparse.Namespace) -> Any:
    """The trained model with codes."""
    if options.graph:
        return Graph(convert_pt2e(model.graph))
    llmquant.qat.convert(model)
    return model


def quantized(model: Any, seen: list[Tensor], options: argparse.Namespace) -> Any:
    """A float model, rounded after its training."""
    if not options.graph:
        llmquant.quantize_(model, weights_of(options))
        return model
    graph = prepare_pt2e(exported(model.eval(), options), quantizer(options))
    with torch.no_grad():
        for ids in seen:
            graph(ids)
    return Graph(convert_pt2e(graph))


def quantizer(options: argparse.Namespace, is_qat: bool = False) -> X86Quantizer:
    """All linear layers but the head; codes of fewer bits lie in int8, too."""
    config = get_default_x86_inductor_quantization_config(is_qat=is_qat)
    assert config.input_activation is not None and config.weight is not None
    half = 2 ** (options.code_bits - 1)
    config = QuantizationConfig(
        replace(config.input_activation, quant_max=2 * half - 1),
        replace(config.weight, quant_min=-half, quant_max=half - 1),
    )
    return X86Quantizer().set_global(config).set_module_name("model.lm_head", None)


def weights_of(options: argparse.Namespace) -> dict[str, str]:
    """What each weight gets."""
    return {"_default": options.scheme, "_head": "none"}


def exported(model: Any, options: argparse.Namespace) -> Any:
    """The graph of a model, for full batches."""
    ids = torch.zeros(options.batch, options.context, dtype=torch.int64)
    return torch.export.export(Logits(model), (ids,)).module()


class Logits(torch.nn.Module):
    """A model as a function of ids alone."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits


class Graph(torch.nn.Module):
    """A graph that is called as a model of transformers."""

    def __init__(self, graph: Any) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, use_cache: bool = False) -> Any:
        logits = self.graph(input_ids)
        loss = None if labels is None else F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return SimpleNamespace(logits=logits, loss=loss)

    def train(self, mode: bool = True) -> Any:
        """As its graph has it."""
        self.training = mode
        move_exported_model_to_train(self.graph) if mode else move_exported_model_to_eval(self.graph)
        return self


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", default=BUILTIN, help="path of the text to learn")
    parser.add_argument("--test", help="path of the text to measure on")
    parser.add_argument("--scheme", default="int3-g64", help="of all linear layers but the head")
    parser.add_argument("--graph", action="store_true", help="in graph mode; --scheme does not matter")
    parser.add_argument("--code-bits", type=int, default=8, help="of weights and activations in graph mode")
    parser.add_argument("--algorithm", default="rtn", help="of the fake quantization while training")
    parser.add_argument("--steps", type=int, default=800, help="of the float model from scratch")
    parser.add_argument("--extra", type=int, default=300, help="of both models afterwards")
    parser.add_argument("--rate", type=float, default=3e-3, help="learning rate from scratch")
    parser.add_argument("--extra-rate", type=float, default=1e-3, help="learning rate of the extra steps")
    parser.add_argument("--width", type=int, default=128, help="of the model")
    parser.add_argument("--context", type=int, default=128, help="bytes in a window")
    parser.add_argument("--batch", type=int, default=16, help="windows in a step")
    parser.add_argument("--windows", type=int, default=400, help="windows to measure on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="append the result to this file, one line of JSON")
    return parser.parse_args()


def texts(options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """The bytes to learn, [N], and windows [W, context] to measure on."""
    learned = as_bytes(load_text(options.train, split="train").content)
    if options.test:
        measured = as_bytes(load_text(options.test).content)
    else:
        learned, measured = learned[: len(learned) * 4 // 5], learned[len(learned) * 4 // 5 :]
    return learned, make_windows(measured, options.context, options.windows)


def as_bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


def new_model(options: argparse.Namespace) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=options.width,
            intermediate_size=3 * options.width,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=options.context,
            tie_word_embeddings=False,
        )
    )


def batches(ids: Tensor, options: argparse.Namespace, steps: int, seed: int) -> Iterator[Tensor]:
    """Random windows of a text, [batch, context], the same for the same seed."""
    generator = torch.Generator().manual_seed(options.seed * 1000 + seed)
    for _ in range(steps):
        starts = torch.randint(len(ids) - options.context, (options.batch,), generator=generator)
        yield torch.stack([ids[start : start + options.context] for start in starts.tolist()])


def train(model: Any, data: Iterator[Tensor], steps: int, rate: float, name: str) -> None:
    """AdamW with a linear warm-up of a twentieth of the steps and a linear way down to 0."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
    warm = max(steps // 20, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / warm, (steps - i) / (steps - warm)))
    model.train()
    for index, ids in enumerate(data):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if index % 50 == 0 or index == steps - 1:
            print(f"{name}: step {index} of {steps}, loss {loss.item():.3f}", file=sys.stderr, flush=True)
    model.eval()


@torch.inference_mode()
def perplexity(model: Any, windows: Tensor) -> Perplexity:
    """Per byte, over all windows [W, T]."""
    return Perplexity.from_nll(torch.cat([token_nll(model(ids).logits, ids) for ids in windows.split(16)]))


def report(found: dict[str, Perplexity], options: argparse.Namespace, seconds: float) -> None:
    for name, value in found.items():
        print(f"{name:9} {value.value:.4f} +- {value.stderr:.4f}")
    plain, ptq, qat = (found[name].value for name in ("float", "PTQ", "QAT"))
    recovered = (ptq - qat) / (ptq - plain)
    goal = GRAPH_GOAL if options.graph else GOAL
    verdict = "reached" if recovered >= goal else "missed"
    print(f"(PTQ - QAT) / (PTQ - float) = {recovered:.3f}; the goal of {goal} is {verdict} ({seconds:.0f} s)")
    if options.json:
        line = {name: value.value for name, value in found.items()}
        settings = {key: str(value) for key, value in vars(options).items() if key != "json"}
        with options.json.open("a") as file:
            file.write(json.dumps({**line, "recovered": recovered, "seconds": seconds, **settings}) + "\n")


if __name__ == "__main__":
    main()
