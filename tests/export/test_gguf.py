"""GGUF files: tensors that the `gguf` package decodes to our values bit for bit, and models that llama.cpp runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import Folders, build, load, logits, quantize, rtn, tokens
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

import llmquant
from llmquant import quantize_weight
from llmquant.config.schemes import parse_scheme
from llmquant.errors import ExportError
from llmquant.export.gguf_model import find_architecture
from llmquant.export.gguf_tokenizer import find_pre_tokenizer
from llmquant.export.gguf_types import Misfit, to_blocks

gguf = pytest.importorskip("gguf")
PEERS = dict(choice.split("=", 1) for choice in os.environ.get("LLMQUANT_PEERS", "").split())
EVALS = Path(__file__).parents[2] / "evals/export"
needs_llama = pytest.mark.skipif("llama" not in PEERS, reason="LLMQUANT_PEERS has no llama=PYTHON")


def quantized(scheme: str, rows: int = 6, columns: int = 512, coarse: bool = False) -> Any:
    """A random matrix; `coarse` leaves its scales few bits, so that products with zero points are float16 numbers."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.05
    found: Any = quantize_weight(weight, parse_scheme(scheme))
    if coarse:
        mantissa, exponent = torch.frexp(found.scale.float())
        found.scale.copy_(torch.ldexp((mantissa * 32).round() / 32, exponent).to(found.scale.dtype))
    return found


def decoded(blocks: Any) -> torch.Tensor:
    return torch.from_numpy(gguf.quants.dequantize(blocks.data, gguf.GGMLQuantizationType[blocks.kind]))


KINDS = {
    "int4-g32": "Q4_0", "int4-g64": "Q4_0", "int4-g512": "Q4_0", "int2-g32": "Q4_0", "int3-g32": "Q4_0",
    "int1-g32": "Q4_0",
    "int3-g32-asym": "Q4_0", "int4-g32-asym": "Q5_0", "int5-g32": "Q5_0", "int6-g32": "Q8_0", "int8-g32": "Q8_0",
    "int5-g64-asym": "Q8_0", "int7-g96": "Q8_0", "mxfp4": "MXFP4",
}  # fmt: skip


@pytest.mark.parametrize("scheme", KINDS)
def test_the_smallest_exact_type(scheme: str) -> None:
    weight = quantized(scheme, columns=192 if scheme == "int7-g96" else 512)
    blocks = to_blocks(weight)
    assert (blocks.kind, blocks.rounded) == (KINDS[scheme], 0.0)
    assert torch.equal(decoded(blocks), weight.dequantize(torch.float32))


@pytest.mark.parametrize(("scheme", "kind"), [("int4-g32-asym", "Q4_1"), ("int5-g32-asym", "Q5_1")])
def test_minima_that_are_float16_numbers(scheme: str, kind: str) -> None:
    weight = quantized(scheme, coarse=True)
    blocks = to_blocks(weight)
    assert (blocks.kind, blocks.rounded) == (kind, 0.0)
    assert torch.equal(decoded(blocks), weight.dequantize(torch.float32))


def test_superblocks() -> None:
    weight = quantized("int6-g16-s8")
    with pytest.raises(Misfit, match="float32 scales of rows"):
        to_blocks(weight)
    rounded = to_blocks(weight, round_scales=True)
    assert rounded.kind == "Q6_K" and 0 < rounded.rounded < 2**-9
    weight.row_scale.copy_(weight.row_scale.half())
    blocks = to_blocks(weight)
    assert (blocks.kind, blocks.rounded) == ("Q6_K", 0.0)
    assert torch.equal(decoded(blocks), weight.dequantize(torch.float32))
    with pytest.raises(Misfit, match="superblocks"):
        to_blocks(quantized("int6-g16-s8", columns=320))


@pytest.mark.parametrize(
    ("scheme", "kind"),
    [("int8", "Q8_0"), ("int4-g32-asym", "Q4_1"), ("int5-g32-asym", "Q5_1"), ("int4-g32-s8", "Q4_0")],
)
def test_rounded_scales_keep_the_codes(scheme: str, kind: str) -> None:
    weight = quantized(scheme)
    blocks = to_blocks(weight, round_scales=True)
    assert blocks.kind == kind and 0 < blocks.rounded <= 2**-10
    ours = weight.dequantize(torch.float32)
    error = (decoded(blocks) - ours).abs()
    assert 0 < error.max() <= 2**-9 * ours.abs().max()


@pytest.mark.parametrize(
    "scheme", ["int8", "int4-g32-s8", "int4-g16", "int4-g40", "float8", "nf4", "nvfp4", "int8-g32-asym"]
)
def test_what_no_type_holds(scheme: str) -> None:
    with pytest.raises(Misfit):
        to_blocks(quantized(scheme))


@pytest.mark.parametrize("scheme", ["int4-g32", "int4-g32-asym", "int5-tensor", "mxfp4", "int6-g16-s8"])
def test_rows_in_another_order(scheme: str) -> None:
    weight, order = quantized(scheme), torch.tensor([3, 1, 4, 0, 5, 2])
    blocks = to_blocks(weight, order, round_scales=True)
    whole = to_blocks(weight, round_scales=True)
    assert torch.equal(decoded(blocks), decoded(whole)[order])


# ------------------------------------------------------------------------------------------- whole files

FAMILIES = {"llama": {}, "llama-tied": {}, "mistral": {}, "qwen2": {}, "qwen3": {"head_dim": 32}}
BIG = dict(intermediate_size=128, hidden_size=128)  # llama.cpp has no heads of 16


def folder_of(family: str, target: Path, scheme: Any = "int4-g32", tokenizer: Any = None, **sizes: Any) -> Path:
    """A quantized random model."""
    build(family, **{**BIG, **FAMILIES.get(family, {}), **sizes}).save_pretrained(target / "plain")
    model = load(target / "plain")
    quantize(model, rtn(scheme if isinstance(scheme, dict) else {"_default": scheme}))
    model.save_pretrained(target / "q")
    if tokenizer:
        tokenizer.save(str(target / "q/tokenizer.json"))
    return target / "q"


def tensors(path: Path) -> dict[str, np.ndarray]:
    """Decoded."""
    found = gguf.GGUFReader(path).tensors
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1]) for t in found}


def values(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_is_ours(family: str, tmp_path: Path) -> None:
    folder = folder_of(family, tmp_path, {"_embedding": "int8-g32", "_default": "int4-g32"})
    report = llmquant.export(folder, "gguf", tmp_path / "m.gguf")
    assert {weight.how for weight in report.weights.values()} == {"exact", "plain"}
    model, found = load(folder), tensors(tmp_path / "m.gguf")
    architecture = find_architecture(model.config)
    assert ("output.weight" in found) != model.config.tie_word_embeddings
    table = gguf.get_tensor_name_map(
        gguf.MODEL_ARCH.LLAMA if architecture.name == "llama" else gguf.MODEL_ARCH.QWEN3, 2
    )
    for fqn, value in model.named_parameters():
        plain = value.dequantize(torch.float32) if hasattr(value, "dequantize") and hasattr(value, "qdata") else value
        order = architecture.order(fqn, len(plain))
        other = found.pop(table.get_name(fqn, try_suffixes=(".weight", ".bias")))
        assert np.array_equal(other, (plain if order is None else plain[order]).detach().numpy()), fqn
    assert not found


def test_sizes(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 32
    folder = folder_of("llama", tmp_path, rope_parameters=rope)
    llmquant.export(folder, "gguf", tmp_path / "m.gguf")
    found, factors = values(tmp_path / "m.gguf"), tensors(tmp_path / "m.gguf")["rope_freqs.weight"]
    sizes = {"block_count": 2, "embedding_length": 128, "feed_forward_length": 128, "attention.head_count": 4}
    sizes |= {"attention.head_count_kv": 2, "rope.freq_base": 5e5, "vocab_size": 128, "rope.dimension_count": 32}
    assert {key: found[f"llama.{key}"] for key in sizes} == sizes
    plain = 1 / 5e5 ** (np.arange(0, 32, 2) / 32)
    np.testing.assert_allclose(plain / factors, load(folder).model.rotary_emb.inv_freq.numpy(), rtol=1e-6)


def test_misfits(tmp_path: Path) -> None:
    folder = folder_of("qwen2", tmp_path, {"re:.*down_proj": "float8", "re:.*up_proj": "int8", "_default": "int4-g32"})
    with pytest.raises(ExportError, match=r"up_proj.*float16") as refused:
        llmquant.export(folder, "gguf", tmp_path / "m.gguf")
    assert "nothing like float8" in str(refused.value) and not (tmp_path / "m.gguf").exists()
    with pytest.raises(ExportError, match="nothing like float8") as refused:
        llmquant.export(folder, "gguf", tmp_path / "m.gguf", misfits="round-scales")
    assert "up_proj" not in str(refused.value)
    for misfits, down, up in (("requantize", "Q8_0", "Q8_0"), ("dequantize", "F32", "F32")):
        report = llmquant.export(folder, "gguf", tmp_path / "m.gguf", misfits=misfits, overwrite=True)
        kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
        assert (kinds["blk.0.ffn_down.weight"], kinds["blk.0.ffn_up.weight"], kinds["blk.0.ffn_gate.weight"]) == (
            down,
            up,
            "Q4_0",
        )
        assert report.weights["model.layers.0.mlp.down_proj.weight"].how == misfits + "d"
        ours = load(folder).model.layers[0].mlp.down_proj.weight.dequantize(torch.float32).numpy()
        error = np.abs(tensors(tmp_path / "m.gguf")["blk.0.ffn_down.weight"] - ours).max()
        assert (error == 0) == (misfits == "dequantize") and error < 0.01 * np.abs(ours).max()


def test_other_architectures_are_refused(folders: Folders, tmp_path: Path) -> None:
    for family in ("gpt2", "mixtral", "gemma3", "t5"):
        with pytest.raises(ExportError, match="not exported to GGUF"):
            llmquant.export(folders.quantized(family, "int8"), "gguf", tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------- tokenizers

TEXT = "The quick brown fox's 12345 jumps,  over\n\n the lazy dög: it wasn't done! " * 3


def byte_level(pre: Any = None) -> Tokenizer:
    """A small trained tokenizer with special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def test_the_way_text_is_cut_is_recognized(tmp_path: Path) -> None:
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level])
    odd = pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), level])
    assert find_pre_tokenizer(json.loads(byte_level().to_str()), tmp_path) == "gpt-2"
    assert find_pre_tokenizer(json.loads(byte_level(digits).to_str()), tmp_path) == "smollm"
    folder = folder_of("llama", tmp_path, tokenizer=byte_level(odd), vocab_size=320)
    with pytest.raises(ExportError, match="cut text into words"):
        llmquant.export(folder, "gguf", tmp_path / "m.gguf")
    llmquant.export(folder, "gguf", tmp_path / "m.gguf", pre_tokenizer="tekken")
    assert values(tmp_path / "m.gguf")["tokenizer.ggml.pre"] == "tekken"


def test_tokens_and_their_kinds(tmp_path: Path) -> None:
    tokenizer = byte_level()
    folder = folder_of("llama", tmp_path, tokenizer=tokenizer, vocab_size=tokenizer.get_vocab_size() + 5)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    llmquant.export(folder, "gguf", tmp_path / "m.gguf")
    found = values(tmp_path / "m.gguf")
    vocabulary = tokenizer.get_vocab()
    assert [found["tokenizer.ggml.tokens"][i] for i in vocabulary.values()] == list(vocabulary)
    assert found["tokenizer.ggml.token_type"][:3] == [3, 3, 1] and found["tokenizer.ggml.token_type"][-5:] == [5] * 5
    assert found["tokenizer.ggml.bos_token_id"] == 1 and found["tokenizer.chat_template"] == "{{ messages }}"


# --------------------------------------------------------------------------------------------- llama.cpp


def llama(*arguments: object) -> str:
    done = subprocess.run(
        [PEERS["llama"], EVALS / "llama_logits.py", *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@needs_llama
@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_says_the_same(family: str, tmp_path: Path) -> None:
    """Random models: a swap of rows or a wrong size shows as unrelated logits."""
    folder = folder_of(family, tmp_path)
    llmquant.export(folder, "gguf", tmp_path / "m.gguf")
    np.save(tmp_path / "ids.npy", tokens().numpy())
    llama(tmp_path / "m.gguf", tmp_path / "ids.npy", tmp_path / "logits.npy")
    ours, theirs = logits(load(folder)), torch.from_numpy(np.load(tmp_path / "logits.npy"))
    error = (ours - theirs).norm() / ours.norm()
    assert 0 < error < 0.03, float(error)  # inputs of products are rounded to eight bits there


@needs_llama
def test_llama_cpp_cuts_text_alike(tmp_path: Path) -> None:
    digits = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    for number, pre in enumerate((None, digits)):
        tokenizer = byte_level(pre)
        folder = folder_of("llama", tmp_path / str(number), tokenizer=tokenizer, vocab_size=tokenizer.get_vocab_size())
        llmquant.export(folder, "gguf", tmp_path / "m.gguf", overwrite=True)
        found = json.loads(llama(tmp_path / "m.gguf", "--tokens", TEXT + "</s>").splitlines()[-1])
        assert found == tokenizer.encode(TEXT + "</s>").ids


@needs_llama
@pytest.mark.slow
def test_a_real_model_agrees(tmp_path: Path) -> None:
    """Top-1 agreement on WikiText; LLMQUANT_TEST_DATA names a folder with a quantized model and the text."""
    data = os.environ.get("LLMQUANT_TEST_DATA")
    if not data or not (Path(data) / "SmolLM2-135M-int4-g32").is_dir():
        pytest.skip("LLMQUANT_TEST_DATA has no SmolLM2-135M-int4-g32")
    folder = Path(data) / "SmolLM2-135M-int4-g32"
    llmquant.export(folder, "gguf", tmp_path / "m.gguf")
    options = ["--llama", PEERS["llama"], "--text", str(Path(data) / "wikitext-2-raw/wiki.test.raw")]
    command = [sys.executable, str(EVALS / "agreement.py"), str(folder), str(tmp_path / "m.gguf"), *options]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert 0.95 < found["top1"] < 1 and 0 < found["kl"] < 0.01
