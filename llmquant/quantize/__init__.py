"""Where config, algorithms, packing and tensors meet: one weight, a plan for a model, the model, the report."""

from llmquant.quantize.model import AFTER_QUANTIZE, InPlace, Item, Progress, quantize_, replace_weight
from llmquant.quantize.plan import Plan, check_stats, make_plan
from llmquant.quantize.report import QuantizationReport, WeightReport, report_weight
from llmquant.quantize.weight import check_weight, quantize_weight

__all__ = [
    "AFTER_QUANTIZE",
    "InPlace",
    "Item",
    "Plan",
    "Progress",
    "QuantizationReport",
    "WeightReport",
    "check_stats",
    "check_weight",
    "make_plan",
    "quantize_",
    "quantize_weight",
    "replace_weight",
    "report_weight",
]
