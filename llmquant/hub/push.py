"""A quantized folder on its way to the Hugging Face hub, as one commit: all of it, or nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmquant.checkpoint.files import no_space_errors
from llmquant.checkpoint.manifest import METHOD, verify
from llmquant.checkpoint.source import locate, read_config, weight_files
from llmquant.errors import CheckpointError, HubError
from llmquant.hub.card import is_own, model_card

ORIGINAL = "ORIGINAL_README.md"
_AGAIN = "run it again: files that arrived are not sent twice"


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    message: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
    base_model: str | None = None,
    evaluation: str | Path | Mapping[str, Any] | None = None,
) -> str:
    """Verifies a quantized folder, lays a card beside it unless it has one, and uploads it as one commit.

    An upload that breaks off leaves the repository as it was; the next one sends only the files that did not arrive.

    Args:
        folder: what llmquant quantized.
        repo_id: `user/name`; it is made if it does not exist.
        private: whether a new repository is private; None is the account's default.
        revision: branch; None is the main one.
        message: of the commit.
        token: of the hub; None takes HF_TOKEN, or that of `hf auth login`.
        endpoint: of the hub; None takes HF_ENDPOINT.
        base_model, evaluation: for the card, see `model_card`.

    Returns:
        The commit's address.

    Raises:
        HubError: without a token, for what the hub refuses, and where the connection breaks.
        ModelNotFoundError, CheckpointError, ConfigError: for a folder that is none, or is damaged.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    path = _verified(folder)
    if not (token or get_token()):
        raise HubError("there is no token of the hub", hint="hf auth login, or set HF_TOKEN")
    write_card(path, repo_id, base_model, evaluation)
    api = HfApi(endpoint=endpoint, token=token)
    try:
        made = api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=made.repo_id,
            folder_path=path,
            revision=revision,
            commit_message=message or "Upload a checkpoint quantized with llmquant",
            ignore_patterns=[".*", "**/.*"],
        )
    except HFValidationError as error:
        raise HubError(f"this is no name of a repository: {error}", where=repo_id, hint="user/name") from error
    except Exception as error:  # the hub's client changes its HTTP library, and so what it raises
        refusal = error if isinstance(error, HfHubHTTPError) else error.__cause__
        if isinstance(refusal, HfHubHTTPError):
            raise HubError(f"the hub refused it: {_reason(refusal)}", where=repo_id, hint=_hint(refusal)) from error
        raise HubError(f"the upload broke off: {error}", where=repo_id, hint=_AGAIN) from error
    return str(commit.commit_url)


def write_card(
    folder: Path,
    repo_id: str | None = None,
    base_model: str | None = None,
    evaluation: str | Path | Mapping[str, Any] | None = None,
) -> bool:
    """Writes README.md unless there is one of llmquant. That of the original is kept under `ORIGINAL_README.md`.

    Returns whether it was written.
    """
    readme = folder / "README.md"
    if readme.exists() and is_own(readme):
        return False
    card = model_card(folder, repo_id=repo_id, base_model=base_model, evaluation=evaluation)
    draft = folder / f".README.md.{os.getpid()}.tmp"
    with no_space_errors(folder):
        draft.write_text(card, encoding="utf-8")
        if readme.exists():
            os.replace(readme, folder / ORIGINAL)
        os.replace(draft, readme)
    return True


def _verified(folder: str | Path) -> Path:
    path = locate(folder)
    manifest = read_config(path).get("quantization_config") or {}
    if manifest.get("quant_method") != METHOD:
        raise CheckpointError("this is no checkpoint of llmquant", where=str(path), hint="llmquant quantize first")
    verify(manifest, weight_files(path))
    return path


def _reason(error: Any) -> str:
    status = getattr(error.response, "status_code", "no answer")
    return f"{status} {error.server_message or str(error).splitlines()[0]}"


def _hint(error: Any) -> str:
    status = getattr(error.response, "status_code", None)
    if status in (401, 403):
        return "a token that may write there: hf auth login, or HF_TOKEN"
    return _AGAIN
