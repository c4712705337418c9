"""Uploads against a stand-in of the hub: what arrives, what an interruption leaves, what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from models import Folders, copy, disk, load, logits
from stand_in import Hub, hub

import llmquant
from llmquant.errors import CheckpointError, HubError
from llmquant.hub.push import ORIGINAL

ROOT = str(Path(llmquant.__file__).parents[1])


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS", True)
    with hub() as running:
        yield running


@pytest.fixture
def folder(folders: Folders, tmp_path: Path) -> Path:
    """In several files, so that an upload can break between them."""
    load(folders.quantized("llama", "int4-g32")).save_pretrained(tmp_path / "q", max_shard_size="15KB")
    return tmp_path / "q"


def download(server: Hub, repo: str, target: Path) -> Path:
    target.mkdir()
    for (name, path), content in server.files.items():
        if name == repo:
            (target / path).write_bytes(content)
    return target


def test_what_arrives_is_the_checkpoint_and_its_card(server: Hub, folder: Path, tmp_path: Path) -> None:
    address = llmquant.push_to_hub(folder, "me/small", private=True, token=server.token, endpoint=server.endpoint)
    assert address.startswith(f"{server.endpoint}/me/small/commit/") and server.commits == 1
    assert server.repos == {"me/small": True}
    arrived = download(server, "me/small", tmp_path / "arrived")
    assert disk(arrived) == disk(folder) and len(list(arrived.glob("*.safetensors"))) > 3
    assert (logits(load(arrived)) == logits(load(folder))).all()
    assert 'from_pretrained("me/small")' in (arrived / "README.md").read_text()


def test_an_interrupted_upload_leaves_nothing_and_goes_on(server: Hub, folder: Path, tmp_path: Path) -> None:
    server.refuse_after = 2
    with pytest.raises(HubError, match="403"):
        llmquant.push_to_hub(folder, "me/small", token=server.token, endpoint=server.endpoint)
    assert server.commits == 0 and not server.files and len(server.objects) == 2
    server.refuse_after = None
    llmquant.push_to_hub(folder, "me/small", token=server.token, endpoint=server.endpoint)
    assert len(server.puts) == len(set(server.puts)) == len(list(folder.glob("*.safetensors")))
    assert disk(download(server, "me/small", tmp_path / "arrived")) == disk(folder)


def test_tokens(server: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(HubError, match="no token") as none:
        llmquant.push_to_hub(folder, "me/small", endpoint=server.endpoint)
    assert "hf auth login" in str(none.value) and not (folder / "README.md").exists()
    with pytest.raises(HubError, match="401") as wrong:
        llmquant.push_to_hub(folder, "me/small", token="hf_wrong", endpoint=server.endpoint)
    assert "HF_TOKEN" in str(wrong.value) and not server.repos


def test_nothing_damaged_is_sent(server: Hub, folder: Path, folders: Folders) -> None:
    shard = next(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    for bad in (folder, folders("llama")):
        with pytest.raises(CheckpointError):
            llmquant.push_to_hub(bad, "me/small", token=server.token, endpoint=server.endpoint)
    assert not server.repos


def test_names_that_are_none(server: Hub, folder: Path) -> None:
    with pytest.raises(HubError, match="no name of a repository"):
        llmquant.push_to_hub(folder, "a/b/c", token=server.token, endpoint=server.endpoint)


def test_cards_of_ours_stay_and_the_originals_is_kept(server: Hub, folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: a/b\n---\n# The original\n")
    for _ in range(2):
        llmquant.push_to_hub(folder, "me/small", token=server.token, endpoint=server.endpoint)
    card = server.files["me/small", "README.md"].decode()
    assert "license: apache-2.0" in card and "base_model: a/b" in card
    assert server.files["me/small", ORIGINAL].endswith(b"# The original\n")
    (folder / "README.md").write_text(card + "By hand.\n")
    llmquant.push_to_hub(folder, "me/small", token=server.token, endpoint=server.endpoint)
    assert server.files["me/small", "README.md"].endswith(b"By hand.\n")


PUSHES = """
import sys
from transformers import AutoModelForCausalLM
import llmquant
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
model.save_pretrained(sys.argv[2], push_to_hub=True, repo_id="me/saved")
"""


def test_transformers_own_upload(server: Hub, folder: Path, folders: Folders, tmp_path: Path) -> None:
    environment = {
        "HF_ENDPOINT": server.endpoint, "HF_TOKEN": server.token, "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": ROOT,
        "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"),
    }  # fmt: skip
    saved = folders.quantized("llama", "int4-g32")
    done = subprocess.run(
        [sys.executable, "-c", PUSHES, saved, tmp_path / "again"],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    arrived = download(server, "me/saved", tmp_path / "arrived")
    assert (logits(load(arrived)) == logits(load(copy(saved, tmp_path / "kept")))).all()
