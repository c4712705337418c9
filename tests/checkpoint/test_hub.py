"""A hub repository is quantized shard by shard, to the bytes that its files give when they lie in a folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import COMMIT, HubServer, hub_of
from models import CONFIGS, Folders, Shape, assert_same, disk, rtn

from llmquant.checkpoint.hub import in_order, most_held
from llmquant.checkpoint.origin import Origin
from llmquant.checkpoint.plan import plan_checkpoint
from llmquant.checkpoint.source import open_source, weight_files
from llmquant.checkpoint.stream import quantize_checkpoint
from llmquant.errors import CheckpointError, ModelNotFoundError, NoSpaceError

REPO = "org/tiny"


@pytest.fixture
def source(folders: Folders, tmp_path: Path) -> Path:
    """A checkpoint of several shards in which experts lie one by one."""
    return Shape.sharded.make(folders("mixtral"), tmp_path / "source")


@pytest.fixture
def hub(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with hub_of(REPO, source, tmp_path / "cache", monkeypatch) as server:
        yield server


def shards_in(cache: Path) -> list[Path]:
    """Names, and files behind them, of all shards in the cache."""
    return sorted(p for p in cache.rglob("*.safetensors"))


def largest_blobs(cache: Path) -> int:
    return max((p.stat().st_size for p in cache.rglob("blobs/*")), default=0)


def test_the_result_is_that_of_the_folder(hub: HubServer, source: Path, tmp_path: Path) -> None:
    quantize_checkpoint(source, tmp_path / "a", rtn("int4-g32"))
    quantize_checkpoint(REPO, tmp_path / "b", rtn("int4-g32"))
    assert_same(disk(tmp_path / "a"), disk(tmp_path / "b"))
    assert {p.name for p in (tmp_path / "a").iterdir()} == {p.name for p in (tmp_path / "b").iterdir()}
    assert len(shards_in(tmp_path / "cache")) == len(weight_files(source)) > 2


def test_opening_reads_headers_only(hub: HubServer, source: Path, tmp_path: Path) -> None:
    found = open_source(REPO)
    assert found.hub is not None and found.hub.commit == COMMIT
    assert {name: g.specs() for g in found.groups() for name in g.specs()} == {
        name: g.specs() for g in open_source(source).groups() for name in g.specs()
    }
    assert not [name for name in hub.downloads() if name.endswith(".safetensors")]
    assert not shards_in(tmp_path / "cache")


def test_dropped_shards_leave_nothing_and_are_fetched_once(hub: HubServer, source: Path, tmp_path: Path) -> None:
    quantize_checkpoint(source, tmp_path / "a", rtn("int4-g32"))
    quantize_checkpoint(Origin(REPO, drop_shards=True), tmp_path / "b", rtn("int4-g32"))
    assert_same(disk(tmp_path / "a"), disk(tmp_path / "b"))
    assert not shards_in(tmp_path / "cache")
    fetched = [name for name in hub.downloads() if name.endswith(".safetensors")]
    assert sorted(fetched) == [path.name for path in weight_files(source)]
    assert largest_blobs(tmp_path / "cache") < min(path.stat().st_size for path in weight_files(source))


def test_shards_that_were_there_before_stay(hub: HubServer, source: Path, tmp_path: Path) -> None:
    first = weight_files(source)[0].name
    from huggingface_hub import hf_hub_download

    hf_hub_download(REPO, first, revision=COMMIT)
    quantize_checkpoint(Origin(REPO, drop_shards=True), tmp_path / "b", rtn("int4-g32"))
    assert [path.name for path in shards_in(tmp_path / "cache")] == [first]


def test_few_shards_lie_there_at_a_time(hub: HubServer, source: Path, tmp_path: Path) -> None:
    most = 0

    def watch(done: int, total: int, item: str) -> None:
        nonlocal most
        most = max(most, sum(path.stat().st_size for path in shards_in(tmp_path / "cache")))

    origin = Origin(REPO, drop_shards=True)
    needs = plan_checkpoint(origin, tmp_path / "b", rtn("int4-g32")).needs
    quantize_checkpoint(origin, tmp_path / "b", rtn("int4-g32"), progress=watch)
    total = sum(path.stat().st_size for path in weight_files(source))
    assert 0.9 * total < needs.download <= total
    assert needs.cache < needs.download  # fewer than all
    assert 0 < most <= needs.cache * 1.1  # headers are not counted


def test_a_transfer_that_is_cut_off_goes_on(hub: HubServer, source: Path, tmp_path: Path) -> None:
    quantize_checkpoint(source, tmp_path / "a", rtn("int4-g32"))
    name = weight_files(source)[1].name
    opened = open_source(REPO)
    opened.groups()  # headers are read before the transfer is cut
    assert opened.hub is not None
    hub.cut[name] = 1000
    try:
        opened.hub.fetch_all()
    except ModelNotFoundError:
        opened.hub.fetch_all()
    assert not hub.cut
    assert hub.downloads().count(name) + len(hub.ranges(name)) >= 2
    assert (opened.folder / name).read_bytes() == weight_files(source)[1].read_bytes()
    quantize_checkpoint(REPO, tmp_path / "b", rtn("int4-g32"))
    assert_same(disk(tmp_path / "a"), disk(tmp_path / "b"))


class Boom(Exception):
    """Raised in the middle of the work."""


def test_a_run_that_goes_on_fetches_only_what_it_needs(hub: HubServer, source: Path, tmp_path: Path) -> None:
    quantize_checkpoint(source, tmp_path / "a", rtn("int4-g32"))
    origin, first = Origin(REPO, drop_shards=True), weight_files(source)[0].name

    def interrupt(done: int, total: int, item: str) -> None:
        if done > total / 2:
            raise Boom

    with pytest.raises(Boom):
        quantize_checkpoint(origin, tmp_path / "b", rtn("int4-g32"), progress=interrupt)
    hub.requests.clear()
    quantize_checkpoint(origin, tmp_path / "b", rtn("int4-g32"))
    assert_same(disk(tmp_path / "a"), disk(tmp_path / "b"))
    fetched = [name for name in hub.downloads() if name.endswith(".safetensors")]
    assert fetched and first not in fetched


def test_revisions(hub: HubServer) -> None:
    assert open_source(Origin(REPO, revision="v1")).folder.name == COMMIT
    with pytest.raises(ModelNotFoundError, match="RevisionNotFound") as error:
        open_source(Origin(REPO, revision="v2"))
    assert error.value.where == REPO and "revision" in str(error.value.hint)


def test_a_repository_that_is_not_there(hub: HubServer) -> None:
    with pytest.raises(ModelNotFoundError, match="RepositoryNotFound"):
        open_source("org/other")


def test_offline(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    open_source(REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFoundError, match="hub") as error:
        quantize_checkpoint(REPO, tmp_path / "b", rtn("int4-g32"))
    assert error.value.where == REPO and "network" in str(error.value.hint)
    assert not (tmp_path / "b").exists()


def test_a_file_that_is_not_what_its_header_said(hub: HubServer, source: Path, tmp_path: Path) -> None:
    opened = open_source(REPO)
    opened.groups()
    one, two = (path.read_bytes() for path in weight_files(source)[:2])
    weight_files(source)[0].write_bytes(two)
    with pytest.raises(CheckpointError, match="not what the file's header said"):
        for _ in opened.parameters():
            pass
    assert one != two


def test_too_little_room_for_the_shards(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmquant.checkpoint import stream

    needs = plan_checkpoint(REPO, tmp_path / "b", rtn("int4-g32")).needs
    assert needs.cache_shared
    room = needs.disk + needs.cache // 2
    monkeypatch.setattr(stream, "disk_free", lambda folder: room)
    with pytest.raises(NoSpaceError, match="downloaded shards") as error:
        quantize_checkpoint(REPO, tmp_path / "b", rtn("int4-g32"))
    assert "--drop-shards" in str(error.value.hint)
    quantize_checkpoint(Origin(REPO, drop_shards=True), tmp_path / "b", rtn("int4-g32"))


@pytest.mark.parametrize("family", ["llama", "gpt-oss"])
def test_one_file(family: str, folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize_checkpoint(folders(family), tmp_path / "a", CONFIGS[family])
    with hub_of(REPO, folders(family), tmp_path / "cache", monkeypatch):
        quantize_checkpoint(Origin(REPO, drop_shards=True), tmp_path / "b", CONFIGS[family], jobs=2)
    assert_same(disk(tmp_path / "a"), disk(tmp_path / "b"))


# ---------------------------------------------------------------------------------- order


def test_work_is_ordered_by_shards() -> None:
    uses = {"head": {"c"}, "merged": {"a", "b"}, "first": {"a"}, "tied": {"a", "c"}, "second": {"b"}}
    order = in_order(uses, ["a", "b", "c"])
    assert order[0] == "first" and set(order[1:3]) == {"merged", "second"} and set(order[3:]) == {"head", "tied"}
    sizes = {"a": 100, "b": 10, "c": 20}
    assert most_held(uses, order, sizes) == 120
    del uses["tied"]
    assert most_held(uses, in_order(uses, "abc"), sizes) == 110
    assert most_held({"x": {"a"}, "y": {"b"}}, ["x", "y"], sizes) == 100
