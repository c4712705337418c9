"""The report of a study: pictures, tables and a reading in words, made from `results.jsonl` alone."""

from llmquant.report.write import write_report

__all__ = ["write_report"]
