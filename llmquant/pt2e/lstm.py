"""An LSTM whose gates are products of int8 codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from llmquant.config.named import Int8DynamicActivationInt8WeightConfig
from llmquant.quantize import quantize_weight

_CONFIG = Int8DynamicActivationInt8WeightConfig(algorithm="rtn")
State = tuple[Tensor, Tensor]


class DynamicLSTM(nn.Module):
    """`nn.LSTM` with int8 weights and dynamic int8 inputs; parameters have the names that `nn.LSTM` gives them.

    Gates of inputs are one product for the whole sequence, those of the hidden state one a step:
    i, f, g, o = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh;  c_t = sigmoid(f) c_{t-1} + sigmoid(i) tanh(g);
    h_t = sigmoid(o) tanh(c_t), times W_hr where the LSTM has projections (Hochreiter and Schmidhuber 1997; Sak, Senior
    and Beaufays 2014). It is meant for inference: weights get no gradient.
    """

    @classmethod
    def from_float(cls, lstm: nn.LSTM) -> DynamicLSTM:
        """The same LSTM with quantized weights. Raises `BadWeightError` for those that cannot be quantized."""
        made = cls()
        names = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional")
        for name in (*names, "proj_size"):
            setattr(made, name, getattr(lstm, name))
        for name, parameter in lstm.named_parameters():
            kept = quantize_weight(parameter, _CONFIG) if parameter.dim() == 2 else parameter.detach().clone()
            made.register_parameter(name, nn.Parameter(kept, requires_grad=False))
        return made.train(lstm.training)

    input_size: int
    hidden_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool
    proj_size: int

    def forward(self, input: Any, hx: State | None = None) -> tuple[Any, State]:
        """input [T, B, K], [B, T, K] if `batch_first`, [T, K] without a batch, or a `PackedSequence`.

        hx: h [layers * directions, B, H], c likewise; zeros unless given. Returns the outputs, in the form of the
        input, and the last (h, c).
        """
        if isinstance(input, PackedSequence):
            return self._packed(input, hx)
        batched = input.dim() == 3
        x = input if batched else input.unsqueeze(1)
        x = x.transpose(0, 1) if batched and self.batch_first else x
        if hx is not None and not batched:
            hx = hx[0].unsqueeze(1), hx[1].unsqueeze(1)
        y, (h, c) = self._layers(x, hx, None)
        if not batched:
            return y.squeeze(1), (h.squeeze(1), c.squeeze(1))
        return y.transpose(0, 1) if self.batch_first else y, (h, c)

    def _packed(self, input: PackedSequence, hx: State | None) -> tuple[PackedSequence, State]:
        x, lengths = pad_packed_sequence(input)
        y, state = self._layers(x, hx, lengths.to(x.device))
        return pack_padded_sequence(y, lengths, enforce_sorted=False), state

    def _layers(self, x: Tensor, hx: State | None, lengths: Tensor | None) -> tuple[Tensor, State]:
        """x [T, B, K] -> [T, B, directions * H] and the last states of all layers and directions."""
        endings = ("", "_reverse") if self.bidirectional else ("",)
        states: list[State] = []
        for layer in range(self.num_layers):
            outputs = []
            for ending in endings:
                start = None if hx is None else (hx[0][len(states)], hx[1][len(states)])
                y, state = self._direction(x, f"_l{layer}{ending}", start, lengths, reverse=bool(ending))
                outputs.append(y)
                states.append(state)
            x = torch.cat(outputs, -1)
            if self.dropout and self.training and layer < self.num_layers - 1:
                x = F.dropout(x, self.dropout)
        return x, (torch.stack([h for h, _ in states]), torch.stack([c for _, c in states]))

    def _direction(
        self, x: Tensor, suffix: str, start: State | None, lengths: Tensor | None, reverse: bool
    ) -> tuple[Tensor, State]:
        """One layer in one direction over the whole sequence: [T, B, K] -> [T, B, H]."""
        gates = F.linear(x, self._of("weight_ih", suffix), self._of("bias_ih", suffix))  # [T, B, 4 * hidden]
        steps, batch = x.shape[:2]
        h, c = start or (
            x.new_zeros(batch, self.proj_size or self.hidden_size),
            x.new_zeros(batch, self.hidden_size),
        )
        step = self._step(suffix)
        outputs: list[Tensor] = [h] * steps
        for t in reversed(range(steps)) if reverse else range(steps):
            new_h, new_c = step(gates[t], h, c)
            if lengths is not None:  # sequences that are over, or begin later, keep their state
                runs = (t < lengths).unsqueeze(-1)
                new_h, new_c = torch.where(runs, new_h, h), torch.where(runs, new_c, c)
            h, c = new_h, new_c
            outputs[t] = h
        return torch.stack(outputs), (h, c)

    def _step(self, suffix: str) -> Callable[[Tensor, Tensor, Tensor], State]:
        """(gates of the input [B, 4 * hidden], h, c) -> the next h and c."""
        weight, bias, projection = (self._of(name, suffix) for name in ("weight_hh", "bias_hh", "weight_hr"))

        def step(gates: Tensor, h: Tensor, c: Tensor) -> State:
            i, f, g, o = (gates + F.linear(h, weight, bias)).chunk(4, -1)  # type: ignore[arg-type]
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            return (h if projection is None else F.linear(h, projection)), c

        return step

    def _of(self, name: str, suffix: str) -> Any:
        return self._parameters.get(name + suffix)

    def flatten_parameters(self) -> None:
        """Nothing: it is there since programs call it on an `nn.LSTM`."""

    def extra_repr(self) -> str:
        """The arguments of the constructor that differ from their defaults."""
        options = {
            "num_layers": (self.num_layers, 1),
            "bias": (self.bias, True),
            "batch_first": (self.batch_first, False),
            "dropout": (self.dropout, 0.0),
            "bidirectional": (self.bidirectional, False),
            "proj_size": (self.proj_size, 0),
        }
        said = [f"{name}={value}" for name, (value, default) in options.items() if value != default]
        return ", ".join([str(self.input_size), str(self.hidden_size), *said, "dtype=torch.qint8"])
