"""Headers of safetensors files: what the safetensors library writes is read, and every way to be wrong has a name."""

from __future__ import annotations

import json
import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from llmquant.checkpoint import header as module
from llmquant.checkpoint.header import DTYPES, Header, parse_header, read_header
from llmquant.errors import CheckpointError, HeaderError


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_a_header_tells_dtype_shape_and_place_of_every_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {
        "a": torch.ones(3, 5).to(dtype),
        "empty": torch.zeros(0, 2).to(dtype),
        "scalar": torch.zeros(()).to(dtype),
    }
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata={"k": 'v \\ " \u20ac'})
    header = read_header(path)
    assert header.metadata == {"k": 'v \\ " \u20ac'}
    assert header.tensors == {key: (dtype, tuple(t.shape)) for key, t in tensors.items()}
    for key, (begin, end) in header.places.items():
        assert path.read_bytes()[begin:end] == bytes(tensors[key].reshape(-1).view(torch.uint8).tolist())


def test_a_file_without_tensors_or_metadata(tmp_path: Path) -> None:
    save_file({}, tmp_path / "x.safetensors")
    assert read_header(tmp_path / "x.safetensors") == ({}, {}, {})


def framed(head: bytes | dict[str, Any], data: bytes = b"") -> bytes:
    head = json.dumps(head).encode() if isinstance(head, dict) else head
    return struct.pack("<Q", len(head)) + head + data


def tensor(dtype: Any = "U8", shape: Any = (2,), begin: Any = 0, end: Any = 2, **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end], **more}


PAIR = b'{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
BAD: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "longer than the file"),
    "less than a length": (b"\0" * 7, "longer than the file"),
    "text": (b"this is no safetensors file at all", "longer than the file"),
    "a length beyond the file": (struct.pack("<Q", 2**63), "longer than the file"),
    "a length beyond the file by one": (struct.pack("<Q", 3) + b"{}", "longer than the file"),
    "no header": (struct.pack("<Q", 0), "begin with {"),
    "no JSON": (framed(b"{nope}"), "no list of tensors"),
    "a list": (framed(b"[]"), "begin with {"),
    "a text": (framed(b'"x"'), "begin with {"),
    "spaces before it": (framed(b" {}"), "begin with {"),
    "no end": (framed(b'{"a":' + PAIR), "no list of tensors"),
    "a comma too many": (framed(b'{"a":' + PAIR + b",}"), "no list of tensors"),
    "something behind it": (framed(b'{"a":' + PAIR + b"} {}"), "follows the end"),
    "zeros behind it": (framed(b'{"a":' + PAIR + b"}\0\0"), "follows the end"),
    "a tensor that is a number": (framed(b'{"a": 3}'), "no list of tensors"),
    "a tensor that is a list": (framed(b'{"a": []}'), "no list of tensors"),
    "a tensor within a tensor": (framed({"a": {"dtype": {}}}), "no list of tensors"),
    "no offsets": (framed({"a": {"dtype": "U8", "shape": [0]}}), "not described by"),
    "no dtype": (framed({"a": {"shape": [0], "data_offsets": [0, 0]}}), "not described by"),
    "no shape": (framed({"a": {"dtype": "U8", "data_offsets": [0, 0]}}), "not described by"),
    "one field more": (framed({"a": tensor(code="x")}, b"12"), "not described by"),
    "a field twice": (framed(b'{"a":{"dtype":"U8","dtype":"U8","shape":[0],"data_offsets":[0,0]}}'), "stands twice"),
    "a long description": (framed({"a": tensor(shape=[1] * 3000)}, b"12"), "not described by"),
    "a shape that is a number": (framed({"a": tensor(shape=2)}, b"12"), "impossible shape"),
    "a shape of texts": (framed({"a": tensor(shape=["2"])}, b"12"), "impossible shape"),
    "a shape of truths": (framed({"a": tensor(shape=[True, 2])}, b"12"), "impossible shape"),
    "a shape of fractions": (framed({"a": tensor(shape=[2.0])}, b"12"), "impossible shape"),
    "a shape below zero": (framed({"a": tensor(shape=[-1, -2])}, b"12"), "impossible shape"),
    "a shape beyond 64 bits": (framed({"a": tensor(shape=[2**62, 4, 0])}, b"12"), "bytes, and"),
    "a shape whose product wraps around": (framed({"a": tensor(shape=[2**33, 2**33])}, b"12"), "impossible shape"),
    "a number of a thousand digits": (framed({"a": tensor(shape=[10**1000])}, b"12"), "impossible shape"),
    "a number that is no JSON": (framed(b'{"a":' + PAIR.replace(b"[0]", b"[01]") + b"}"), "delimiter"),
    "too many dimensions": (framed({"a": tensor(shape=[1] * 17, end=1)}, b"1"), "impossible shape"),
    "an unknown dtype": (framed({"a": tensor(dtype="U9")}, b"12"), "unknown dtype 'U9'"),
    "a dtype that is a list": (framed({"a": tensor(dtype=[])}, b"12"), "unknown dtype"),
    "offsets that are texts": (framed({"a": tensor(begin="0", end="2")}, b"12"), "impossible place"),
    "one offset": (framed({"a": tensor() | {"data_offsets": [2]}}, b"12"), "impossible place"),
    "three offsets": (framed({"a": tensor() | {"data_offsets": [0, 2, 2]}}, b"12"), "impossible place"),
    "an end before its begin": (framed({"a": tensor(begin=2, end=0)}, b"12"), "impossible place"),
    "an offset below zero": (framed({"a": tensor(begin=-2, end=0)}, b"12"), "impossible place"),
    "an offset beyond 64 bits": (framed({"a": tensor(begin=2**64, end=2**64 + 2)}, b"12"), "impossible place"),
    "fewer bytes than the shape": (framed({"a": tensor(shape=[3])}, b"12"), "takes 3"),
    "more bytes than the shape": (framed({"a": tensor(shape=[1])}, b"12"), "takes 1"),
    "bytes of another dtype": (framed({"a": tensor(dtype="F32")}, b"12"), "takes 8"),
    "half a byte": (framed({"a": tensor(dtype="F4", shape=[3])}, b"12"), "takes 2"),
    "bytes beyond the file": (framed({"a": tensor()}, b"1"), "should have"),
    "bytes too many": (framed({"a": tensor()}, b"123"), "should have"),
    "bytes of nobody": (framed(b"{}", b"\0"), "should have"),
    "an overlap": (framed({"a": tensor(), "b": tensor(begin=1, end=3)}, b"123"), "overlaps"),
    "one place for two": (framed({"a": tensor(), "b": tensor()}, b"12"), "overlaps"),
    "a hole": (framed({"a": tensor(), "b": tensor(begin=3, end=5)}, b"12345"), "unused bytes"),
    "a hole in front": (framed({"a": tensor(begin=1, end=3)}, b"123"), "unused bytes"),
    "a name twice": (framed(b'{"a":' + PAIR + b',"a":' + PAIR + b"}"), "twice"),
    "a name twice, once with an escape": (framed(b'{"a":' + PAIR + b',"\\u0061":' + PAIR + b"}"), "twice"),
    "a name of nothing": (framed(b'{"":' + PAIR + b"}"), "empty or cannot"),
    "a name that acts on terminals": (framed({"\x1b[2J": tensor()}, b"12"), "cannot be printed"),
    "a name of half a surrogate pair": (framed(b'{"\\ud800":' + PAIR + b"}"), "cannot be printed"),
    "a raw line end in a name": (framed(b'{"a\n":' + PAIR + b"}"), "no list of tensors"),
    "a name without end": (framed(b'{"a:' + PAIR.replace(b'"', b"") + b"}"), "no list of tensors"),
    "a name of two thousand letters": (framed({"a" * 2000: tensor()}, b"12"), "may have 1,000"),
    "an escape that is none": (framed(b'{"\\x":' + PAIR + b"}"), "escape"),
    "bytes that are no UTF-8": (framed(b'{"\xff":' + PAIR + b"}"), "utf-8"),
    "metadata that are a number": (framed(b'{"__metadata__": 3}'), "no list of tensors"),
    "metadata with a number": (framed({"__metadata__": {"a": 3}}), "no list of tensors"),
    "metadata with a list": (framed({"__metadata__": {"a": []}}), "no list of tensors"),
    "metadata twice": (framed(b'{"__metadata__":{},"__metadata__":{}}'), "twice"),
    "a key of the metadata twice": (framed(b'{"__metadata__":{"a":"b","a":"c"}}'), "twice"),
    "nesting without end": (framed(b'{"a":' * 100_000), "no list of tensors"),
    "a thousand lists within lists": (
        framed(b'{"a":{"shape":' + b"[" * 1500 + b"]" * 1500 + b"}}"),
        "not described by",
    ),
    "lists without end": (framed(b'{"a":{"shape":' + b"[" * 100_000 + b"}}"), "not described by"),
}


@pytest.mark.parametrize("kind", BAD)
def test_every_way_to_be_wrong_is_told(kind: str, tmp_path: Path) -> None:
    content, words = BAD[kind]
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(HeaderError, match=r"x\.safetensors") as error:
        read_header(path)
    assert "truncated or is no safetensors file" in error.value.what and words in error.value.what
    assert error.value.hint and len(str(error.value)) < 1000


LIMITS: dict[str, tuple[Callable[[], bytes], dict[str, int], str]] = {
    "bytes": (lambda: framed(b"{}" + b" " * 99), {"LONGEST_HEADER": 100}, "may have 100"),
    "tensors": (
        lambda: framed({str(i): tensor(shape=[0], end=0) for i in range(6)}),
        {"MOST_TENSORS": 5},
        "more than 5",
    ),
    "metadata": (
        lambda: framed({"__metadata__": {str(i): "" for i in range(6)}}),
        {"MOST_METADATA": 5},
        "more than 5",
    ),
    "bytes of metadata": (lambda: framed({"__metadata__": {"a": "x" * 99}}), {"LONGEST_METADATA": 99}, "may have 99"),
}


@pytest.mark.parametrize("kind", LIMITS)
def test_limits(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, limits, words = LIMITS[kind]
    (tmp_path / "x.safetensors").write_bytes(make())
    read_header(tmp_path / "x.safetensors")
    for name, limit in limits.items():
        monkeypatch.setattr(module, name, limit)
    with pytest.raises(HeaderError, match=words):
        read_header(tmp_path / "x.safetensors")


HEAVY: dict[str, Callable[[], bytes]] = {
    "many tensors": lambda: framed(b"{" + b",".join(b'"%d":' % i + PAIR for i in range(110_000)) + b"}"),
    "many lists": lambda: framed(b'{"a":{"a":[' + b"[]," * 3_000_000 + b"0]}}"),
    "many texts": lambda: framed(b'{"__metadata__":{' + b",".join(b'"%d":""' % i for i in range(10**6)) + b"}}"),
    "wide letters": lambda: framed(b'{"__metadata__":{"a":"' + "\U0001f600".encode() * 1_900_000 + b'"}}'),
    "a long name": lambda: framed(b'{"' + b"a" * 20_000_000 + b'":{}}'),
    "escapes": lambda: framed(b'{"' + b"\\\\" * 5_000_000),
    "quotes": lambda: framed(b'{"a":{' + b'""' * 5_000_000),
}


@pytest.mark.parametrize("kind", HEAVY)
def test_no_header_takes_more_memory_than_its_file_and_64_mb(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(HEAVY[kind]())
    tracemalloc.start()
    try:
        read_header(path)
    except HeaderError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < path.stat().st_size + 64e6


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="missing") as error:
        read_header(tmp_path / "x.safetensors")
    assert error.value.where == str(tmp_path / "x.safetensors") and error.value.hint


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe", "/dev/zero"):
        with pytest.raises(HeaderError, match="regular"):
            read_header(tmp_path / name)


NAMES = st.text(max_size=8).filter(lambda name: name.isprintable() and name != "" and name != "__metadata__")
SHAPES = st.lists(st.integers(0, 3), max_size=3)
TENSORS = st.dictionaries(NAMES, st.tuples(st.sampled_from([torch.uint8, torch.float16]), SHAPES), max_size=4)


@settings(max_examples=100)
@given(described=TENSORS, metadata=st.dictionaries(NAMES, st.text(), max_size=3))
def test_whatever_the_library_writes_is_read_as_it_reads_it(
    described: dict[str, Any], metadata: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "written.safetensors"
    tensors = {name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in described.items()}
    save_file(tensors, path, metadata=metadata or None)  # of two empty ones safetensors 0.8 makes no JSON
    found = read_header(path)
    assert found.tensors == {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    assert found.metadata == metadata


@settings(max_examples=400)
@given(data=st.data())
def test_a_damaged_header_is_refused_or_read_as_the_library_reads_it(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """We may be stricter than the safetensors library, never more lenient, and never of another opinion."""
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(1, dtype=torch.uint8)}, path, metadata={"k": "v"})
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        ours = read_header(path)
    except CheckpointError as error:
        assert "damaged.safetensors" in str(error)
        return
    try:
        with safe_open(path, framework="np") as file:
            theirs = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        pytest.fail(f"the library refuses what we read: {error}")
    assert {key: shape for key, (_, shape) in ours.tensors.items()} == theirs


def test_parsing_needs_no_file() -> None:
    text = json.dumps({"a": tensor()}).encode()
    expected = Header({}, {"a": (torch.uint8, (2,))}, {"a": (8 + len(text), 10 + len(text))})
    assert parse_header(text, 10 + len(text)) == expected
