"""Fake quantization: what codes stand for, with the gradient of a value that was only clamped.

The straight-through estimator (Bengio et al., 2013, arXiv:1308.3432): values within the range of the codes pass their
gradient on as they are, those outside none.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmquant.pt2e.observer import ObserverBase, affine_qparams
from llmquant.pt2e.spec import QuantizationSpec


class FakeQuantize(ObserverBase):
    """Observes a value and rounds it to what its codes stand for, each as long as it is enabled.

    Attributes:
        observer: finds the range.
        fake_quant_enabled: whether values are rounded.
        scale, zero_point: of the codes, [] or [channels]; as long as nothing was observed, 1 and 0.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, spec: QuantizationSpec) -> None:
        super().__init__(spec)
        self.observer = spec.observer(spec)
        self.fake_quant_enabled = True
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        """x [...] -> the values of its codes, in x's dtype."""
        if self.enabled and not self.spec.is_dynamic:
            self.observe(x.detach())
        return self._rounded(x) if self.fake_quant_enabled else x

    def observe(self, x: Tensor) -> None:
        """Takes note of x; scale and zero point follow."""
        self.observer.observe(x)
        scale, zero_point = self.observer.calculate_qparams()
        self.scale, self.zero_point = scale.to(x.device), zero_point.to(x.device, torch.int32)

    def bounds(self) -> tuple[Tensor, Tensor]:
        """The range that was observed."""
        return self.observer.bounds()

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Those that values were last rounded with, which may be frozen. Raises as the observer does."""
        self.observer.calculate_qparams()
        return self.scale.cpu(), self.zero_point.cpu().to(torch.int64)

    def _rounded(self, x: Tensor) -> Tensor:
        wide, limits = x.float(), self.spec.limits
        if self.spec.granularity == "channel":
            rounded = torch.fake_quantize_per_channel_affine(wide, self.scale, self.zero_point, self.spec.axis, *limits)
        elif self.spec.granularity == "token":
            rounded = _by_tokens(wide, self.spec)
        else:
            scale, zero_point = self._now(wide) if self.spec.is_dynamic else (self.scale, self.zero_point)
            rounded = torch.fake_quantize_per_tensor_affine(wide, scale, zero_point, *limits)
        return rounded.to(x.dtype)

    def _now(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scale, zero_point = affine_qparams(*torch.aminmax(x.detach()), self.spec)
        return scale, zero_point.to(torch.int32)


def _by_tokens(x: Tensor, spec: QuantizationSpec) -> Tensor:
    """x [..., K] rounded with a scale for each token."""
    scale, zero_point = affine_qparams(x.detach().amin(-1, keepdim=True), x.detach().amax(-1, keepdim=True), spec)
    least, most = spec.limits
    codes = torch.round(x.detach() / scale) + zero_point
    inside = (codes >= least) & (codes <= most)
    values = (codes.clamp(least, most) - zero_point) * scale
    return values + torch.where(inside, x - x.detach(), 0)


def disable_observer(module: nn.Module) -> None:
    """Freezes ranges, and with them scales and zero points, in a module and all below."""
    _switch(module, "enabled", False)


def enable_observer(module: nn.Module) -> None:
    """Lets ranges follow what passes."""
    _switch(module, "enabled", True)


def disable_fake_quant(module: nn.Module) -> None:
    """Lets values pass as they are."""
    _switch(module, "fake_quant_enabled", False)


def enable_fake_quant(module: nn.Module) -> None:
    """Rounds values to those of their codes."""
    _switch(module, "fake_quant_enabled", True)


def _switch(module: nn.Module, name: str, value: bool) -> None:
    for part in module.modules():
        if isinstance(part, ObserverBase) and hasattr(part, name):
            setattr(part, name, value)
