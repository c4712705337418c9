"""Quantization-aware training: fake quantization while a model trains, quantized tensors afterwards.

    report = llmquant.qat.prepare(model, "int3-g64")
    ...                                # any training loop, or transformers.Trainer
    llmquant.qat.convert(model)        # the tensors of `quantize_`

`straight` has the rule for gradients, `tensor` the weight that a module sees while it runs, `hooks` what hands it to
the module, `model` the two functions that users call.
"""

from llmquant.qat.model import convert, is_prepared, prepare
from llmquant.qat.report import PreparationReport, PreparedWeight

__all__ = ["PreparationReport", "PreparedWeight", "convert", "is_prepared", "prepare"]
