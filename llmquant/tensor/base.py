"""The base of all quantized tensors: fields are declared once, everything else loops over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from llmquant.errors import UnsupportedOpError
from llmquant.formats import Format, get_format
from llmquant.kernels import registry
from llmquant.kernels.packed import Packed
from llmquant.primitives.dynamic import Activation, StaticScale


@dataclass(frozen=True)
class Field:
    """One inner tensor of a quantized tensor.

    Attributes:
        name: the attribute; on disk its suffix (`qdata` goes under the weight's own key).
        per: one entry an `element` of the weight, one a `block` that shares a scale, one a `row` of them, [..., B, 1],
            or one a `matrix`, [..., 1, 1].
        packed: whether entries are codes packed at the format's bits along the last dimension.
        optional: whether it may be None.
    """

    name: str
    per: str
    packed: bool
    optional: bool = False


@dataclass(frozen=True)
class Meta:
    """What the inner tensors alone do not say.

    Attributes:
        format: a name in the table of formats.
        block: (rows, columns) of the logical [out, in] matrix that share a scale.
        columns: length of a logical row, in weights.
        transposed: whether the tensor stands as [..., in, out].
        activation: how the input of a product is quantized; None leaves it as it is. If it is static, the tensor has
            `act_scale` (float32) and, of asymmetric ones, `act_zero_point` (int8).
    """

    format: str
    block: tuple[int, int]
    columns: int
    transposed: bool = False
    activation: Activation | None = None


class QuantizedTensor(torch.Tensor):
    """A weight of shape [..., out, in] kept as packed codes and their parameters.

    It has a floating dtype (that of `dequantize()`) and takes over linear, embedding and matrix products. Results that
    are weights again stay packed; only products, rows of a table and `dequantize()` are plain tensors. What it does not
    support raises `UnsupportedOpError`.

    It requires no gradient unless its flag is set (as `nn.Parameter(w)` does). Then it gets the plain one of torch's
    own formulas, as large as the plain weight, with which no optimizer can change it.

    Its codes stay as they are, but its scales can be trained through `F.linear`, `F.embedding` and `dequantize()`, on
    every backend. Keep them in float32 for that (`scale_dtype` of the config): small steps vanish in 16 bits.

        scales = [p.scale.requires_grad_() for p in model.parameters() if isinstance(p, QuantizedTensor)]
        optimizer = torch.optim.Adam(scales, lr=1e-5)
        loss(model(x)).backward()
        optimizer.step()
        for scale in scales:
            scale.requires_grad_(False)  # the model is as any other again

    Zero points are codes and have no gradient here; `kernels.packed.Packed` takes real numbers for them.

    Args:
        tensors: the inner tensors by field name, in the neutral layout of `kernels.packed.Packed`, with any
            leading dimensions (experts) in front.
        meta: see `Meta`.
        dtype: the floating dtype it stands for.

    A class also takes a weight alone, as `nn.Parameter` does and with the same result: tools that move parameters
    (accelerate) make them anew by calling their type.
    """

    fields: ClassVar[tuple[Field, ...]] = (
        Field("qdata", per="element", packed=True),
        Field("scale", per="block", packed=False),
        Field("act_scale", per="matrix", packed=False, optional=True),
        Field("act_zero_point", per="matrix", packed=False, optional=True),
    )
    formats: ClassVar[tuple[str, ...]] = ()

    qdata: Tensor
    scale: Tensor
    zero_point: Tensor | None = None
    row_scale: Tensor | None = None
    act_scale: Tensor | None = None
    act_zero_point: Tensor | None = None
    meta: Meta
    # What kernels worked out about this weight, and where its tensors lay then: moving them makes it void.
    _packed: tuple[tuple[Any, ...], Tensor, Packed] | None = None
    # A part that shares a scale or a byte with what is outside of it, or a copy where torch promises a view: writing to
    # it would change more than itself, or nothing.
    _read_only: bool = False
    # On the shards that FSDP2 makes of a weight: the `Meta` of the whole.
    _whole: Meta | None = None
    _is_param: bool  # what makes torch take a tensor for an `nn.Parameter`
    # How often any quantized tensor was written to: views share memory, but torch counts changes of each apart.
    writes: ClassVar[int] = 0

    @staticmethod
    def __new__(
        cls,
        tensors: Mapping[str, Tensor | None] | QuantizedTensor,
        meta: Meta | None = None,
        dtype: torch.dtype | None = None,
        *,
        requires_grad: bool = False,
    ) -> QuantizedTensor:
        if isinstance(tensors, QuantizedTensor):
            tensors, meta, dtype = tensors._arguments()
        qdata = tensors["qdata"]
        assert qdata is not None and meta is not None
        shape = [*qdata.shape[:-1], meta.columns]
        if meta.transposed:
            shape[-2:] = shape[:-3:-1]
        # A view made in inference mode must be a normal tensor, as torch's own views of normal tensors are.
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
            return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
                cls, shape, dtype=dtype, device=qdata.device, requires_grad=requires_grad
            )

    def __init__(
        self,
        tensors: Mapping[str, Tensor | None] | QuantizedTensor,
        meta: Meta | None = None,
        dtype: torch.dtype | None = None,
        *,
        requires_grad: bool = False,
    ) -> None:
        if isinstance(tensors, QuantizedTensor):
            self._read_only, self._whole, self._is_param = tensors._read_only, tensors._whole, True
            tensors, meta, _ = tensors._arguments()
        assert meta is not None
        for field in self.fields:
            setattr(self, field.name, tensors.get(field.name))
        self.meta = meta

    def _arguments(self) -> tuple[dict[str, Tensor], Meta, torch.dtype]:
        """What makes this very weight again."""
        return {field.name: tensor for field, tensor in self.parts()}, self.meta, self.dtype

    # --- the fields -----------------------------------------------------------------------------------

    def parts(self) -> Iterator[tuple[Field, Tensor]]:
        """The fields that are present, with their tensors."""
        for field in self.fields:
            tensor = getattr(self, field.name)
            if tensor is not None:
                yield field, tensor

    def rebuild(
        self,
        change: Callable[[Field, Tensor], Tensor],
        dtype: torch.dtype | None = None,
        *,
        copied: bool = False,
        **meta: Any,
    ) -> QuantizedTensor:
        """A tensor like this one with every inner tensor changed, and perhaps some of its `Meta`.

        `copied` says that none of them is a view any more.
        """
        tensors = {field.name: change(field, tensor) for field, tensor in self.parts()}
        result = type(self)(tensors, replace(self.meta, **meta), dtype or self.dtype)
        if self._read_only and not copied:
            result._read_only = True
        if self._whole is not None:
            result._whole = self._whole
        return result

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Meta, torch.dtype]]:
        return [field.name for field, _ in self.parts()], (self.meta, self.dtype)

    @classmethod
    def __tensor_unflatten__(
        cls, inner: dict[str, Tensor], context: tuple[Meta, torch.dtype], outer_size: Any, outer_stride: Any
    ) -> QuantizedTensor:
        del outer_size, outer_stride
        return cls(inner, *context)

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedTensor:
        if id(self) not in memo:
            copy = self.rebuild(lambda _, t: t.detach().clone().requires_grad_(t.requires_grad), copied=True)
            own = (*copy.__dict__, "_packed", "_read_only")
            copy.__dict__.update({k: v for k, v in self.__dict__.items() if k not in own})
            copy.requires_grad_(self.requires_grad)
            memo[id(self)] = copy
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (type(self), *self._arguments(), getattr(self, "_is_param", False))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        m = self.meta
        group = "x".join(map(str, m.block))
        extra = ", transposed" if m.transposed else ""
        extra += f", activation={m.activation.scheme}" if m.activation else ""
        return (
            f"{type(self).__name__}({m.format}, shape={tuple(self.shape)}, block={group}, "
            f"scale={str(self.scale_dtype).removeprefix('torch.')}, "
            f"{'asymmetric' if self.zero_point is not None else 'symmetric'}{extra}, "
            f"dtype={str(self.dtype).removeprefix('torch.')}, device={self.device})"
        )

    # --- size and storage -----------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """True bytes of all inner tensors."""
        return sum(tensor.nbytes for _, tensor in self.parts())

    def element_size(self) -> float:  # type: ignore[override]
        """Bytes an element, usually no integer: `numel() * element_size()` is `nbytes`."""
        return self.nbytes / max(self.numel(), 1)

    def data_ptr(self) -> int:
        """Where the codes lie, so that tools which compare addresses tell weights apart."""
        return self.qdata.data_ptr()

    def share_memory_(self) -> QuantizedTensor:
        """Moves the inner tensors to shared memory."""
        for _, tensor in self.parts():
            tensor.share_memory_()
        return self

    def is_shared(self) -> bool:
        """Whether all inner tensors lie in shared memory."""
        return all(tensor.is_shared() for _, tensor in self.parts())

    # --- meaning --------------------------------------------------------------------------------------

    @property
    def format(self) -> Format:
        """The row of the table of formats."""
        return get_format(self.meta.format)

    def packed(self) -> Packed:
        """The logical [out, in] matrix for kernels; the tensor must have two dimensions."""
        qdata, scale, m = self.qdata, self.scale, self.meta  # inner tensors: no dispatch on the way to a kernel
        assert qdata.dim() == 2, "kernels take one matrix"
        if torch.compiler.is_compiling() or type(qdata) is not Tensor:
            if scale.requires_grad and torch.is_grad_enabled():
                raise lost_gradient("a compiled graph", self)  # it takes no gradients to the insides of a subclass
            return Packed(qdata, self.block_scales(), self.zero_point, m.format, m.block, m.columns)
        state, kept = self.state(), self._packed
        # A scale may also be replaced by another view of its memory, one that requires a gradient.
        if kept is None or kept[0] != state or kept[1] is not scale:
            packed = self.pack()
            kept = self._packed = state, scale, packed
        return kept[2]

    def pack(self) -> Packed:
        """`packed` made anew, of plain tensors."""
        m = self.meta
        return Packed(self.qdata, self.scale, self.zero_point, m.format, m.block, m.columns)

    @property
    def scale_dtype(self) -> torch.dtype:
        """What an entry of `scale` is; floats of one byte are kept as their bytes, in uint8."""
        return self.scale.dtype

    @property
    def static_scale(self) -> StaticScale | None:
        """What calibration chose for the inputs of a matrix, or None where their scales are made anew."""
        return None if self.act_scale is None else StaticScale(self.act_scale, self.act_zero_point)

    def block_scales(self) -> Tensor:
        """The scale of each block as kernels take it, [..., B, G] of 16 or 32 bits."""
        return self.scale

    def state(self) -> tuple[Any, ...]:
        """What changes whenever a `Packed` of this weight is void: where its tensors lie, and what was written."""
        return self.qdata.data_ptr(), self.scale.data_ptr(), QuantizedTensor.writes  # kernels may keep copies

    def kernel(self) -> registry.Choice:
        """Which kernel serves this weight, and why."""
        return registry.choose(self.meta.format, self.meta.block, self.meta.columns, self.device.type)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:  # type: ignore[override]
        """A plain tensor of the same shape: decoded in float32, then rounded to `dtype` (default: own dtype)."""
        dtype = dtype or self.dtype
        if self.dim() > 2:
            if self.shape[0] == 0:
                return torch.empty(self.shape, dtype=dtype, device=self.device)
            return torch.stack([self[i].dequantize(dtype) for i in range(self.shape[0])])  # type: ignore[call-arg]
        matrix = self.packed()
        out = torch.empty(matrix.rows, matrix.columns, dtype=dtype, device=self.device)
        for start, stop in matrix.panels():
            out[start:stop] = matrix.panel(start, stop).dequantize()
        return out.t() if self.meta.transposed else out

    # --- FSDP2 ----------------------------------------------------------------------------------------

    def fsdp_pre_all_gather(self, mesh: Any) -> tuple[tuple[Tensor, ...], None]:
        """What the processes of `fully_shard` exchange: the packed parts of their shards, padded to one size."""
        return tuple(_with_padding(tensor) for _, tensor in self.parts()), None

    def fsdp_post_all_gather(
        self, gathered: tuple[Tensor, ...], context: None, dtype: torch.dtype, *, out: Tensor | None = None
    ) -> tuple[QuantizedTensor, tuple[Tensor, ...]] | None:
        """The whole weight as views of what was gathered, with the padding of its last shard, which FSDP2 cuts off.

        `out` is what an earlier call gave, whose memory holds the new parts already.
        """
        if isinstance(out, QuantizedTensor):
            out._packed = None
            return None
        meta = self._whole or self.meta
        tensors = {field.name: tensor for (field, _), tensor in zip(self.parts(), gathered, strict=True)}
        for field, _ in self.parts():
            if field.per == "matrix" and self.dim() == 2:
                tensors[field.name] = tensors[field.name][:1]  # all shards bring the one that they share
        return type(self)(tensors, meta, dtype), gathered

    # --- dispatch -------------------------------------------------------------------------------------

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        handler = FUNCTIONS.get(func)
        if handler is not None:
            return handler(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if torch.is_grad_enabled() and func.overloadpacket not in KEEPS_GRADIENTS:
            _refuse_to_lose_gradients(func, args)
        handler = DISPATCH.get(func.overloadpacket)
        if handler is not None:
            return handler(func, *args, **(kwargs or {}))
        # In inference mode composite operators arrive whole; elsewhere torch has taken them apart already.
        result = func.decompose(*args, **(kwargs or {}))
        return unsupported(func, *args) if result is NotImplemented else result


# Filled through `tensor.table` (one table for functions, one for aten operators by overload packet).
FUNCTIONS: dict[Any, Callable[..., Any]] = {}
DISPATCH: dict[Any, Callable[..., Any]] = {}
# Operators whose result has the very scale of its argument, or no need of it.
KEEPS_GRADIENTS: set[Any] = set()


def _with_padding(tensor: Tensor) -> Tensor:
    """All of the memory that a part of a shard is the beginning of."""
    step = tensor[:1].numel()
    rows = tensor.untyped_storage().nbytes() // max(step * tensor.element_size(), 1)
    return tensor.as_strided((rows, *tensor.shape[1:]), tensor.stride(), 0)


def _refuse_to_lose_gradients(func: Any, args: tuple[Any, ...]) -> None:
    """Operators arrive below autograd, where it does not see what becomes of a scale."""
    trained = [w for w in quantized_among(args) if w.scale.requires_grad]
    if trained:
        raise lost_gradient(func, trained[0])


def lost_gradient(func: Any, weight: QuantizedTensor) -> UnsupportedOpError:
    """The error of what would train a scale without its gradient."""
    return UnsupportedOpError(
        f"{func} would lose the gradient of the scale",
        where=repr(weight),
        hint="it flows through uncompiled F.linear, F.embedding and dequantize(); torch.no_grad() where none is wanted",
    )


def quantized_among(args: tuple[Any, ...]) -> list[QuantizedTensor]:
    """The quantized tensors in an operator's arguments, those in lists last."""
    lists = [t for a in args if isinstance(a, (list, tuple)) for t in a]
    return [t for t in (*args, *lists) if isinstance(t, QuantizedTensor)]


def unsupported(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Refuses an operator: nothing is dequantized in silence."""
    which = quantized_among(args)[:1]
    raise UnsupportedOpError(
        f"{func} is not supported for {which[0].meta.format if which else 'quantized'} weights",
        where=repr(which[0]) if which else None,
        hint="call .dequantize() first if a plain tensor is what you want",
    )


def _rebuild(
    cls: type[QuantizedTensor], tensors: dict[str, Tensor], meta: Meta, dtype: torch.dtype, is_param: bool
) -> QuantizedTensor:
    tensor = cls(tensors, meta, dtype)
    if is_param:
        tensor._is_param = True
    return tensor
