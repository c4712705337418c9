"""Model cards: metadata that the hub reads, figures that are the folder's, and an evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from models import Folders, copy
from typer.testing import CliRunner

import llmquant
from llmquant.checkpoint.inspect import inspect_checkpoint
from llmquant.cli.main import app
from llmquant.errors import ConfigError
from llmquant.hub.card import is_own

RECORD = {
    "perplexity": {"value": 12.345, "stderr": 0.5, "baseline": 11.0, "change": 0.1},
    "kl": {"mean": 0.0123},
    "top1": 0.912,
    "protocol": {"text": "wikitext2", "windows": 8, "context": 512, "dtype": "float32"},
}


def test_the_hub_reads_its_metadata(folders: Folders, tmp_path: Path) -> None:
    folder = copy(folders.quantized("llama"), tmp_path / "q")
    (folder / "README.md").write_text("---\nlicense: mit\nlanguage: [en]\ntags: [chat]\n---\n# Original\n")
    data = ModelCard(llmquant.model_card(folder, repo_id="me/small", base_model="you/large")).data.to_dict()
    assert data["base_model"] == "you/large" and data["base_model_relation"] == "quantized"
    assert (data["license"], data["language"], data["library_name"]) == ("mit", ["en"], "transformers")
    assert {"llmquant", "int4", "int6", "int8"} <= set(data["tags"]) and "chat" not in data["tags"]


def test_its_figures_are_those_of_the_folder(folders: Folders) -> None:
    folder = folders.quantized("llama")
    card, totals = llmquant.model_card(folder), inspect_checkpoint(folder).totals()
    assert f"| {totals['bytes'] / 1e6:.1f} MB | {totals['bits_per_weight']:.2f} |" in card
    assert f"| {totals['bits_per_quantized_weight']:.2f} |" in card
    assert (
        "- `re:.*down_proj`: `int6-g24-asym` by rtn" in card
        and "int6, 1 x 24 weights share a float16 scale and a" in card
    )
    assert 'from_pretrained("' in card and "## Evaluation" not in card


def test_an_evaluation_becomes_a_table(folders: Folders, tmp_path: Path) -> None:
    (tmp_path / "e.json").write_text(json.dumps(RECORD))
    card = llmquant.model_card(folders.quantized("llama"), evaluation=tmp_path / "e.json")
    assert "| perplexity | 12.35 ± 0.50 |" in card or "| perplexity | 12.34 ± 0.50 |" in card
    assert "| same first choice as the original | 91.2 % |" in card and "0.0123" in card
    assert "On wikitext2, 8 windows, 512 tokens each, logits in float32." in card
    alone = llmquant.model_card(folders.quantized("llama"), evaluation={**RECORD, "kl": None, "top1": None})
    assert "KL" not in alone


def test_what_is_no_checkpoint_or_evaluation_is_refused(folders: Folders, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not quantized"):
        llmquant.model_card(folders("llama"))
    (tmp_path / "e.json").write_text("[]")
    for bad in (tmp_path / "e.json", tmp_path / "none.json", {"a": 1}):
        with pytest.raises(ConfigError):
            llmquant.model_card(folders.quantized("llama"), evaluation=bad)


def test_only_cards_of_ours_count_as_such(folders: Folders, tmp_path: Path) -> None:
    for content in (
        "",
        "# x",
        "---\n: :\n---\n",
        "---\ntags:\n---\n",
        "---\n- a\n---\n",
        "a---\ntags: [llmquant]\n---\n",
    ):
        (tmp_path / "README.md").write_text(content)
        assert not is_own(tmp_path / "README.md"), content
    (tmp_path / "README.md").write_text(llmquant.model_card(folders.quantized("llama")))
    assert is_own(tmp_path / "README.md")


def test_the_command_prints_it(folders: Folders) -> None:
    done = CliRunner().invoke(app, ["card", str(folders.quantized("llama")), "--repo-id", "me/small"])
    assert done.exit_code == 0 and done.stdout == llmquant.model_card(folders.quantized("llama"), repo_id="me/small")
    assert yaml.safe_load(done.stdout.split("---")[1])["library_name"] == "transformers"
