"""Times one way to multiply by a quantized matrix, in its own environment, for `peers.py`.

Needs the standard library, numpy and the peer. Speaks JSON lines: the first line in says what to set up,
`{"peer", "rows", "columns", "m", "megabytes", "threads"}`, and is answered by `{"copies", "bytes", "error", "note"}`
or `{"failed": reason}`; every further line is a turn, answered by `{"seconds", "idle"}`: wall time of one pass over all
copies, and the processor time that this process burned since its last turn.

Every peer gets the same values in float32 and quantizes them in its own way. Its result is compared with numpy's
product of the weights that it should have understood; `error` is the relative distance.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

GROUP = 32
Array = np.ndarray[Any, Any]


class Job(NamedTuple):
    """What to multiply.

    Attributes:
        weight: [N, K] in float32.
        x: [M, K] in float32.
        megabytes: of weights in rotation; None: two weights.
        threads: for the peer.
    """

    weight: Array
    x: Array
    megabytes: float | None
    threads: int

    def copies(self, size: float) -> int:
        """How many weights of `size` bytes rotate, at least two."""
        return 2 if self.megabytes is None else max(math.ceil(self.megabytes * 1e6 / size), 2)


class Peer(NamedTuple):
    """A peer that is ready.

    Attributes:
        run: one pass over all copies.
        outputs: the [M, N] result of each copy, after a run; copy i has the rows of `decoded` rolled by `rolled * i`.
        decoded: [N, K], the weight as the peer should understand it.
        size: bytes of one weight.
        rolled: 1 where the copies differ, so that the peer cannot merge equal ones; 0 where they are equal.
        bound: the largest relative error of a right result.
        note: how the peer does it, if there is something to say.
    """

    run: Callable[[], object]
    outputs: Callable[[], list[Array]]
    decoded: Array
    size: int
    rolled: int
    bound: float
    note: str = ""


# --- formats ------------------------------------------------------------------------------------------


def int4(weight: Array) -> tuple[Array, Array]:
    """Codes 0..15 around 8, uint8 [N, K], and scales [N, K / 32] in float32 that float16 can hold."""
    groups = weight.reshape(len(weight), -1, GROUP)
    scale = (np.abs(groups).max(-1) / 7).astype(np.float16).astype(np.float32)
    codes = np.clip(np.rint(groups / scale[..., None]) + 8, 0, 15)
    return codes.reshape(weight.shape).astype(np.uint8), scale


def decode(codes: Array, scale: Array) -> Array:
    """[N, K] in float32."""
    groups = codes.reshape(*scale.shape, GROUP).astype(np.float32) - 8
    return (groups * scale[..., None]).reshape(codes.shape)


def nibbles(codes: Array) -> Array:
    """uint8 [N, K / 2], the even columns in the low halves."""
    return codes[:, ::2] | codes[:, 1::2] << 4


# --- llama.cpp ----------------------------------------------------------------------------------------

GGML_TYPES = {"q4_0": 2, "q8_0": 8, "q4_K": 12}
GGML_F32 = 0


class _InitParams(ctypes.Structure):
    """`struct ggml_init_params`"""

    _fields_ = (("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class _TypeTraits(ctypes.Structure):
    """`struct ggml_type_traits`"""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("block", ctypes.c_int64),
        ("interleave", ctypes.c_int64),
        ("size", ctypes.c_size_t),
        ("quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float", ctypes.c_void_p),
    )


_P, _I, _L, _Z = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_size_t
_GGML = {
    "ggml_init": (_P, (_InitParams,)),
    "ggml_tensor_overhead": (_Z, ()),
    "ggml_graph_overhead_custom": (_Z, (_Z, ctypes.c_bool)),
    "ggml_row_size": (_Z, (_I, _L)),
    "ggml_get_type_traits": (ctypes.POINTER(_TypeTraits), (_I,)),
    "ggml_quantize_chunk": (_Z, (_I, _P, _P, _L, _L, _L, _P)),
    "ggml_new_tensor_2d": (_P, (_P, _I, _L, _L)),
    "ggml_mul_mat": (_P, (_P, _P, _P)),
    "ggml_new_graph_custom": (_P, (_P, _Z, ctypes.c_bool)),
    "ggml_build_forward_expand": (None, (_P, _P)),
    "ggml_backend_alloc_ctx_tensors_from_buft": (_P, (_P, _P)),
    "ggml_backend_buffer_set_usage": (None, (_P, _I)),
    "ggml_backend_buffer_free": (None, (_P,)),
    "ggml_backend_buft_name": (ctypes.c_char_p, (_P,)),
    "ggml_backend_cpu_buffer_type": (_P, ()),
    "ggml_backend_tensor_set": (None, (_P, _P, _Z, _Z)),
    "ggml_backend_tensor_get": (None, (_P, _P, _Z, _Z)),
    "ggml_backend_graph_compute": (_I, (_P, _P)),
    "ggml_backend_reg_dev_get": (_P, (_P, _Z)),
    "ggml_backend_reg_get_proc_address": (_P, (_P, ctypes.c_char_p)),
    "ggml_backend_dev_supports_op": (ctypes.c_bool, (_P, _P)),
    "ggml_backend_cpu_init": (_P, ()),
    "ggml_backend_cpu_set_n_threads": (None, (_P, _I)),
    "ggml_backend_cpu_reg": (_P, ()),
}


class Ggml:
    """The functions of libggml-base and libggml-cpu that the package llama-cpp-python brings along."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec("llama_cpp")
        if spec is None or spec.origin is None:
            raise ImportError("llama-cpp-python is not installed")
        folder = Path(spec.origin).parent / "lib"
        libraries = [ctypes.CDLL(str(folder / f"libggml-{n}.so"), mode=ctypes.RTLD_GLOBAL) for n in ("base", "cpu")]
        for name, (result, arguments) in _GGML.items():
            function = next(getattr(lib, name) for lib in libraries if hasattr(lib, name))
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("ggml_"), function)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    def context(self, tensors: int) -> int:
        """Room for the descriptions of tensors and a graph; their data lies in buffers."""
        size = self.tensor_overhead() * (tensors + 8) + self.graph_overhead_custom(max(2 * tensors, 64), False)
        return int(self.init(_InitParams(size, None, True)))

    def weight_places(self) -> list[int]:
        """Buffer types that a weight may lie in, best first, as llama.cpp tries them: AMX, repacked, plain."""
        registry = self.backend_cpu_reg()
        address = self.backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        places = []
        if address:
            found = ctypes.CFUNCTYPE(ctypes.POINTER(_P), _P)(address)(self.backend_reg_dev_get(registry, 0))
            while found and found[len(places)]:
                places.append(found[len(places)])
        return [*places, self.backend_cpu_buffer_type()]


def llama(kind: str, job: Job) -> Peer:
    """A graph of `ggml_mul_mat`, one a copy, with the weights laid out as llama.cpp itself would choose."""
    ggml, number = Ggml(), GGML_TYPES[kind]
    rows, columns = job.weight.shape
    packed = np.empty(rows * ggml.row_size(number, columns), np.uint8)
    ggml.quantize_chunk(number, job.weight.ctypes.data, packed.ctypes.data, 0, rows, columns, None)
    decoded = np.empty_like(job.weight)
    ggml.get_type_traits(number).contents.to_float(packed.ctypes.data, decoded.ctypes.data, decoded.size)

    copies = job.copies(packed.nbytes)
    backend = ggml.backend_cpu_init()
    ggml.backend_cpu_set_n_threads(backend, job.threads)
    device = ggml.backend_reg_dev_get(ggml.backend_cpu_reg(), 0)
    for place in ggml.weight_places():
        weights_context, context = ggml.context(copies), ggml.context(copies + 1)
        weights = [ggml.new_tensor_2d(weights_context, number, columns, rows) for _ in range(copies)]
        buffer = ggml.backend_alloc_ctx_tensors_from_buft(weights_context, place)
        if not buffer:
            continue
        ggml.backend_buffer_set_usage(buffer, 1)  # GGML_BACKEND_BUFFER_USAGE_WEIGHTS
        x = ggml.new_tensor_2d(context, GGML_F32, columns, len(job.x))
        products = [ggml.mul_mat(context, weight, x) for weight in weights]
        ggml.backend_alloc_ctx_tensors_from_buft(context, ggml.backend_cpu_buffer_type())
        if ggml.backend_dev_supports_op(device, products[0]):
            break
        ggml.backend_buffer_free(buffer)
    else:
        raise RuntimeError(f"no buffer of ggml takes {kind} weights")

    for weight in weights:
        ggml.backend_tensor_set(weight, packed.ctypes.data, 0, packed.nbytes)
    ggml.backend_tensor_set(x, job.x.ctypes.data, 0, job.x.nbytes)
    graph = ggml.new_graph_custom(context, max(2 * copies, 64), False)
    for product in products:
        ggml.build_forward_expand(graph, product)

    def outputs() -> list[Array]:
        out = [np.empty((len(job.x), rows), np.float32) for _ in products]
        for tensor, array in zip(products, out, strict=True):
            ggml.backend_tensor_get(tensor, array.ctypes.data, 0, array.nbytes)
        return out

    note = f"weights in {ggml.backend_buft_name(place).decode()}"
    return Peer(lambda: ggml.backend_graph_compute(backend, graph), outputs, decoded, packed.nbytes, 0, 0.02, note)


# --- ONNX Runtime -------------------------------------------------------------------------------------


def ort(kind: str, job: Job) -> Peer:
    """One session with a `MatMulNBits` a copy. Threads spin within a run and stop with it."""
    import onnx
    import onnxruntime

    accuracy = int(kind.removeprefix("int4-accuracy"))
    rows, columns = job.weight.shape
    codes, scale = int4(job.weight)
    size = codes.size // 2 + 4 * scale.size  # scales in float32, as the inputs are
    copies = job.copies(size)
    packed = nibbles(codes).reshape(rows, -1, GROUP // 2)
    nodes, constants, values = [], [], []
    for i in range(copies):
        names = [f"b{i}", f"s{i}"]
        for name, array in zip(names, (np.roll(packed, i, 0), np.roll(scale, i, 0)), strict=True):
            constants.append(onnx.numpy_helper.from_array(array, name))
        node = onnx.helper.make_node("MatMulNBits", ["x", *names], [f"y{i}"], domain="com.microsoft")
        settings = {"K": columns, "N": rows, "bits": 4, "block_size": GROUP, "accuracy_level": accuracy}
        node.attribute.extend(onnx.helper.make_attribute(key, value) for key, value in settings.items())
        nodes.append(node)
        values.append(onnx.helper.make_tensor_value_info(f"y{i}", onnx.TensorProto.FLOAT, [len(job.x), rows]))
    inputs = [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, list(job.x.shape))]
    graph = onnx.helper.make_graph(nodes, "rotation", inputs, values, constants)
    versions = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=versions, ir_version=9)

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = job.threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_cpu_input("x", job.x)
    out = [np.empty((len(job.x), rows), np.float32) for _ in range(copies)]
    for i, array in enumerate(out):
        binding.bind_output(f"y{i}", "cpu", 0, np.float32, array.shape, array.ctypes.data)
    bound = 0.02 if accuracy == 4 else 1e-3
    return Peer(lambda: session.run_with_iobinding(binding), lambda: out, decode(codes, scale), size, 1, bound)


# --- OpenVINO -----------------------------------------------------------------------------------------


def openvino(kind: str, job: Job) -> Peer:
    """One model with a compressed-weight MatMul a copy: u4, Convert, Subtract, Multiply, MatMul."""
    import openvino as ov
    from openvino import opset13 as ops

    rows, columns = job.weight.shape
    codes, scale = int4(job.weight)
    size = codes.size // 2 + 2 * scale.size
    copies = job.copies(size)
    packed = nibbles(codes)
    x = ops.parameter(list(job.x.shape), np.float32)
    results = []
    for i in range(copies):
        data = ov.Tensor(np.ascontiguousarray(np.roll(packed, i, 0)), [rows, columns // GROUP, GROUP], ov.Type.u4)
        zero = ov.Tensor(np.full((rows * columns // GROUP + 1) // 2, 0x88, np.uint8), [*scale.shape, 1], ov.Type.u4)
        centred = ops.subtract(
            ops.convert(ov.op.Constant(data, False), np.float16), ops.convert(ov.op.Constant(zero, False), np.float16)
        )
        scaled = ops.multiply(centred, ops.constant(np.roll(scale, i, 0)[..., None].astype(np.float16)))
        matrix = ops.convert(ops.reshape(scaled, ops.constant([rows, columns]), False), np.float32)
        results.append(ops.result(ops.matmul(x, matrix, False, True)))
    settings: dict[str, Any] = {
        "INFERENCE_NUM_THREADS": job.threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": False,
    }
    if kind == "u4-dynamic":
        settings |= {"DYNAMIC_QUANTIZATION_GROUP_SIZE": GROUP, "INFERENCE_PRECISION_HINT": "f32"}
    else:
        settings |= {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 0, "INFERENCE_PRECISION_HINT": "bf16"}
    request = ov.Core().compile_model(ov.Model(results, [x]), "CPU", settings).create_infer_request()
    request.set_input_tensor(ov.Tensor(job.x, shared_memory=True))

    def outputs() -> list[Array]:
        return [request.get_output_tensor(i).data for i in range(copies)]

    return Peer(request.infer, outputs, decode(codes, scale), size, 1, 0.02)


# --- torch and llmquant -------------------------------------------------------------------------------


def torch_peer(kind: str, job: Job) -> Peer:
    """torch's own: `F.linear` in bfloat16, or its int4 product for bfloat16 inputs."""
    import torch

    torch.set_num_threads(job.threads)
    x = torch.from_numpy(job.x).bfloat16()
    if kind == "bf16":
        weight = torch.from_numpy(job.weight).bfloat16()
        weights = [weight.clone() for _ in range(job.copies(weight.nbytes))]
        return _torch_pass(lambda w: torch.nn.functional.linear(x, w), weights, weight.float().numpy(), weight.nbytes)

    codes, scale = int4(job.weight)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(torch.from_numpy(codes.astype(np.int32)), 1)
    scales = torch.from_numpy(scale.T.copy()).bfloat16()  # [K / 32, N]
    pairs = torch.stack([scales, torch.zeros_like(scales)], -1)  # value = (code - 8) * scale + zero
    size = packed.nbytes + pairs.nbytes
    weights = [(packed.clone(), pairs.clone()) for _ in range(job.copies(size))]
    decoded = decode(codes, scales.float().numpy().T)
    multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
    return _torch_pass(lambda w: multiply(x, w[0], GROUP, w[1]), weights, decoded, size)


def llmquant(scheme: str, job: Job) -> Peer:
    """`F.linear` with a weight quantized by llmquant, bfloat16 inputs."""
    import torch

    from llmquant import quantize_weight
    from llmquant.config.schemes import parse_scheme

    torch.set_num_threads(job.threads)
    x = torch.from_numpy(job.x).bfloat16()
    config = parse_scheme(scheme)
    assert config is not None
    weight: Any = quantize_weight(torch.from_numpy(job.weight).bfloat16(), config.with_algorithm("rtn"))
    weights = [weight.clone() for _ in range(job.copies(weight.nbytes))]
    decoded = weight.dequantize(torch.float32).numpy()
    note = f"kernel {weight.kernel().kernel}"
    return _torch_pass(lambda w: torch.nn.functional.linear(x, w), weights, decoded, weight.nbytes)._replace(note=note)


def _torch_pass(multiply: Callable[[Any], Any], weights: list[Any], decoded: Array, size: int) -> Peer:
    import torch

    def run() -> None:
        with torch.inference_mode():
            for weight in weights:
                multiply(weight)

    def outputs() -> list[Array]:
        with torch.inference_mode():
            return [multiply(weight).float().numpy() for weight in weights]

    return Peer(run, outputs, decoded, size, 0, 0.02)


# --- the conversation ---------------------------------------------------------------------------------

FAMILIES = {"llama": llama, "ort": ort, "openvino": openvino, "torch": torch_peer, "llmquant": llmquant}


def set_up(order: dict[str, Any]) -> tuple[Peer, dict[str, Any]]:
    """The peer, and what is known of it. Raises `RuntimeError` where its result is wrong."""
    family, _, kind = order["peer"].partition("-")
    random = np.random.default_rng(0)
    weight = random.standard_normal((order["rows"], order["columns"]), np.float32) * np.float32(0.02)
    x = random.standard_normal((order["m"], order["columns"]), np.float32)
    peer = FAMILIES[family](kind, Job(weight, x, order["megabytes"], order["threads"]))
    peer.run()
    outputs = peer.outputs()
    expected = x @ peer.decoded.T  # [M, N]
    error = max(distance(out, np.roll(expected, i * peer.rolled, 1)) for i, out in enumerate(outputs))
    if not error <= peer.bound:
        raise RuntimeError(f"its result is wrong: relative error {error:.2g}, at most {peer.bound:g} is expected")
    return peer, {"copies": len(outputs), "bytes": peer.size, "error": error, "note": peer.note}


def distance(found: Array, expected: Array) -> float:
    """Relative, in the Frobenius norm."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def main() -> None:
    """Sets up what the first line orders, then a turn a line, until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the answers

    def answer(content: dict[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    order = json.loads(sys.stdin.readline())
    try:
        peer, known = set_up(order)
    except Exception as error:  # whatever it is, the other peers go on
        answer({"failed": f"{type(error).__name__}: {error}"})
        return
    answer(known)
    burned = time.process_time()
    for _ in sys.stdin:
        idle = time.process_time() - burned
        if order["megabytes"] is None:
            peer.run()  # the others have had the cache since the last turn
        start = time.perf_counter()
        peer.run()
        seconds = time.perf_counter() - start
        burned = time.process_time()
        answer({"seconds": seconds, "idle": idle})


if __name__ == "__main__":
    main()
