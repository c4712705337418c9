"""What each weight's quantization would cost in KL, for many schemes in one forward and backward pass.

The KL divergence of a slightly changed model from the model itself has no slope, only curvature: the Fisher
information, E[g g^T] over labels y drawn from the model's own predictions, g being the gradient of -log p(y) (Martens,
"New insights and perspectives on the natural gradient method", 2020). So labels are drawn, one for each position, and
the loss is their cross-entropy. Labels of the text itself would give the "empirical Fisher", which is another matrix
(Kunstner et al., "Limitations of the empirical Fisher approximation", 2019), and a gradient of the KL itself is zero.

With g_t [N] the gradient by a layer's output at token t, and d_t = (W' - W) x_t [N] what a scheme changes there, the
mean KL over T tokens is about

    1/2 sum_t sum_n (g_tn d_tn)^2 / T        nats a token

the diagonal of that form: changes of different outputs, and at different tokens, are taken as unrelated. (With the sums
over a token inside the square, or over all tokens, choices come out no better: few draws of labels make them noisy.)
The changes are made of the layer's inputs and the quantized weight alone, so one pass serves all schemes. To score
formats by gradients at the output is the idea of NVIDIA's Model Optimizer (`auto_quantize`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmquant.calibrate.capture import Capture, Watched
from llmquant.calibrate.collect import one_by_one
from llmquant.config.base import QuantConfig
from llmquant.config.candidates import Candidate
from llmquant.errors import CalibrationError
from llmquant.quantize import Progress
from llmquant.tune.bank import Bank

Scores = dict[tuple[Candidate, QuantConfig], float]
Visit = Callable[[Candidate, int, Tensor, Tensor], None]
"""Called with a weight, which of its matrices, inputs [..., K] (or token ids [...], of a lookup), and the gradient of
the loss by the outputs [..., N]."""

_TOKENS = 256  # at a time: the outputs of a head for many tokens are large


def fisher_scores(
    bank: Bank,
    options: Mapping[Candidate, Sequence[QuantConfig]],
    windows: Tensor,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> Scores:
    """The KL, in nats a token, that each weight would cost in each of its schemes, to second order.

    Args:
        bank: the model and its quantized copies. The model is as it was afterwards.
        options: the schemes to score for each weight.
        windows: token ids [W, T] int64.
        seed: for the labels that are drawn.
        progress: called before each window, with windows done and in all.

    Raises:
        CalibrationError: for weights that the run never used: nothing is known of them.
    """
    unseen = {candidate.name for candidate in options}
    scores = dict.fromkeys(((c, config) for c, configs in options.items() for config in configs), 0.0)

    def visit(candidate: Candidate, matrix: int, x: Tensor, gradient: Tensor) -> None:
        unseen.discard(candidate.name)
        for config in options[candidate]:
            error = _error(bank, candidate, config, matrix)
            scores[candidate, config] += _cost(x, error, gradient)

    generator = torch.Generator().manual_seed(seed)
    with watched_gradients(bank.model, options, visit) as backward:
        for index, window in enumerate(windows):
            if progress:
                progress(index, len(windows), "")
            backward(window, generator)
    if progress:
        progress(len(windows), len(windows), "")
    _refuse_unseen(sorted(unseen))
    return {key: total / windows.numel() for key, total in scores.items()}


def _refuse_unseen(names: list[str]) -> None:
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise CalibrationError(
            "the scoring run never used these weights, so it cannot say what they are worth",
            where=", ".join(names[:3]) + more,
            hint="other tokens; a fixed scheme for them; or the method data-free",
        )


def _error(bank: Bank, candidate: Candidate, config: QuantConfig, matrix: int) -> Tensor:
    """[N, K]: what the scheme changes in one matrix, float32."""
    copy, plain = bank.get(candidate, config), bank.weight(candidate)
    if plain.dim() == 3:
        copy, plain = copy[matrix], plain[matrix]  # type: ignore[assignment]
    error = copy.dequantize(torch.float32) - plain.float()
    return error.mT if candidate.transposed else error


def _cost(x: Tensor, error: Tensor, gradient: Tensor) -> float:
    """1/2 sum_tn (g_tn d_tn)^2 of inputs x [..., K] (or ids [...]), error [N, K], gradient [..., N]."""
    lookup = not x.is_floating_point()
    rows, error = (x.reshape(-1) if lookup else x.reshape(-1, x.shape[-1])), error.to(gradient.dtype)
    gradients = gradient.reshape(-1, gradient.shape[-1])
    total = 0.0
    for part, g in zip(rows.split(_TOKENS), gradients.split(_TOKENS), strict=True):
        change = F.embedding(part, error) if lookup else F.linear(part, error)
        total += float(change.float().mul_(g).square_().sum())
    return total / 2


@contextmanager
def watched_gradients(
    model: Any, candidates: Mapping[Candidate, Any], visit: Visit
) -> Iterator[Callable[[Tensor, torch.Generator], None]]:
    """Gives a function that runs the model on a window [T], draws labels, and goes back through it, visiting."""
    device = next(model.parameters()).device
    gradients = Gradients(model, candidates, visit)

    def backward(window: Tensor, generator: torch.Generator) -> None:
        with gradients:
            logits = model(window[None].to(device), use_cache=False).logits[0]
        drawn = torch.multinomial(logits.detach().float().softmax(-1).cpu(), 1, generator=generator)
        F.cross_entropy(logits.float(), drawn.squeeze(-1).to(device), reduction="sum").backward()

    with _frozen(model), one_by_one(model), torch.enable_grad():
        yield backward


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Eval mode, and no gradient by any parameter: only outputs get some. All is as before afterwards."""
    training = {module: module.training for module in model.modules()}
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
        for parameter, flag in wanted.items():
            parameter.requires_grad_(flag)


class _Inbox:
    """Stands where an observer of one matrix stands, and keeps what it is shown until the output is known."""

    def __init__(self, candidate: Candidate, matrix: int, shown: list[tuple[_Inbox, Tensor]]) -> None:
        self.candidate, self.matrix, self._shown = candidate, matrix, shown

    def update(self, x: Tensor) -> None:
        """Takes note of inputs [..., K]."""
        self._shown.append((self, x.detach()))


class Gradients(Capture):
    """While it is entered, products with a watched weight, and lookups in one, hook a visit to their output.

    The visit comes when a backward pass has the gradient by that output.
    """

    def __init__(self, model: nn.Module, candidates: Mapping[Candidate, Any], visit: Visit) -> None:
        self._shown: list[tuple[_Inbox, Tensor]] = []
        self._visit = visit
        self._watched = [self._watch(model, candidate) for candidate in candidates]
        self._tables = {w.weight.data_ptr(): w.observers[0] for w in self._watched}
        super().__init__(self._watched)

    def _watch(self, model: nn.Module, candidate: Candidate) -> Watched:
        matrices = candidate.shape[0] if len(candidate.shape) == 3 else 1
        inboxes = [_Inbox(candidate, i, self._shown) for i in range(matrices)]
        return Watched(candidate, model.get_parameter(candidate.name).detach(), inboxes)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._shown.clear()
        if func is F.embedding and (inbox := self._tables.get(args[1].data_ptr())):
            inbox.update(args[0])
        out = super().__torch_function__(func, types, args, kwargs)
        if not self._shown:
            return out
        if not out.requires_grad:
            out = out.detach().requires_grad_().clone()  # the first of all; what follows may change it in place
        shown = list(self._shown)
        out.register_hook(lambda gradient: self._show_gradient(shown, gradient))
        return out

    def _show_gradient(self, shown: list[tuple[_Inbox, Tensor]], gradient: Tensor) -> None:
        parts = [gradient] if len(shown) == 1 else list(gradient)  # a whole stack of experts at once
        for (inbox, x), part in zip(shown, parts, strict=True):
            tokens = x.shape if not x.is_floating_point() else x.shape[:-1]
            self._visit(inbox.candidate, inbox.matrix, x, part if part.shape[:-1] == tokens else part.mT)
