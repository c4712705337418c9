"""Every set of native kernels against the reference, for every format, shape and dtype; skipped where it cannot run."""

from __future__ import annotations

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmquant.config.schemes import parse_scheme
from llmquant.errors import ConfigError
from llmquant.formats import get_format
from llmquant.kernels import cpu, ops, reference, registry
from llmquant.kernels.packed import Packed
from llmquant.primitives.dynamic import Activation, dequantize_activation, quantize_activation
from llmquant.primitives.metrics import compute_error
from llmquant.quantize import quantize_weight
from llmquant.tensor import QuantizedTensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# SQNR against the same product in float64: what rounding the output to the dtype allows, and no more.
BOUNDS = {torch.float32: (122, 160), torch.float16: (66, 85), torch.bfloat16: (44, 65)}
# Tiles of bfloat16 inputs round weights (and what int8 activations stand for) to bfloat16 once more.
MANY = {**BOUNDS, torch.bfloat16: (42, 65)}
SHAPES = ((1, 4), (7, 576), (33, 100), (16, 8), (3, 1000), (2, 65))
SCHEMES = [
    *(f"int{bits}-g32{zero}" for bits in range(1, 9) for zero in ("", "-asym")),
    *(f"int4-{group}{zero}" for group in ("g4", "g10", "g16", "g24", "g40", "row", "tensor") for zero in ("", "-asym")),
    *(f"int{bits}-{group}" for bits in (3, 8) for group in ("g12", "g48", "row-asym", "row", "tensor")),
    *(f"int{bits}-g128{zero}" for bits in (3, 4, 8) for zero in ("", "-asym")),
    *(f"{kind}-{group}" for kind in ("float8", "float8-e5m2") for group in ("row", "tensor")),
    *("mxfp4", "mxfp6-e2m3", "mxfp6-e3m2", "mxfp8", "mxfp8-e5m2", "nvfp4", "nf4", "nf4-single"),
    *("nf4-g12", "nf4-g48", "nf4-single-g128", "int4-g48-asym"),
    *(f"int{bits}-g32-s8{zero}" for bits in range(2, 7) for zero in ("", "-asym")),
    *("int4-g16-s8-asym", "int4-g10-s8", "int3-g128-s8", "int6-g48-s8"),
    *("float8-b128", "float8-b16x48", "float8-b16x32"),
    "float8-2x4",
]
ONE_BYTE = [
    "mxfp4",
    "mxfp6-e2m3",
    "nvfp4",
    "mxfp6-e3m2",
    "nf4",
    "mxfp8",
    "int3-g32-s8",
]  # scales, some with an outer one
ACTIVATIONS = [Activation(group, asymmetric) for group in (0, 20, 32, 256) for asymmetric in (False, True)]

every_backend = pytest.mark.parametrize(
    "backend",
    [
        pytest.param(name, marks=pytest.mark.skipif(native.missing is not None, reason=str(native.missing)))
        for name, native in cpu.BACKENDS.items()
    ],
)


def weight_of(scheme: str, rows: int, columns: int) -> QuantizedTensor:
    config = parse_scheme(scheme)
    assert config is not None
    return quantize_weight(torch.randn(rows, columns).bfloat16() * 0.02, config.with_algorithm("rtn"))


def cases(backend: str, scheme: str) -> list[Packed]:
    """Weights of every shape that the backend does not refuse."""
    native = cpu.BACKENDS[backend]
    found = [weight_of(scheme, *shape).packed() for shape in SHAPES]
    return [w for w in found if native.refusal(w.format, w.block, w.columns, "cpu") is None]


def assert_exact(found: Tensor, exact: Tensor, dtype: torch.dtype, count: int, case: object) -> None:
    low, high = BOUNDS[dtype] if count <= 8 else MANY[dtype]
    assert found.dtype == dtype and found.shape == exact.shape and found.isfinite().all()
    error = compute_error(exact, found)
    assert error > low, case
    assert error < high or found.numel() < 40, ("too good: is the output really rounded?", case)


@every_backend
@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_are_bit_for_bit_those_of_the_reference(backend: str, scheme: str) -> None:
    for weight in cases(backend, scheme):
        exact = weight.dequantize()
        indices = torch.randint(weight.rows, (2, 5))
        for dtype in DTYPES:
            found = cpu.BACKENDS[backend].dequantize(weight, dtype)
            assert torch.equal(found, exact.to(dtype)), (weight.rows, weight.columns, dtype)
            picked = cpu.BACKENDS[backend].embedding(indices, weight, dtype)
            assert torch.equal(picked, exact.to(dtype)[indices])


@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_linear_is_as_exact_as_its_dtype(backend: str, scheme: str, dtype: torch.dtype) -> None:
    for weight in cases(backend, scheme):
        for count in (1, 2, 3, 4, 7, 9, 33):
            x, bias = torch.randn(count, weight.columns).to(dtype), torch.randn(weight.rows)
            with registry.force(backend):
                found = ops.linear(x, weight, bias)
            exact = F.linear(x.double(), weight.dequantize().double(), bias.double())
            assert_exact(found, exact, dtype, count, (weight.rows, weight.columns, count))


@every_backend
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.scheme)
@pytest.mark.parametrize("scheme", [*SCHEMES[::3], "int3-g128-asym", "int4-g128", "int1-row", *ONE_BYTE[::2]])
def test_int8_activations_follow_the_code_rule(backend: str, scheme: str, activation: Activation) -> None:
    for weight in cases(backend, scheme):
        for dtype, count in ((torch.float32, 3), (torch.bfloat16, 5), (torch.float16, 1), (torch.bfloat16, 35)):
            x, bias = torch.randn(count, weight.columns).to(dtype), torch.randn(weight.rows)
            x[0, : weight.columns // 2] = 0
            with registry.force(backend):
                found = ops.linear_int8(x, weight, activation, bias)
            seen = dequantize_activation(quantize_activation(x, activation), activation)
            exact = F.linear(seen.double(), weight.dequantize().double(), bias.double())
            assert_exact(found, exact, dtype, count, (weight.rows, weight.columns, count))


@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", range(1, 9))
def test_sums_have_room_for_the_largest_codes(backend: str, bits: int, dtype: torch.dtype) -> None:
    """Every code the largest, and every plane of the inputs but a few -128: where 16-bit sums would be too small."""
    rows, columns = 9, 96
    qdata = torch.full((rows, columns * bits // 8), 255, dtype=torch.uint8)
    zeros = torch.zeros(rows, (3 * bits + 7) // 8, dtype=torch.uint8)
    weight = Packed(qdata, torch.full((rows, 3), 2.0**-8), zeros, f"int{bits}", (1, 32), columns)
    x = torch.ones(2, columns, dtype=dtype)
    x[:, ::32] = 2.0**14 if dtype == torch.float32 else 2.0**6
    x[1] *= -1
    with registry.force(backend):
        plain, dynamic = ops.linear(x, weight), ops.linear_int8(x[:, 1:2].expand(2, columns), weight, Activation(32))
    exact = (x.double().sum(1, keepdim=True) * (2**bits - 1) / 256).expand(2, rows)
    assert torch.equal(plain, exact.to(dtype))
    ones = torch.tensor([[1.0], [-1.0]]).expand(2, rows) * columns * (2**bits - 1) / 256
    torch.testing.assert_close(dynamic, ones.to(dtype), rtol=1e-6 if dtype == torch.float32 else 4e-3, atol=0)


@every_backend
@pytest.mark.parametrize("scheme", ["int4-g32", "int8-row", "int3-g12-asym", "float8"])
def test_no_input_gives_no_output(backend: str, scheme: str) -> None:
    """An expert that no token chose."""
    for weight in cases(backend, scheme):
        for dtype, before in ((d, b) for d in DTYPES for b in ((0,), (2, 0))):
            x = torch.empty(*before, weight.columns, dtype=dtype)
            with registry.force(backend):
                found = [ops.linear(x, weight, torch.randn(weight.rows)), ops.linear_int8(x, weight, Activation(0))]
                rows = ops.embedding(torch.empty(before, dtype=torch.int64), weight, dtype)
            assert {(y.dtype, tuple(y.shape)) for y in found} == {(dtype, (*before, weight.rows))}
            assert (rows.dtype, tuple(rows.shape)) == (dtype, (*before, weight.columns))


SMALL_SCALES = (
    ("mxfp4", torch.float8_e8m0fnu, 0),
    ("mxfp6-e2m3", torch.float8_e8m0fnu, 0),
    ("mxfp8", torch.float8_e8m0fnu, 0),
    ("nvfp4", torch.float8_e4m3fn, 1),
    ("nf4", torch.uint8, 5),
    ("int4", torch.int8, 5),
    ("int2", torch.int8, 5),
)


@every_backend
@pytest.mark.parametrize(("name", "dtype", "outers"), SMALL_SCALES)
def test_every_scale_of_one_byte(backend: str, name: str, dtype: torch.dtype, outers: int) -> None:
    """NaN, zeros, subnormal ones and negative ones among them, under one outer scale, one a row, or none."""
    fmt, rows = get_format(name), 5
    group = 32 if fmt.storage == "affine" else fmt.group_size or 0
    columns = 256 * group
    qdata = torch.randint(256, (rows, fmt.row_bytes(columns)), dtype=torch.uint8)
    if fmt.bits == 8:  # e4m3 has NaN, too
        qdata = qdata % 0x7F
    scale = torch.arange(256).to(torch.uint8).repeat(rows, 1).view(dtype)
    outer = torch.rand(outers, 1) + 0.5 if outers else None
    weight = Packed.with_small_scales(qdata, scale, None, name, (1, group), columns, outer=outer)
    exact = weight.dequantize()
    wide = weight.widened()
    assert wide.scale.itemsize > 1 and torch.equal(wide.dequantize().nan_to_num(), exact.nan_to_num())
    native = cpu.BACKENDS[backend]
    for kind in DTYPES:
        torch.testing.assert_close(native.dequantize(weight, kind), exact.to(kind), rtol=0, atol=0, equal_nan=True)
    # One scale a column of the product: inputs that pick the columns of one group at a time.
    x = torch.eye(256).repeat_interleave(group, 1) / 16
    sums = exact.view(rows, 256, group).double().sum(-1).T / 16
    size = exact.view(rows, 256, group).double().abs().sum(-1).T / 16
    for found in (
        torch.cat([native.linear(token, weight, None) for token in x.split(1)]),
        native.linear(x, weight, None),
    ):
        # What belongs to another group meets zeros; NaN times zero is NaN.
        assert found.isnan().all() if sums.isnan().any() else found.isfinite().all()
    # Without NaN, and where products and tiles do not fall below the smallest float32.
    kept = sums.isfinite().all(1) & (size.amax(1) < 1e30) & (size.amax(1) > 1e-30)
    scale = torch.where(kept, scale.view(torch.uint8), 0x38).to(torch.uint8).view(dtype)
    weight = Packed.with_small_scales(qdata, scale, None, name, (1, group), columns, outer=outer)
    exact = weight.dequantize().view(rows, 256, group).double()
    sums, size = exact.sum(-1).T / 16, exact.abs().sum(-1).T / 16
    for found in (
        torch.cat([native.linear(token, weight, None) for token in x.split(1)]),
        native.linear(x, weight, None),
    ):
        assert torch.all((found.double() - sums).abs() <= 1e-6 * size + 1e-37)


@every_backend
@pytest.mark.parametrize("scheme", ["mxfp4", "nvfp4", "mxfp6-e3m2", "nf4", "mxfp8", "float8-b128", "int5-g32-s8"])
def test_panels_of_rows_keep_their_outer_scales(backend: str, scheme: str) -> None:
    weight = weight_of(scheme, 260, 96).packed()
    exact, x = weight.dequantize(), torch.randn(3, 260)
    assert torch.equal(weight.panel(128, 200).dequantize(), exact[128:200])
    torch.testing.assert_close(cpu.BACKENDS[backend].matmul(x, weight), x @ exact, rtol=1e-4, atol=1e-4)


@every_backend
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_shows(backend: str, dtype: torch.dtype, poison: float) -> None:
    weight = weight_of("int4-g32", 12, 96).packed()
    for count in (1, 12):
        x = torch.randn(count, 96).to(dtype)
        x[0, 40] = poison
        with registry.force(backend):
            plain, dynamic = ops.linear(x, weight), ops.linear_int8(x, weight, Activation(32))
        assert not plain[0].isfinite().any() and plain[1:].isfinite().all()
        assert dynamic[0].isnan().all() and dynamic[1:].isfinite().all()


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("scheme", ["int4-g32", "int8-g12-asym", "int3-row", "float8-row"])
def test_tokens_of_every_size(backend: str, scheme: str, dtype: torch.dtype) -> None:
    """From numbers whose bfloat16 parts underflow to those whose nearest bfloat16 is an infinity."""
    weight = weight_of(scheme, 40, 300).packed()
    native = cpu.BACKENDS[backend]
    if native.refusal(weight.format, weight.block, weight.columns, "cpu") is not None:
        pytest.skip("refused")
    x, bias = torch.randn(20, 300), torch.randn(40) * 2.0**-120
    smallest = 2.0**-115 if dtype == torch.float32 else 2.0**-18
    x[1] *= smallest
    x[2] *= torch.logspace(0, -36, 300)
    x[3] = 0
    x[17:19] *= smallest
    x[19, 7] = torch.finfo(dtype).max
    x = x.to(dtype)
    found = native.linear(x, weight, bias)
    values = weight.dequantize().double()
    exact = F.linear(x.double(), values, bias.double())
    size = F.linear(x.double().abs(), values.abs(), bias.double().abs())
    info = torch.finfo(dtype)
    error = (found.double() - exact).abs()
    allowed = info.eps / 2 * exact.abs() + 4e-7 * size + info.smallest_normal * info.eps
    if backend not in ("amx", "portable"):  # integers: so many bits below the largest of 32 neighbours
        near = F.max_pool1d(x.double().abs()[:, None], 63, 1, 31)[:, 0]
        bits = 22 if dtype == torch.float32 else 14
        allowed += F.linear((near * 2.0**-bits).clamp(min=2.0**-126), values.abs())
    assert (error <= allowed).all()
    assert torch.equal(found[3], bias.to(dtype))


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_tokens_that_are_not_finite_stay_alone(backend: str, dtype: torch.dtype) -> None:
    """They give what plain products give, and all others the same bits as without them."""
    weight = weight_of("int4-g32-asym", 40, 96).packed()
    x = torch.randn(40, 96).to(dtype)
    native = cpu.BACKENDS[backend]
    clean = native.linear(x, weight, None)
    x[0, 40], x[1, 3], x[20, 95], x[39, 0] = float("inf"), float("nan"), float("-inf"), float("inf")
    found = native.linear(x, weight, None)
    bad = x.isfinite().logical_not().any(1)
    torch.testing.assert_close(found[bad], reference.linear(x[bad], weight, None), equal_nan=True)
    assert found[bad].isinf().any() and torch.equal(found[~bad], clean[~bad])


@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_tokens_than_are_packed_at_a_time(backend: str, dtype: torch.dtype) -> None:
    weight, count = weight_of("int4-g32", 5, 1024).packed(), 9000
    x = torch.randn(count, 1024).to(dtype)
    x[-3] = float("nan")
    found = cpu.BACKENDS[backend].linear(x, weight, None)
    assert found[-3].isnan().all()
    kept = torch.arange(count) != count - 3
    exact = F.linear(x[kept].double(), weight.dequantize().double())
    assert_exact(found[kept], exact, dtype, count, count)


@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 200), (200,), (2, 3, 200), (2, 0, 200), (1, 1, 1, 200)])
def test_leading_dimensions(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight, x = weight_of("int5-g40", 9, 200).packed(), torch.randn(shape).to(dtype)
    with registry.force(backend):
        found = ops.linear(x, weight)
    torch.testing.assert_close(found, reference.linear(x, weight, None))


@every_backend
def test_inputs_and_weights_need_not_be_contiguous(backend: str) -> None:
    weight = weight_of("int4-g32", 12, 128)
    x, part = torch.randn(128, 6).t(), weight[2:9].packed()
    with registry.force(backend):
        found = ops.linear(x, part)
    torch.testing.assert_close(found, reference.linear(x, part, None))


@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 3, 40])
@pytest.mark.parametrize("scheme", ["int3-g32", "nvfp4", "nf4", "mxfp6-e3m2", "mxfp8"])
def test_the_number_of_threads_changes_nothing(backend: str, scheme: str, count: int, dtype: torch.dtype) -> None:
    weight, x = weight_of(scheme, 70, 300).packed(), torch.randn(count, 300).to(dtype)
    before, found = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        with registry.force(backend):
            found.append((ops.linear(x, weight), ops.linear_int8(x, weight, Activation(32))))
    torch.set_num_threads(before)
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


@every_backend
def test_matmul_is_the_transposed_product(backend: str) -> None:
    weight, x = weight_of("int6-g32-asym", 40, 90).packed(), torch.randn(5, 40)
    torch.testing.assert_close(cpu.BACKENDS[backend].matmul(x, weight), reference.matmul(x, weight))


@every_backend
def test_rows_out_of_range_are_refused(backend: str) -> None:
    weight = weight_of("int4-g32", 12, 64).packed()
    for index in (-1, 12):
        with registry.force(backend), pytest.raises(IndexError, match=f"index {index} is out of range"):
            ops.embedding(torch.tensor([0, index]), weight, torch.float32)


@pytest.mark.skipif(cpu.BACKENDS["avx512_vnni"].missing is not None, reason="no such processor")
@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        ("int4-g10", "group 10 is not a multiple of 4"),
        ("int3-g6-asym", "group 6 is not a multiple of 4"),
        ("nf4-g10", "group 10 is not a multiple of 4"),
    ],
)
def test_refusals_have_reasons(scheme: str, reason: str) -> None:
    weight = weight_of(scheme, 8, 64)
    choice = weight.kernel()
    assert choice.kernel == "avx512" and f"avx512_vnni: {reason}" in choice.reason
    with pytest.raises(ConfigError, match="cannot serve this weight"), registry.force("avx512_vnni"):
        ops.linear(torch.randn(1, 64), weight.packed())


PANELS = [
    ("avx2", "int4-g32", torch.bfloat16, 64),
    ("avx2", "int4-row", torch.float32, 32),
    ("avx2_vnni", "int4-g32", torch.float32, None),
    ("avx2_vnni", "int4-g10", torch.bfloat16, 8),
    ("avx512", "float8-row", torch.float16, 8),
    ("avx512", "int3-g32", torch.float16, 48),
    ("portable", "int4-g32", torch.float32, 8),
]


@pytest.mark.parametrize(("backend", "scheme", "dtype", "most"), PANELS)
def test_torch_multiplies_panels_where_that_is_faster(
    backend: str, scheme: str, dtype: torch.dtype, most: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(cpu.Native, "_linear_by_panels", lambda _, x, *__: seen.append(len(x)))
    monkeypatch.setattr(cpu.Native, "_linear", lambda *_: None)
    weight, counts = weight_of(scheme, 8, 60).packed(), (1, 8, 9, 16, 17, 32, 33, 64, 65, 500)
    for count in counts:
        cpu.BACKENDS[backend].linear(torch.ones(count, 60, dtype=dtype), weight, None)
    assert seen == [count for count in counts if most is not None and count > most]


@every_backend
@pytest.mark.parametrize("scheme", ["int4-g32", *ONE_BYTE, "float8-b128"])
def test_a_served_weight_says_so(backend: str, scheme: str) -> None:
    kernel = weight_of(scheme, 8, 64).kernel().kernel
    assert list(cpu.BACKENDS).index(kernel) <= list(cpu.BACKENDS).index(backend)


def test_threads_that_meet_at_a_new_weight_share_one_view_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another view would be gone while native code still reads it."""
    weight, meeting, made = weight_of("int4-g32", 8, 64).packed(), Barrier(2, timeout=30), cpu.NativeMatrix

    def make_together(packed: Packed) -> cpu.NativeMatrix:
        view = made(packed)
        meeting.wait()  # both threads have found none
        return view

    monkeypatch.setattr(cpu, "NativeMatrix", make_together)
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(cpu.matrix_of, [weight, weight])
    assert one is other is cpu.matrix_of(weight)


def test_unknown_backends_are_refused() -> None:
    with pytest.raises(ConfigError, match="unknown backend 'magic'"), registry.force("magic"):
        pass


@pytest.mark.skipif(cpu.missing() is not None, reason=str(cpu.missing()))
def test_reading_reads_every_byte() -> None:
    data = torch.randint(256, (8 * 1003,), dtype=torch.uint8)
    words = data.view(torch.int64)
    parity = 0
    for word in words.tolist():
        parity ^= word % 2**64
    assert cpu.read_bytes(data) == parity


# --- the same C++ without Python ---------------------------------------------------------------------------

CSRC = Path(cpu.__file__).parent / "csrc"
DRIVER = Path(__file__).parent / "native_driver.cpp"


def build_driver(compiler: str, folder: Path, *flags: str) -> Path:
    if shutil.which(compiler) is None:
        pytest.skip(f"needs {compiler}")
    program = folder / "driver"
    sources = [str(path) for path in (DRIVER, *sorted(CSRC.glob("*.cpp")))]
    quiet = ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]
    command = [
        compiler,
        "-O2",
        "-g",
        "-std=c++17",
        "-fopenmp",
        f"-I{CSRC}",
        *quiet,
        *flags,
        *sources,
        "-o",
        str(program),
    ]
    subprocess.run(command, check=True, capture_output=True)
    return program


@pytest.mark.slow
@pytest.mark.parametrize("threads", ["1", "2"])
def test_no_kernel_leaves_its_memory(tmp_path: Path, threads: str) -> None:
    """Random shapes under AddressSanitizer, every buffer before a forbidden page, kept memory full of NaN."""
    program = build_driver("g++", tmp_path, "-fsanitize=address", "-DLLMQUANT_POISON")
    run = subprocess.run([program, threads, "1000"], capture_output=True, text=True, env={"OMP_NUM_THREADS": threads})
    assert run.returncode == 0 and "1000 cases right" in run.stdout, run.stdout + run.stderr


@pytest.mark.slow
def test_portable_kernels_are_right_on_another_processor(tmp_path: Path) -> None:
    """Built for 64-bit ARM, run by an emulator."""
    program = build_driver("aarch64-linux-gnu-g++", tmp_path, "-static")
    if shutil.which("qemu-aarch64") is None:
        pytest.skip("needs qemu-aarch64")
    run = subprocess.run(["qemu-aarch64", program, "3", "500"], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.strip() == "500 cases right on portable", run.stdout + run.stderr
