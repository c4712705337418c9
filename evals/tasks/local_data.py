"""What the tasks of this folder are made of: data from files beside them, and lm-eval's own treatment of WikiText."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datasets import Dataset
from lm_eval.tasks.wikitext.preprocess_wikitext import process_results, wikitext_detokenizer

__all__ = ["process_results", "read", "wikitext_detokenizer"]


def read(file: str, **_: Any) -> dict[str, Dataset]:
    """The documents of a JSON file in this folder, wherever lm-eval is started from."""
    documents = json.loads((Path(__file__).parent / file).read_text(encoding="utf-8"))
    return {"test": Dataset.from_list(documents)}
