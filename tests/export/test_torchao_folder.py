"""Folders that transformers loads with torchao's tensors: the values are ours, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import Folders, load, logits, quantize, rtn, weights

import llmquant
from llmquant.errors import ExportError
from llmquant.export.report import EXACT

pytest.importorskip("torchao")

KINDS = {
    "int4-g16": "IntxUnpackedToInt8Tensor",
    "int3-g16-asym": "IntxUnpackedToInt8Tensor",
    "int8": "IntxUnpackedToInt8Tensor",
    "float8": "Float8Tensor",
}


def made(folders: Folders, tmp_path: Path, scheme: str) -> Path:
    """A quantized folder, its embedding and head plain."""
    model = load(folders("llama"))
    quantize(model, rtn({"_default": scheme, "?_head": "none"}))
    model.save_pretrained(tmp_path / "q")
    return tmp_path / "q"


@pytest.mark.parametrize("scheme", KINDS)
def test_weights_and_logits_are_ours(scheme: str, folders: Folders, tmp_path: Path) -> None:
    folder = made(folders, tmp_path, scheme)
    report = llmquant.export(folder, "torchao", tmp_path / "ao")
    assert {w.format.split()[0] for w in report.weights.values() if w.how == EXACT} == {KINDS[scheme]}
    ours, theirs = load(folder), load(tmp_path / "ao")
    found = dict(weights(ours))
    assert len(found) == 14
    for fqn, weight in found.items():
        other = theirs.get_parameter(fqn)
        assert type(other).__name__ == KINDS[scheme]
        assert torch.equal(other.dequantize(), weight.dequantize(other.dtype)), fqn
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=1e-4, atol=2e-5)


def test_what_torchao_has_no_tensor_for_is_refused(folders: Folders, tmp_path: Path) -> None:
    folder = made(folders, tmp_path, "nf4")
    with pytest.raises(ExportError):
        llmquant.export(folder, "torchao", tmp_path / "ao")
    assert not (tmp_path / "ao").exists()
