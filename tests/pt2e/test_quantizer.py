"""Which products are quantized, and how: by name, type, filter, and by a quantizer of one's own."""

from __future__ import annotations

import pytest
import torch
from flow import attention, converted, exported, images, prepared, sqnr, targets
from torch import nn

from llmquant.errors import ConfigError
from llmquant.pt2e import (
    ComposableQuantizer,
    MinMaxObserver,
    QuantizationAnnotation,
    QuantizationSpec,
    SharedQuantizationSpec,
    X86InductorQuantizer,
    X86Quantizer,
    XNNPACKQuantizer,
    convert_pt2e,
    get_default_x86_inductor_quantization_config,
    get_symmetric_quantization_config,
    lower,
    prepare_pt2e,
)
from llmquant.pt2e.patterns import is_quantized, named_products

aten = torch.ops.aten


def quantized(graph) -> set[str]:
    return {name for name, node in named_products(graph.graph) if is_quantized(node)}


@pytest.mark.parametrize(
    ("change", "left"),
    [
        (lambda q: q, {"q", "k", "v", "out"}),
        (lambda q: q.set_module_name("q", None), {"k", "v", "out"}),
        (lambda q: q.set_global(None).set_module_name("out", get_default_x86_inductor_quantization_config()), {"out"}),
        (lambda q: q.set_module_type(nn.Linear, None), set()),
        (lambda q: q.add_filter(lambda node: "v" not in str(node.meta["nn_module_stack"])), {"q", "k", "out"}),
    ],
)
def test_names_types_and_filters(change, left):
    model, x = attention()
    quantizer = change(X86Quantizer())
    if not left:
        with pytest.raises(ConfigError, match="annotated nothing"):
            prepared(model, x, quantizer)
    else:
        assert quantized(converted(model, x, quantizer)) == left


def test_a_name_that_is_nowhere_is_an_error():
    model, x = attention()
    with pytest.raises(ConfigError, match=r"layers\.7"):
        prepared(model, x, X86Quantizer().set_module_name("layers.7", None))


def test_one_tensor_has_one_observer():
    model, x = attention()
    observed = [node for node in prepared(model, x).graph.nodes if "activation_post_process" in str(node.target)]
    assert len(observed) == 4 + 2  # four weights, the input of q, k and v, and that of out


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("is_dynamic", [False, True])
def test_configs_for_x86(is_dynamic, per_token):
    if per_token and not is_dynamic:
        with pytest.raises(ConfigError):
            get_default_x86_inductor_quantization_config(per_token=True)
        return
    model, x = attention()
    config = get_default_x86_inductor_quantization_config(is_dynamic=is_dynamic, per_token=per_token)
    graph = converted(model, x, X86InductorQuantizer().set_global(config))
    with torch.no_grad():
        found = graph(x)
        assert 30 < sqnr(model(x), found) < 60
        lowered, report = lower(graph, strict=True)
        assert len(report.int8) == 4 and sqnr(found, lowered(x)) > 60


def test_without_vnni_activations_have_seven_bits():
    for reduce_range, most in ((True, 127), (False, 255)):
        config = get_default_x86_inductor_quantization_config(reduce_range=reduce_range)
        assert config.input_activation.limits == (0, most)


def test_xnnpack_is_signed_and_codes_outputs():
    model, x = attention()
    graph = converted(model, x, XNNPACKQuantizer())
    ops = torch.ops.quantized_decomposed
    codes = [node for node in graph.graph.nodes if node.target is ops.quantize_per_tensor.default]
    assert {node.args[-1] for node in codes} == {torch.int8}
    linears = [node for node in graph.graph.nodes if node.target is aten.linear.default]
    assert all(user.target is ops.quantize_per_tensor.default for node in linears for user in node.users)
    weights = [value for name, value in graph.named_buffers() if name.endswith("_codes")]
    assert all(int(value.min()) >= -127 for value in weights) and len(weights) == 4
    assert 25 < sqnr(model(x), graph(x)) < 60


def test_weights_of_one_scale():
    model, x = attention()
    config = get_symmetric_quantization_config(is_per_channel=False, is_dynamic=True)
    graph = converted(model, x, XNNPACKQuantizer().set_global(config))
    assert torch.ops.quantized_decomposed.dequantize_per_channel.default not in targets(graph)
    assert 20 < sqnr(model(x), graph(x)) < 60


def test_the_first_of_several_quantizers_decides():
    model, x = attention()
    dynamic = get_default_x86_inductor_quantization_config(is_dynamic=True)
    first = X86Quantizer().set_global(None).set_module_name("out", dynamic)
    graph = converted(model, x, ComposableQuantizer([first, X86Quantizer()]))
    choose = torch.ops.quantized_decomposed.choose_qparams.tensor
    assert quantized(graph) == {"q", "k", "v", "out"} and targets(graph).count(choose) == 1


class ReluQuantizer:
    """The example of docs/pt2e.md: what comes out of a relu has the codes of what went in."""

    def annotate(self, model):
        spec = QuantizationSpec(torch.uint8, MinMaxObserver)
        for node in model.graph.nodes:
            if node.target is aten.relu.default:
                (source,) = node.args
                shared = SharedQuantizationSpec((source, node))
                node.meta["quantization_annotation"] = QuantizationAnnotation({source: spec}, shared)
        return model

    def validate(self, model):
        pass


def test_a_quantizer_of_ones_own():
    model, x = images()
    graph = converted(model, x, ReluQuantizer())
    ops = torch.ops.quantized_decomposed
    codes = [node for node in graph.graph.nodes if node.target is ops.quantize_per_tensor.default]
    assert len(codes) == 4
    for relu in (node for node in graph.graph.nodes if node.target is aten.relu.default):
        (behind,) = relu.users
        assert behind.args[1:] == relu.args[0].args[1:]  # scale, zero point, limits
    assert 25 < sqnr(model(x), graph(x)) < 60


def test_annotations_that_cannot_be_are_refused():
    class Strange(ReluQuantizer):
        def annotate(self, model):
            nodes = [node for node in model.graph.nodes if node.target is aten.relu.default]
            spec = QuantizationSpec(torch.uint8, MinMaxObserver)
            nodes[0].meta["quantization_annotation"] = QuantizationAnnotation({nodes[1]: spec})
            return model

    model, x = images()
    with pytest.raises(ConfigError, match="does not read it"):
        prepare_pt2e(exported(model, x), Strange())
    with pytest.raises(ConfigError, match=r"torch\.export"):
        prepare_pt2e(model, X86Quantizer())
    with pytest.raises(ConfigError, match="prepare_pt2e"):
        convert_pt2e(exported(model, x))
