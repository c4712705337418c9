"""Graph-mode quantization of exported programs (PyTorch 2 Export).

```python
from llmquant.pt2e import X86Quantizer, compile, convert_pt2e, lower, prepare_pt2e

graph = torch.export.export(model.eval(), inputs).module()
prepared = prepare_pt2e(graph, X86Quantizer())
prepared(*inputs)  # calibrate
converted = convert_pt2e(prepared)
lowered, report = lower(converted)  # int8 products, without a compiler
fast = compile(converted)  # and with Inductor
```

Importing it imports neither its parts nor torch's private ones before they are asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmquant.pt2e.compare import LayerError as LayerError
    from llmquant.pt2e.compilation import compile as compile
    from llmquant.pt2e.convert import convert_pt2e as convert_pt2e
    from llmquant.pt2e.export.aoti import export_aoti as export_aoti
    from llmquant.pt2e.export.aoti import load_aoti as load_aoti
    from llmquant.pt2e.export.executorch import export_executorch as export_executorch
    from llmquant.pt2e.export.executorch import run_executorch as run_executorch
    from llmquant.pt2e.export.onnx import export_onnx as export_onnx
    from llmquant.pt2e.fake_quantize import FakeQuantize as FakeQuantize
    from llmquant.pt2e.fake_quantize import disable_fake_quant as disable_fake_quant
    from llmquant.pt2e.fake_quantize import disable_observer as disable_observer
    from llmquant.pt2e.fake_quantize import enable_fake_quant as enable_fake_quant
    from llmquant.pt2e.fake_quantize import enable_observer as enable_observer
    from llmquant.pt2e.lowering import lower as lower
    from llmquant.pt2e.lowering_report import LoweringReport as LoweringReport
    from llmquant.pt2e.modes import allow_exported_model_train_eval as allow_exported_model_train_eval
    from llmquant.pt2e.modes import move_exported_model_to_eval as move_exported_model_to_eval
    from llmquant.pt2e.modes import move_exported_model_to_train as move_exported_model_to_train
    from llmquant.pt2e.observer import HistogramObserver as HistogramObserver
    from llmquant.pt2e.observer import MinMaxObserver as MinMaxObserver
    from llmquant.pt2e.observer import MovingAverageMinMaxObserver as MovingAverageMinMaxObserver
    from llmquant.pt2e.observer import MovingAveragePerChannelMinMaxObserver as MovingAveragePerChannelMinMaxObserver
    from llmquant.pt2e.observer import PerChannelMinMaxObserver as PerChannelMinMaxObserver
    from llmquant.pt2e.prepare import prepare_pt2e as prepare_pt2e
    from llmquant.pt2e.prepare import prepare_qat_pt2e as prepare_qat_pt2e
    from llmquant.pt2e.quantizer import ComposableQuantizer as ComposableQuantizer
    from llmquant.pt2e.quantizer import QuantizationConfig as QuantizationConfig
    from llmquant.pt2e.quantizer import X86InductorQuantizer as X86InductorQuantizer
    from llmquant.pt2e.quantizer import X86Quantizer as X86Quantizer
    from llmquant.pt2e.quantizer import XNNPACKQuantizer as XNNPACKQuantizer
    from llmquant.pt2e.quantizer import annotate_product as annotate_product
    from llmquant.pt2e.quantizer import (
        get_default_x86_inductor_quantization_config as get_default_x86_inductor_quantization_config,
    )
    from llmquant.pt2e.quantizer import get_symmetric_quantization_config as get_symmetric_quantization_config
    from llmquant.pt2e.sensitivity import SkipList as SkipList
    from llmquant.pt2e.sensitivity import skip_list as skip_list
    from llmquant.pt2e.spec import QuantizationAnnotation as QuantizationAnnotation
    from llmquant.pt2e.spec import QuantizationSpec as QuantizationSpec
    from llmquant.pt2e.spec import Quantizer as Quantizer
    from llmquant.pt2e.spec import SharedQuantizationSpec as SharedQuantizationSpec

_PUBLIC = {
    "compare": ["LayerError"],
    "compilation": ["compile"],
    "convert": ["convert_pt2e"],
    "export.aoti": ["export_aoti", "load_aoti"],
    "export.executorch": ["export_executorch", "run_executorch"],
    "export.onnx": ["export_onnx"],
    "fake_quantize": [
        "FakeQuantize", "disable_fake_quant", "disable_observer", "enable_fake_quant", "enable_observer",
    ],
    "lowering": ["lower"],
    "lowering_report": ["LoweringReport"],
    "modes": ["allow_exported_model_train_eval", "move_exported_model_to_eval", "move_exported_model_to_train"],
    "observer": [
        "HistogramObserver", "MinMaxObserver", "MovingAverageMinMaxObserver", "MovingAveragePerChannelMinMaxObserver",
        "PerChannelMinMaxObserver",
    ],
    "prepare": ["prepare_pt2e", "prepare_qat_pt2e"],
    "quantizer": [
        "ComposableQuantizer", "QuantizationConfig", "X86InductorQuantizer", "X86Quantizer", "XNNPACKQuantizer",
        "annotate_product", "get_default_x86_inductor_quantization_config", "get_symmetric_quantization_config",
    ],
    "sensitivity": ["SkipList", "skip_list"],
    "spec": ["QuantizationAnnotation", "QuantizationSpec", "Quantizer", "SharedQuantizationSpec"],
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_MODULE_OF[name]}")
    found = globals()[name] = getattr(module, name)
    return found
