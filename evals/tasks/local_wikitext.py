"""Builds a copy of lm-eval's task `wikitext` over a local file of raw WikiText-2, for machines without a network.

    python evals/tasks/local_wikitext.py wiki.test.raw OUT
    llmquant eval MODEL --tasks local_wikitext --task-path OUT

Documents are cut where the data set EleutherAI/wikitext_document_level cuts them, at the headings of articles
(` = Title = `, one equals sign); the detokenizer, and how words and bytes are counted, are imported from lm-eval.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

ARTICLE = re.compile(r"= (?!=).*(?<!=) =")
DATA = Path(__file__).with_name("local_data.py")
TASK = """\
task: local_wikitext
custom_dataset: !function local_data.read
dataset_kwargs:
  file: wikitext.json
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: !function local_data.wikitext_detokenizer
process_results: !function local_data.process_results
metric_list:
  - metric: word_perplexity
    aggregation: weighted_perplexity
    higher_is_better: false
  - metric: byte_perplexity
    aggregation: weighted_perplexity
    higher_is_better: false
  - metric: bits_per_byte
    aggregation: bits_per_byte
    higher_is_better: false
metadata:
  version: 2.0
"""


def split_documents(text: str) -> Iterator[str]:
    """The articles of a raw WikiText file, each from its heading to the line before the next one."""
    lines: list[str] = []
    for line in text.split("\n"):
        if ARTICLE.fullmatch(line.strip()):
            if "".join(lines).strip():
                yield "\n".join(lines)
            lines = []
        lines.append(line)
    yield "\n".join(lines)


def build(source: Path, folder: Path) -> int:
    """Writes the task into a folder; the number of its documents."""
    documents = [{"page": page} for page in split_documents(source.read_text(encoding="utf-8"))]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "wikitext.json").write_text(json.dumps(documents, ensure_ascii=False), encoding="utf-8")
    (folder / "local_wikitext.yaml").write_text(TASK, encoding="utf-8")
    shutil.copyfile(DATA, folder / DATA.name)
    return len(documents)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="wiki.test.raw")
    parser.add_argument("folder", type=Path, help="where the task goes")
    arguments = parser.parse_args()
    count = build(arguments.source, arguments.folder)
    print(f"{count} documents; llmquant eval MODEL --tasks local_wikitext --task-path {arguments.folder}")


if __name__ == "__main__":
    main()
