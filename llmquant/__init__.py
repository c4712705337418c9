"""llmquant: make large language models smaller on PyTorch, keep them as safetensors, and see what it cost.

```python
from llmquant import quantize_, Int4WeightOnlyConfig
print(quantize_(model, Int4WeightOnlyConfig(group_size=64)))
```

Importing it also teaches transformers to load quantized checkpoints; neither transformers nor any kernel is
imported before it is needed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from llmquant.integrations import hook as _hook

__version__ = "0.1.0"

if TYPE_CHECKING:
    from llmquant import export as export
    from llmquant import pt2e as pt2e
    from llmquant import qat as qat
    from llmquant.calibrate.collect import Calibration as Calibration
    from llmquant.calibrate.collect import collect_stats as collect_stats
    from llmquant.calibrate.data import calibration_windows as calibration_windows
    from llmquant.calibrate.imatrix import load_imatrix as load_imatrix
    from llmquant.calibrate.imatrix import save_imatrix as save_imatrix
    from llmquant.checkpoint.by_key import load_raw as load_raw
    from llmquant.checkpoint.origin import Origin as Origin
    from llmquant.checkpoint.plan import CheckpointPlan as CheckpointPlan
    from llmquant.checkpoint.plan import plan_checkpoint as plan_checkpoint
    from llmquant.checkpoint.save import save as save
    from llmquant.checkpoint.stream import quantize_checkpoint as quantize_checkpoint
    from llmquant.checkpoint.verify import VerifyReport as VerifyReport
    from llmquant.checkpoint.verify import verify as verify
    from llmquant.config.base import DynamicActivationConfig as DynamicActivationConfig
    from llmquant.config.base import StaticActivationConfig as StaticActivationConfig
    from llmquant.config.base import WeightOnlyConfig as WeightOnlyConfig
    from llmquant.config.fqn import FqnToConfig as FqnToConfig
    from llmquant.config.named import (
        Float8DynamicActivationFloat8SemiSparseWeightConfig as Float8DynamicActivationFloat8SemiSparseWeightConfig,
    )
    from llmquant.config.named import (
        Float8DynamicActivationFloat8WeightConfig as Float8DynamicActivationFloat8WeightConfig,
    )
    from llmquant.config.named import Float8DynamicActivationInt4WeightConfig as Float8DynamicActivationInt4WeightConfig
    from llmquant.config.named import (
        Float8StaticActivationFloat8WeightConfig as Float8StaticActivationFloat8WeightConfig,
    )
    from llmquant.config.named import Float8WeightOnlyConfig as Float8WeightOnlyConfig
    from llmquant.config.named import Int4WeightOnlyConfig as Int4WeightOnlyConfig
    from llmquant.config.named import Int8DynamicActivationInt4WeightConfig as Int8DynamicActivationInt4WeightConfig
    from llmquant.config.named import Int8DynamicActivationInt8WeightConfig as Int8DynamicActivationInt8WeightConfig
    from llmquant.config.named import Int8DynamicActivationIntxWeightConfig as Int8DynamicActivationIntxWeightConfig
    from llmquant.config.named import Int8StaticActivationInt8WeightConfig as Int8StaticActivationInt8WeightConfig
    from llmquant.config.named import Int8WeightOnlyConfig as Int8WeightOnlyConfig
    from llmquant.config.named import IntxWeightOnlyConfig as IntxWeightOnlyConfig
    from llmquant.config.named import MXDynamicActivationMXWeightConfig as MXDynamicActivationMXWeightConfig
    from llmquant.config.named import MXWeightOnlyConfig as MXWeightOnlyConfig
    from llmquant.config.named import NF4WeightOnlyConfig as NF4WeightOnlyConfig
    from llmquant.config.named import NVFP4DynamicActivationNVFP4WeightConfig as NVFP4DynamicActivationNVFP4WeightConfig
    from llmquant.config.named import NVFP4WeightOnlyConfig as NVFP4WeightOnlyConfig
    from llmquant.config.recipe import list_recipes as list_recipes
    from llmquant.config.recipe import load_recipe as load_recipe
    from llmquant.errors import LlmQuantError as LlmQuantError
    from llmquant.export.report import ExportReport as ExportReport
    from llmquant.export.run import export_checkpoint as export_checkpoint
    from llmquant.foreign.importer import import_checkpoint as import_checkpoint
    from llmquant.foreign.report import ImportReport as ImportReport
    from llmquant.formats import Format as Format
    from llmquant.formats import register_format as register_format
    from llmquant.hub.card import model_card as model_card
    from llmquant.hub.push import push_to_hub as push_to_hub
    from llmquant.integrations.lm_eval import run_tasks as run_tasks
    from llmquant.integrations.loading import load as load
    from llmquant.integrations.optimize import OptimizeReport as OptimizeReport
    from llmquant.integrations.optimize import optimize as optimize
    from llmquant.integrations.optimize import restore as restore
    from llmquant.integrations.transformers import LlmQuantConfig as LlmQuantConfig
    from llmquant.measure.activations import ActivationReport as ActivationReport
    from llmquant.measure.activations import compare_activations as compare_activations
    from llmquant.measure.evaluate import Evaluation as Evaluation
    from llmquant.measure.evaluate import evaluate as evaluate
    from llmquant.measure.noise import noise_floor as noise_floor
    from llmquant.measure.reference import Reference as Reference
    from llmquant.measure.speed import Speed as Speed
    from llmquant.measure.speed import time_model as time_model
    from llmquant.primitives.granularity import MappingType as MappingType
    from llmquant.primitives.granularity import PerAxis as PerAxis
    from llmquant.primitives.granularity import PerBlock as PerBlock
    from llmquant.primitives.granularity import PerGroup as PerGroup
    from llmquant.primitives.granularity import PerRow as PerRow
    from llmquant.primitives.granularity import PerTensor as PerTensor
    from llmquant.primitives.granularity import PerToken as PerToken
    from llmquant.primitives.granularity import PerTokenGroup as PerTokenGroup
    from llmquant.primitives.metrics import compute_error as compute_error
    from llmquant.primitives.stats import InputStats as InputStats
    from llmquant.pt2e.dynamic import quantize_dynamic as quantize_dynamic
    from llmquant.quantize import QuantizationReport as QuantizationReport
    from llmquant.quantize import quantize_ as quantize_
    from llmquant.quantize import quantize_weight as quantize_weight
    from llmquant.report import write_report as write_report
    from llmquant.study.run import Sweep as Sweep
    from llmquant.study.run import run_study as run_study
    from llmquant.study.spec import Study as Study
    from llmquant.study.spec import load_study as load_study
    from llmquant.tensor import QuantizedTensor as QuantizedTensor
    from llmquant.tune.awq import awq_ as awq_
    from llmquant.tune.budget import choose_mixture as choose_mixture
    from llmquant.tune.budget import mixed_precision as mixed_precision
    from llmquant.tune.mixture import Mixture as Mixture
    from llmquant.tune.refine import RefineReport as RefineReport
    from llmquant.tune.refine import refine_ as refine_
    from llmquant.tune.rotate import RotationReport as RotationReport
    from llmquant.tune.rotate import rotate_ as rotate_
    from llmquant.tune.sensitivity import sensitivity as sensitivity
    from llmquant.tune.sequential import quantize_with_data_ as quantize_with_data_
    from llmquant.tune.sites import MigrationReport as MigrationReport
    from llmquant.tune.smoothquant import smoothquant_ as smoothquant_

_PUBLIC = {
    "llmquant.calibrate.collect": ["Calibration", "collect_stats"],
    "llmquant.calibrate.data": ["calibration_windows"],
    "llmquant.calibrate.imatrix": ["load_imatrix", "save_imatrix"],
    "llmquant.checkpoint.origin": ["Origin"],
    "llmquant.checkpoint.plan": ["CheckpointPlan", "plan_checkpoint"],
    "llmquant.checkpoint.by_key": ["load_raw"],
    "llmquant.checkpoint.save": ["save"],
    "llmquant.checkpoint.stream": ["quantize_checkpoint"],
    "llmquant.checkpoint.verify": ["VerifyReport", "verify"],
    "llmquant.config.base": ["DynamicActivationConfig", "StaticActivationConfig", "WeightOnlyConfig"],
    "llmquant.config.fqn": ["FqnToConfig"],
    "llmquant.config.named": [
        "Float8DynamicActivationFloat8SemiSparseWeightConfig",
        "Float8DynamicActivationFloat8WeightConfig",
        "Float8DynamicActivationInt4WeightConfig",
        "Float8StaticActivationFloat8WeightConfig",
        "Float8WeightOnlyConfig",
        "Int4WeightOnlyConfig",
        "Int8DynamicActivationInt4WeightConfig",
        "Int8DynamicActivationInt8WeightConfig",
        "Int8DynamicActivationIntxWeightConfig",
        "Int8StaticActivationInt8WeightConfig",
        "Int8WeightOnlyConfig",
        "IntxWeightOnlyConfig",
        "MXDynamicActivationMXWeightConfig",
        "MXWeightOnlyConfig",
        "NF4WeightOnlyConfig",
        "NVFP4DynamicActivationNVFP4WeightConfig",
        "NVFP4WeightOnlyConfig",
    ],
    "llmquant.config.recipe": ["list_recipes", "load_recipe"],
    "llmquant.errors": ["LlmQuantError"],
    "llmquant.export.report": ["ExportReport"],
    "llmquant.export.run": ["export_checkpoint"],
    "llmquant.foreign.importer": ["import_checkpoint"],
    "llmquant.foreign.report": ["ImportReport"],
    "llmquant.formats": ["Format", "register_format"],
    "llmquant.hub.card": ["model_card"],
    "llmquant.hub.push": ["push_to_hub"],
    "llmquant.integrations.lm_eval": ["run_tasks"],
    "llmquant.integrations.optimize": ["OptimizeReport", "optimize", "restore"],
    "llmquant.integrations.loading": ["load"],
    "llmquant.integrations.transformers": ["LlmQuantConfig"],
    "llmquant.measure.activations": ["ActivationReport", "compare_activations"],
    "llmquant.measure.evaluate": ["Evaluation", "evaluate"],
    "llmquant.measure.noise": ["noise_floor"],
    "llmquant.measure.reference": ["Reference"],
    "llmquant.measure.speed": ["Speed", "time_model"],
    "llmquant.primitives.granularity": [
        "MappingType",
        "PerAxis",
        "PerBlock",
        "PerGroup",
        "PerRow",
        "PerTensor",
        "PerToken",
        "PerTokenGroup",
    ],
    "llmquant.primitives.metrics": ["compute_error"],
    "llmquant.primitives.stats": ["InputStats"],
    "llmquant.pt2e.dynamic": ["quantize_dynamic"],
    "llmquant.quantize": ["QuantizationReport", "quantize_", "quantize_weight"],
    "llmquant.report": ["write_report"],
    "llmquant.study.run": ["Sweep", "run_study"],
    "llmquant.study.spec": ["Study", "load_study"],
    "llmquant.tensor": ["QuantizedTensor"],
    "llmquant.tune.awq": ["awq_"],
    "llmquant.tune.refine": ["RefineReport", "refine_"],
    "llmquant.tune.rotate": ["RotationReport", "rotate_"],
    "llmquant.tune.sequential": ["quantize_with_data_"],
    "llmquant.tune.sites": ["MigrationReport"],
    "llmquant.tune.smoothquant": ["smoothquant_"],
    "llmquant.tune.budget": ["choose_mixture", "mixed_precision"],
    "llmquant.tune.mixture": ["Mixture"],
    "llmquant.tune.sensitivity": ["sensitivity"],
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}
_PACKAGES = ["export", "pt2e", "qat"]

__all__ = sorted([*_HOME, *_PACKAGES, "__version__"])


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'llmquant' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


_hook.install()
