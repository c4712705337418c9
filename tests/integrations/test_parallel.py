"""Two processes: weights cut along rows and columns, or gathered when they are needed, and the logits of one process.

All of it runs in one pair of processes, which takes seconds to start; the tests look at what the two brought back.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from models import build, load, logits, rtn, weights
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from llmquant import LlmQuantConfig, QuantizedTensor, quantize_
from llmquant.errors import ConfigError, LlmQuantError, UnsupportedOpError

# Scheme -> how far logits may move: sums are taken in another order. Where inputs are quantized too, a code may change
# with that, and part of a token has a scale of its own.
NEAR = {
    "int4-g32": 1e-5,
    "int3-g32-asym": 1e-5,
    "float8": 1e-5,
    "int8-tensor": 1e-5,
    "mxfp4": 1e-5,
    "nvfp4": 1e-5,
    "nf4": 1e-5,
    "a8-int4-g32": 0.02,
    "a8-token-int8": 0.05,
}
MIXTRAL = ("int4-g32", "nvfp4")
every_scheme = pytest.mark.parametrize("scheme", NEAR)


def config(scheme: str) -> Any:
    return rtn({"_default": scheme, "_embedding": scheme})


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def refused(action: Any) -> LlmQuantError | None:
    try:
        action()
    except LlmQuantError as error:
        return error
    return None


# ---------------------------------------------------------------------------------- what runs in both processes


def tensor_parallel(folder: Path, scheme: str | None = None, **kwargs: Any) -> Any:
    """A model in parts, as transformers loads it: quantized before, or meanwhile."""
    from transformers.distributed import DistributedConfig

    if scheme is not None:
        kwargs["quantization_config"] = LlmQuantConfig(config(scheme))
    return load(folder, distributed_config=DistributedConfig(tp_size=processes.COUNT), **kwargs)


def sharding_by_fsdp() -> dict[str, Any]:
    from transformers.distributed import DistributedConfig

    return {"distributed_config": DistributedConfig(fsdp_size=processes.COUNT)}


def sharded(model: nn.Module) -> dict[str, DTensor]:
    """The quantized weights of which this process has a part."""
    found = {fqn: p for fqn, p in model.named_parameters() if isinstance(p, DTensor)}
    return {fqn: p for fqn, p in found.items() if isinstance(p.to_local(), QuantizedTensor)}


def in_parts(folder: Path, scheme: str | None = None) -> dict[str, Any]:
    model = tensor_parallel(folder, scheme)
    parts = sharded(model)
    return {
        "logits": logits(model),
        "parts": {fqn: p.to_local().dequantize() for fqn, p in parts.items()},
        "placements": {fqn: p.placements[0] for fqn, p in parts.items()},
        "bytes": sum(p.to_local().nbytes for p in parts.values()),
        "saving": refused(lambda: model.save_pretrained("never-written")),
    }


def mlp(rows: int, scheme: str) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, rows), nn.ReLU(), nn.Linear(rows, 66))
    quantize_(model, config(scheme))
    return model.requires_grad_(False)


def in_memory(scheme: str) -> dict[str, Any]:
    """torch's own tensor parallel on a model that is quantized already; process 0 gives its values to the other."""
    model, x = mlp(128, scheme), torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1))
    wanted = model(x)
    if torch.distributed.get_rank() == 1:
        for p in model.parameters():
            for _, t in p.parts() if isinstance(p, QuantizedTensor) else [(None, p)]:
                t.zero_()
    mesh = init_device_mesh("cpu", (processes.COUNT,))
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    return {"found": model(x), "wanted": wanted, "rows": model[0].weight.to_local().shape[0]}


def cut_in_memory(rows: int, scheme: str, style: Any) -> dict[str, Any]:
    model = mlp(rows, scheme)
    before = model[2].weight
    mesh = init_device_mesh("cpu", (processes.COUNT,))
    error = refused(lambda: parallelize_module(model, mesh, {"2": style}))
    return {"error": error, "unchanged": model[2].weight is before}


def gathered(folder: Path) -> dict[str, Any]:
    """FSDP2 on every layer and what is left."""
    model = load(folder).requires_grad_(False)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    said = [logits(model), logits(model)]  # the second time into the memory of the first
    model.reshard()
    return {
        "logits": said,
        "bytes": sum(w.to_local().nbytes for w in sharded(model).values()),
        "held": sum(t.untyped_storage().nbytes() for w in sharded(model).values() for _, t in w.to_local().parts()),
        "saving": refused(lambda: model.save_pretrained("never-written")),
    }


def uneven(scheme: str) -> dict[str, Any]:
    """67 rows are no two halves."""
    model, x = mlp(67, scheme), torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    wanted = model(x)
    error = refused(lambda: fully_shard(model))
    return {"error": error} if error else {"error": None, "found": model(x), "wanted": wanted}


class Raised(str):
    """The traceback of one part of the run; the test that looks into its result fails with it."""

    def __getitem__(self, key: Any) -> Any:
        raise AssertionError(str(self))


def kept(job: Callable[..., Any], *args: Any) -> Any:
    try:
        return job(*args)
    except Exception:
        return Raised(traceback.format_exc())


def everything(root: Path) -> dict[str, Any]:
    plain = root / "llama"
    return {
        "parallel": {s: (kept(in_parts, plain, s), kept(in_parts, root / s)) for s in NEAR},
        "experts": {s: kept(in_parts, root / "mixtral", s) for s in MIXTRAL},
        "auto": kept(lambda: {"logits": logits(load(root / "int4-g32", tp_plan="auto"))}),
        "cut": kept(refused, lambda: tensor_parallel(plain, "int4-g48")),
        "cut while saved": kept(refused, lambda: tensor_parallel(root / "int4-g48")),
        "gathering": kept(refused, lambda: load(root / "int4-g32", **sharding_by_fsdp())),
        "in memory": {s: kept(in_memory, s) for s in NEAR},
        "through a scale": kept(cut_in_memory, 96, "int4-g64", RowwiseParallel()),
        "uneven columns": kept(cut_in_memory, 67, "int8", RowwiseParallel()),
        "fsdp": {s: kept(gathered, root / s) for s in NEAR},
        "uneven": {s: kept(uneven, s) for s in ("int4-g32", "nvfp4", "int8-tensor")},
    }


# ---------------------------------------------------------------------------------- what they brought back


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plain models, and one of each scheme."""
    root = tmp_path_factory.mktemp("models")
    build("llama", intermediate_size=128).save_pretrained(root / "llama")
    build("mixtral", intermediate_size=128).save_pretrained(root / "mixtral")
    for scheme in (*NEAR, "int4-g48"):
        model = load(root / "llama")
        quantize_(model, config(scheme))
        model.save_pretrained(root / scheme)
    return root


@pytest.fixture(scope="module")
def brought(root: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return processes.run(everything, tmp_path_factory.mktemp("run"), root)


def whole_of(dim: int, parts: list[Tensor], groups: int) -> Tensor:
    """Parts put together again; those of merged weights hold as many groups."""
    pieces = [part.chunk(groups, dim) for part in parts]
    return torch.cat([pieces[rank][group] for group in range(groups) for rank in range(len(parts))], dim)


def assert_parts_of(model: nn.Module, found: list[dict[str, Any]]) -> None:
    whole = {fqn: w.dequantize() for fqn, w in weights(model)}
    first = found[0]
    assert first["parts"].keys() == whole.keys()
    for fqn, placed in first["placements"].items():
        parts = [each["parts"][fqn] for each in found]
        assert torch.equal(whole_of(placed.dim, parts, getattr(placed, "split_factor", 1)), whole[fqn]), fqn


@every_scheme
@pytest.mark.parametrize("saved", [False, True], ids=["while-loading", "saved"])
def test_tensor_parallel_has_parts_of_the_whole_and_its_logits(
    scheme: str, saved: bool, root: Path, brought: list[dict[str, Any]]
) -> None:
    model = load(root / scheme)
    found = [each["parallel"][scheme][saved] for each in brought]
    assert_parts_of(model, found)
    assert {p.dim % 2 for p in found[0]["placements"].values()} == {0, 1}
    total = sum(w.nbytes for _, w in weights(model))
    assert total <= found[0]["bytes"] + found[1]["bytes"] < 1.03 * total  # scales of rows in parts are on both
    assert torch.equal(found[0]["logits"], found[1]["logits"])
    assert distance(found[0]["logits"], logits(model)) < NEAR[scheme]


@pytest.mark.parametrize("scheme", MIXTRAL)
def test_tensor_parallel_cuts_each_of_the_weights_that_experts_merge(
    scheme: str, root: Path, brought: list[dict[str, Any]]
) -> None:
    model = load(root / "mixtral", quantization_config=LlmQuantConfig(config(scheme)))
    found = [each["experts"][scheme] for each in brought]
    assert_parts_of(model, found)
    assert any("experts" in fqn for fqn in found[0]["parts"])
    assert distance(found[0]["logits"], logits(model)) < NEAR[scheme]


def test_tensor_parallel_by_the_older_argument(root: Path, brought: list[dict[str, Any]]) -> None:
    assert distance(brought[1]["auto"]["logits"], logits(load(root / "int4-g32"))) < NEAR["int4-g32"]


@pytest.mark.parametrize("way", ["cut", "cut while saved"])
def test_a_cut_through_a_scale_is_refused_by_both_processes(way: str, brought: list[dict[str, Any]]) -> None:
    for each in brought:
        assert isinstance(each[way], ConfigError)
        assert each[way].where.endswith("proj.weight") and "groups whose size divides" in each[way].hint


def test_fsdp_while_loading_is_refused(brought: list[dict[str, Any]]) -> None:
    for each in brought:
        assert isinstance(each["gathering"], ConfigError) and "fully_shard" in each["gathering"].hint


@pytest.mark.parametrize("way", ["parallel", "fsdp"])
def test_saving_parts_is_refused(way: str, brought: list[dict[str, Any]]) -> None:
    for each in brought:
        found = each[way]["int4-g32"]
        error = (found[0] if way == "parallel" else found)["saving"]
        assert isinstance(error, ConfigError) and "cannot be saved" in error.what


@every_scheme
def test_tensor_parallel_of_a_model_quantized_in_memory(scheme: str, brought: list[dict[str, Any]]) -> None:
    first, second = (each["in memory"][scheme] for each in brought)
    assert first["rows"] == second["rows"] == 64
    assert torch.equal(first["found"], second["found"])
    assert distance(first["found"], first["wanted"]) < NEAR[scheme]


@pytest.mark.parametrize(("way", "says"), [("through a scale", "multiple of 64"), ("uneven columns", "divides")])
def test_what_cannot_be_cut_in_memory_stays_whole(way: str, says: str, brought: list[dict[str, Any]]) -> None:
    for each in brought:
        assert isinstance(each[way]["error"], UnsupportedOpError) and says in each[way]["error"].hint
        assert each[way]["unchanged"]


@every_scheme
def test_fsdp_gathers_the_same_weights_from_half_the_bytes(
    scheme: str, root: Path, brought: list[dict[str, Any]]
) -> None:
    model = load(root / scheme)
    total, said = sum(w.nbytes for _, w in weights(model)), logits(model)
    for each in brought:
        found = each["fsdp"][scheme]
        assert all(torch.equal(again, said) for again in found["logits"])
        assert total / 2 <= found["bytes"] < 1.01 * total / 2
        assert found["held"] == found["bytes"]  # no view of the whole is kept


def test_fsdp_of_uneven_shards(brought: list[dict[str, Any]]) -> None:
    for each in brought:
        found = each["uneven"]["int4-g32"]
        assert found["error"] is None and torch.equal(found["found"], found["wanted"])


@pytest.mark.parametrize("scheme", ["nvfp4", "int8-tensor"])
def test_uneven_shards_of_rows_that_share_a_scale_are_refused(scheme: str, brought: list[dict[str, Any]]) -> None:
    for each in brought:
        error = each["uneven"][scheme]["error"]
        assert isinstance(error, UnsupportedOpError) and "divides 67" in error.hint and "ignored_params" in error.hint
