"""The native kernels for CPUs, one backend for each kind of processor that the library knows."""

from __future__ import annotations

import ctypes
import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llmquant.errors import ConfigError
from llmquant.formats import get_format
from llmquant.kernels.cpu import library
from llmquant.kernels.cpu.rounding import fake_quantize
from llmquant.kernels.packed import Packed
from llmquant.primitives.dynamic import Activation, StaticScale, dequantize_activation, quantize_activation
from llmquant.primitives.spec import QParams

_PANEL_ELEMENTS = 2**20
_TABLES = ("scaled", "semisparse")  # kinds of storage whose codes stand for the numbers of a table


class Traits(NamedTuple):
    """What a set of kernels needs and can do.

    needs: the processor's features, in words.
    step: groups of columns must be a multiple of it for products of integers (None: there are none).
    plain: whether the set also serves other weights, at the slower pace of products of floats.
    most_inputs: beyond so many inputs of a weight-only product, by dtype, rows are decoded in panels and torch's own
        product runs on them; absent: never. With products of floats it is `_FEW` inputs.
    panel: the dtype of panels for bfloat16 inputs; without AVX-512 torch's bfloat16 product takes seven times as long
        as that of float32.
    """

    needs: str
    step: int | None
    plain: bool
    most_inputs: dict[torch.dtype, int]
    panel: torch.dtype = torch.bfloat16


_FEW = 8
_EXACT = 4  # bfloat16 inputs in int8 codes that meet tables of floats as float32; more would take too long
# Where torch's product on panels overtakes the set's own: timed at 2048 x 2048, int4-g32, on one thread.
_HALF, _FLOAT = (torch.float16, torch.bfloat16), (torch.float32,)
_ALL_FEW = dict.fromkeys(_HALF + _FLOAT, _FEW)
TRAITS: dict[str, Traits] = {
    "amx": Traits("AMX (bfloat16 and int8 tiles)", 4, False, {}),
    "avx512_vnni": Traits("AVX-512 with VNNI and VBMI", 4, False, {torch.bfloat16: 64}),
    # Strips of 256 bits without `vpdpbusd`; before "avx2_vnni", as what has both has "avx512_vnni", too.
    "avx512": Traits("AVX-512 F, BW, VL and DQ", 4, True, dict.fromkeys(_HALF, 48) | dict.fromkeys(_FLOAT, 32)),
    # `vpdpbusd` is faster than torch's float32 product at every count that was timed, up to 256.
    "avx2_vnni": Traits("AVX2 with AVX-VNNI", 4, True, {}, torch.float32),
    "avx2": Traits("AVX2 and FMA", 4, True, dict.fromkeys(_HALF, 64) | dict.fromkeys(_FLOAT, 32), torch.float32),
    "portable": Traits("any processor", None, True, _ALL_FEW),
}


class Native:
    """One set of kernels, under its name in the library."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.traits = TRAITS[name]

    @functools.cached_property
    def index(self) -> int:
        """Its number in the library."""
        return library.kernels()[self.name][0]

    @functools.cached_property
    def missing(self) -> str | None:
        """Why it cannot run in this process, or None."""
        if library.load() is None:
            return "the native library was not built (no C++ compiler when llmquant was installed?)"
        if not library.kernels().get(self.name, (0, False))[1]:
            return f"this processor lacks {self.traits.needs}"
        return None

    def refusal(self, format_name: str, block: tuple[int, int], columns: int, device: str) -> str | None:
        """Why it cannot serve such a weight (or would be slow at it), or None."""
        if device != "cpu":
            return f"the weight lies on {device}"
        if self.missing:
            return self.missing
        fmt = get_format(format_name)
        if fmt.storage not in ("affine", *_TABLES):
            return f"there is no native kernel for {format_name}"
        step = self.traits.step
        if self.traits.plain or step is None:
            return None
        if fmt.storage in _TABLES:
            step = 16 if fmt.bits == 8 else 4
        if block[1] % step and block[1] < columns:
            return f"group {block[1]} is not a multiple of {step}"
        return None

    def linear(self, x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
        """x [..., K] -> x @ weight.T + bias, [..., N] in x's dtype.

        float32 and float16 inputs meet the weights that the reference decodes, and so do few bfloat16 ones; many meet
        weights rounded to bfloat16. Tiles take many float32 and float16 inputs and weights as sums of two or three
        bfloat16 parts, which lose less than the output's rounding.
        """
        count = x.numel() // max(weight.columns, 1)
        if x.dtype not in library.FLOAT_TYPES or (count > _FEW and self._wants_panels(x.dtype, count, weight)):
            return self._linear_by_panels(x, weight, bias)
        return self._linear(x, weight, bias, 0, weight.columns)

    def _wants_panels(self, dtype: torch.dtype, count: int, weight: Packed) -> bool:
        """Whether torch's product on decoded panels is the faster one for that many inputs, more than a few."""
        most = self.traits.most_inputs.get(dtype)
        if (self.traits.plain or self.traits.most_inputs) and not self._has_integers(weight, dtype):
            most = _FEW
        return most is not None and count > most

    def _has_integers(self, weight: Packed, dtype: torch.dtype) -> bool:
        """Whether products of inputs of a dtype with the weight are those of integers."""
        step, group = self.traits.step, weight.block[1]
        if step is None or not (group % step == 0 or group >= weight.columns):
            return False
        if get_format(weight.format).storage == "affine":
            return True
        integers = None if self.traits.plain else matrix_of(weight).integers
        return integers is not None and (integers.exact or dtype != torch.float32)

    def _linear(
        self,
        x: Tensor,
        weight: Packed,
        bias: Tensor | None,
        activation: int,
        group: int,
        static: StaticScale | None = None,
    ) -> Tensor:
        types = library.FLOAT_TYPES
        if not x.is_contiguous():
            x = x.contiguous()
        rows = weight.rows
        out = x.new_empty((*x.shape[:-1], rows))
        if not out.numel():
            return out  # strips would read a token that is not there
        if bias is None:
            bias_at, bias_type = None, 0
        else:
            bias = (bias if bias.dtype in types else bias.float()).contiguous()
            bias_at, bias_type = bias.data_ptr(), types[bias.dtype]
        loaded = library.load()
        assert loaded is not None
        loaded.llmquant_linear(
            self.index,
            matrix_of(weight).address,
            x.data_ptr(),
            types[x.dtype],
            x.numel() // max(weight.columns, 1),
            bias_at,
            bias_type,
            activation,
            group,
            None if static is None else static.scale.data_ptr(),
            None if static is None or static.zero_point is None else static.zero_point.data_ptr(),
            out.data_ptr(),
        )
        return out

    def linear_int8(
        self, x: Tensor, weight: Packed, activation: Activation, bias: Tensor | None, static: StaticScale | None = None
    ) -> Tensor:
        """The same with x in int8 codes (see `primitives.dynamic`): integer products, float32 scaling.

        Tiles (many bfloat16 inputs) take code x scale and the weights as the nearest bfloat16. Weights whose numbers
        are no few integers (float8, nf4) meet what the activation's codes stand for, where several bfloat16 inputs are
        those that are nearest to it.
        """
        if not _are_integers(weight.format) or x.dtype not in library.FLOAT_TYPES:
            seen = dequantize_activation(quantize_activation(x, activation, static), activation)
            if x.dtype == torch.bfloat16 and seen.numel() > _EXACT * weight.columns:
                seen = seen.to(x.dtype)
            return self.linear(seen, weight, bias).to(x.dtype)
        kind, group = 2 if activation.asymmetric else 1, activation.width(weight.columns)
        return self._linear(x, weight, bias, kind, group, static)

    def linear_float8(
        self, x: Tensor, weight: Packed, activation: Activation, bias: Tensor | None, static: StaticScale | None = None
    ) -> Tensor:
        """The same with x as its float8 codes stand for it, in x's dtype."""
        return self.linear(fake_quantize(x, activation, static), weight, bias)

    def embedding(self, indices: Tensor, weight: Packed, dtype: torch.dtype) -> Tensor:
        """indices [...] int -> rows of the table, [..., K] in `dtype`."""
        flat = indices.reshape(-1).to(torch.int64).contiguous()
        out = torch.empty(*indices.shape, weight.columns, dtype=dtype)
        bad = self._rows(weight, flat, flat.numel(), out)
        if bad >= 0:
            raise IndexError(f"index {int(flat[bad])} is out of range for a table of {weight.rows} rows")
        return out

    def dequantize(self, weight: Packed, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """The matrix in float32, float16 or bfloat16, [N, K]: bit for bit what the reference decodes, then rounded.

        `out`, of that dtype and contiguous, may have more rows than are needed; the first N are returned.
        """
        out = torch.empty(weight.rows, weight.columns, dtype=dtype) if out is None else out[: weight.rows]
        self._rows(weight, None, weight.rows, out)
        return out

    def _rows(self, weight: Packed, indices: Tensor | None, count: int, out: Tensor) -> int:
        loaded = library.load()
        assert loaded is not None
        at = None if indices is None else indices.data_ptr()
        kind = library.FLOAT_TYPES[out.dtype]
        return int(loaded.llmquant_rows(self.index, matrix_of(weight).address, at, count, kind, out.data_ptr()))

    def matmul(self, x: Tensor, weight: Packed) -> Tensor:
        """x [..., N] -> x @ weight, [..., K] in x's dtype; sums in float32."""
        out = torch.zeros(*x.shape[:-1], weight.columns, dtype=torch.float32)
        for start, stop in weight.panels(_PANEL_ELEMENTS):
            out += x[..., start:stop].float() @ self.dequantize(weight.panel(start, stop), torch.float32)
        return out.to(x.dtype)

    def _linear_by_panels(self, x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
        """Decodes some rows at a time, so that they are still in the cache when torch multiplies by them."""
        dtype = self.traits.panel if x.dtype == torch.bfloat16 else torch.float32
        wide = x if x.dtype == dtype else x.to(dtype)
        out = x.new_empty(*x.shape[:-1], weight.rows)
        panels = weight.panels(_PANEL_ELEMENTS)
        buffer = torch.empty(max((stop - start for start, stop in panels), default=0), weight.columns, dtype=dtype)
        for start, stop in panels:
            part = None if bias is None else bias[start:stop].to(dtype)
            values = self.dequantize(weight.panel(start, stop), dtype, buffer)
            out[..., start:stop] = F.linear(wide, values, part)
        return out


class NativeMatrix:
    """The C view of a packed matrix, with the tensors that must live as long as it is used."""

    def __init__(self, weight: Packed) -> None:
        fmt = get_format(weight.format)
        scale = weight.scale if weight.scale.dtype in library.SCALE_TYPES else weight.scale.float()
        qdata, scale = weight.qdata.contiguous(), scale.contiguous()
        zero_point = None if weight.zero_point is None else weight.zero_point.contiguous()
        outer = None if weight.outer is None else weight.outer.contiguous()
        table = _table(weight.format) if fmt.storage in _TABLES else None
        self.integers = _integers(weight.format) if fmt.storage in _TABLES else None
        codes = self.integers.codes if self.integers else None
        self.tensors = (qdata, scale, zero_point, table, codes, outer)
        *first, codes_at, outer_at = (None if t is None else t.data_ptr() for t in self.tensors)
        self.matrix = library.Matrix(
            *first,
            weight.rows,
            weight.columns,
            qdata.shape[1],
            scale.shape[1],
            weight.block[1],
            weight.block[0],
            fmt.bits,
            library.SCALE_TYPES[scale.dtype],
            fmt.midpoint,
            self.integers.unit if self.integers else 1.0,
            codes_at,
            outer_at,
            0 if outer is None or len(outer) == 1 else 1,
            int(self.integers is not None and self.integers.exact),
            int(fmt.storage == "semisparse"),
        )
        self.address = ctypes.addressof(self.matrix)


def matrix_of(weight: Packed) -> NativeMatrix:
    """The C view of a matrix, made once for each `Packed`, which keeps it alive.

    Threads that meet at a new weight all get the one that is kept: another would be gone while native code reads it.
    """
    kept = weight.__dict__
    return kept.get("native") or kept.setdefault("native", NativeMatrix(weight))


@functools.cache
def _table(format_name: str) -> Tensor:
    """The values of all codes of a format under a scale of 1, float32 [2^bits]."""
    fmt = get_format(format_name)
    codes = torch.arange(fmt.top_code + 1, dtype=torch.uint8).reshape(1, 1, -1)
    ones = torch.ones(1, 1)
    return fmt.numerics.decode(codes, QParams(ones), fmt).reshape(-1).float().contiguous()


class Integers(NamedTuple):
    """A format's table as integers, times a unit.

    codes: int16 [2^bits].
    exact: whether they are the table, else they are its nearest 16 bits.
    """

    codes: Tensor
    unit: float
    exact: bool


_MOST = 127 * 256.0  # of integers that two signed bytes make up


@functools.cache
def _integers(format_name: str) -> Integers | None:
    """The table of up to six bits in integers for products of integers, or None for a longer one.

    Numbers of few bits are multiples of the largest power of two that divides them all.
    """
    table = _table(format_name)
    if len(table) > 64:
        return None
    unit = 1.0
    while unit > 2.0**-16 and (table / unit).frac().any():
        unit /= 2
    exact = not (table / unit).frac().any() and float(table.abs().max()) / unit <= _MOST
    unit = unit if exact else float(table.abs().max()) / _MOST
    return Integers((table / unit).round().to(torch.int16), unit, exact)


def _are_integers(format_name: str) -> bool:
    """Whether all numbers of a format are integers of 16 bits at most, times a unit."""
    if get_format(format_name).storage == "affine":
        return True
    integers = _integers(format_name)
    return integers is not None and integers.exact


def missing() -> str | None:
    """Why no native kernel can run in this process, or None."""
    return BACKENDS["portable"].missing


def read_bytes(data: Tensor) -> int:
    """Reads a contiguous tensor with all threads and prefetching, as the kernels read weights; its words' parity.

    Raises:
        ConfigError: where the native library is missing.
    """
    loaded = library.load()
    if loaded is None:
        raise ConfigError(f"cannot read with prefetching: {missing()}")
    return int(loaded.llmquant_read(data.data_ptr(), data.numel() * data.element_size() // 8))


BACKENDS: dict[str, Native] = {name: Native(name) for name in TRAITS}
