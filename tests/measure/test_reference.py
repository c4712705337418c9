import errno
import math
import shutil
import struct
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from llmquant.errors import LlmQuantError, NoSpaceError, ReferenceFileError
from llmquant.measure import forward as forward_module
from llmquant.measure.evaluate import evaluate
from llmquant.measure.reference import Reference, _Writer
from llmquant.measure.reference_file import Layout

from .conftest import CONTEXT, VOCAB, Fixed, MakeModel

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 16 rows, so that a window has two, the second of them shorter."""
    monkeypatch.setattr(forward_module, "BLOCK", 16 * 4 * VOCAB)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_reference_keeps_the_models_own_logits(
    make_model: MakeModel, windows: Tensor, dtype: torch.dtype, small_blocks: None
) -> None:
    """To the bit in 16 bits; float32 ones up to a constant in each row and a divergence of less than 1e-8."""
    model = make_model(1, dtype)
    with Reference.compute(model, windows) as reference, torch.inference_mode():
        assert reference.nll.shape == (len(windows), CONTEXT - 1)
        for index, window in enumerate(windows):
            logits, nll = reference.window(index)
            assert [len(block) for block in reference.blocks(index)] == [16, CONTEXT - 16]
            expected = model(window[None]).logits[0]
            assert logits.dtype == dtype and logits.shape == expected.shape and torch.equal(nll, reference.nll[index])
            if dtype.itemsize == 2:
                torch.testing.assert_close(logits, expected, rtol=0.02, atol=0.02)  # blocks round as other products
            else:
                p, q = expected.double().log_softmax(-1), logits.double().log_softmax(-1)
                assert 0 < (p.exp() * (p - q)).sum(-1).max() < 1e-8


def test_what_needs_no_other_model_is_kept_exactly(make_model: MakeModel, windows: Tensor) -> None:
    model = make_model(1)
    with Reference.compute(model, windows) as reference, torch.inference_mode():
        logits = model(windows).logits[:, :-1].double()
    assert torch.equal(reference.top1, logits.argmax(-1))
    torch.testing.assert_close(reference.confidence, logits.softmax(-1).amax(-1), rtol=1e-5, atol=0)
    nll = -logits.log_softmax(-1).gather(-1, windows[:, 1:, None])[..., 0]
    torch.testing.assert_close(reference.nll, nll, rtol=1e-5, atol=1e-6)


def test_windows_of_a_reference_may_start_anywhere(windows: Tensor) -> None:
    """A vocabulary of 7 in 16 bits: no window but the first is aligned to anything."""
    model = Fixed(torch.arange(7.0, dtype=torch.bfloat16))
    with Reference.compute(model, windows % 7) as reference:
        for index in range(len(windows)):
            assert torch.equal(reference.window(index)[0], model.row.detach().expand(CONTEXT, 7))


# --- a file that stays --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_opened_reference_is_the_computed_one(
    make_model: MakeModel, windows: Tensor, tmp_path: Path, dtype: torch.dtype, small_blocks: None
) -> None:
    path, candidate = tmp_path / "new" / "reference.safetensors", make_model(2, dtype)
    with Reference.compute(make_model(1, dtype), windows, path=path) as reference:
        first = evaluate(candidate, windows, reference)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    with Reference.open(path) as again:
        assert torch.equal(again.windows, windows) and again.vocabulary == VOCAB and again.path == path
        for name in ("nll", "confidence", "top1"):
            assert torch.equal(getattr(again, name), getattr(reference, name))
        second = evaluate(candidate, windows, again)
    assert (first.kl, first.perplexity, first.top1) == (second.kl, second.perplexity, second.top1)


def test_the_file_is_safetensors_of_two_bytes_a_logit(make_model: MakeModel, windows: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "reference.safetensors"
    with Reference.compute(make_model(1, torch.bfloat16), windows, path=path) as reference:
        assert reference.nbytes == 2 * VOCAB * windows.numel()
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"kind": "llmquant.reference", "version": "1", "rows": str(CONTEXT)}
            assert torch.equal(file.get_tensor("windows"), windows)
            assert torch.equal(file.get_tensor("logits")[3], reference.window(3)[0])
            assert torch.equal(file.get_tensor("nll"), reference.nll)


def test_every_changed_byte_is_found(tmp_path: Path) -> None:
    """In the header and the figures by opening, in the logits by reading."""
    path = tmp_path / "reference.safetensors"
    ids = torch.arange(6).view(2, 3) % 5
    Reference.compute(Fixed(torch.arange(5.0)), ids, path=path).close()
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(ReferenceFileError) as caught, Reference.open(path) as reference:
            for index in range(2):
                reference.window(index)
        assert caught.value.where == str(path) and caught.value.hint, place


@pytest.mark.parametrize("cut", [0, 4, 8, 100, -1, -1000])
def test_a_cut_file_is_an_error(make_model: MakeModel, windows: Tensor, tmp_path: Path, cut: int) -> None:
    path = tmp_path / "reference.safetensors"
    Reference.compute(make_model(1), windows, path=path).close()
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ReferenceFileError, match="cut, damaged"):
        Reference.open(path)


def test_other_files_are_errors_that_name_them(tmp_path: Path) -> None:
    header = b'{"logits":{"dtype":"F32","shape":[1,2,3],"data_offsets":[0,24]}}'
    contents = {
        "empty": b"",
        "text": b"not a reference " * 100,
        "weights": struct.pack("<Q", len(header)) + header + bytes(24),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    for name in (*contents, "missing", "."):
        with pytest.raises(ReferenceFileError) as caught:
            Reference.open(tmp_path / name)
        assert caught.value.where == str(tmp_path / name)


def test_a_file_of_a_later_version_says_so(make_model: MakeModel, windows: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "reference.safetensors"
    Reference.compute(make_model(1), windows, path=path).close()
    path.write_bytes(path.read_bytes().replace(b'"version":"1"', b'"version":"9"'))
    with pytest.raises(ReferenceFileError, match="version 9"):
        Reference.open(path)


def test_an_interrupted_run_leaves_the_older_file(make_model: MakeModel, windows: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "reference.safetensors"
    path.write_bytes(b"older")

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Reference.compute(make_model(1), windows, interrupt, path=path)
    assert path.read_bytes() == b"older" and list(tmp_path.iterdir()) == [path]


# --- a temporary file ---------------------------------------------------------------------------------


def test_the_file_is_gone_after_use(make_model: MakeModel, windows: Tensor, tmp_path: Path) -> None:
    with Reference.compute(make_model(1), windows, folder=tmp_path) as reference:
        evaluate(make_model(1), windows, reference)
    assert not list(tmp_path.iterdir()) and reference._file.closed
    reference.close()


def test_the_file_is_gone_after_an_exception(make_model: MakeModel, windows: Tensor, tmp_path: Path) -> None:
    """In the body of the `with`, and while the reference is computed."""
    with pytest.raises(KeyError), Reference.compute(make_model(1), windows, folder=tmp_path) as reference:
        raise KeyError
    assert not list(tmp_path.iterdir()) and reference._file.closed

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Reference.compute(make_model(1), windows, interrupt, folder=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("spare", "fits"), [(0, True), (-1, False)])
def test_room_is_checked_to_the_byte_before_anything_is_written(
    make_model: MakeModel, windows: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spare: int, fits: bool
) -> None:
    path = tmp_path / "reference.safetensors"
    need = Layout("BF16", (*windows.shape, VOCAB), CONTEXT).total()
    usage = namedtuple("usage", "total used free")(0, 0, need + spare)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    if fits:
        Reference.compute(make_model(1, torch.bfloat16), windows, path=path).close()
        assert path.stat().st_size == need
        return
    with pytest.raises(NoSpaceError, match=f"{need:,} bytes needed") as caught:
        Reference.compute(make_model(1, torch.bfloat16), windows, path=path)
    assert caught.value.where == str(tmp_path) and "TMPDIR" in str(caught.value.hint) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("number", "error"), [(errno.ENOSPC, NoSpaceError), (errno.EIO, OSError)])
def test_a_disk_that_fills_up_while_writing_is_told_from_a_broken_one(
    windows: Tensor, tmp_path: Path, number: int, error: type[Exception]
) -> None:
    class Full:
        def write(self, data: object) -> None:
            raise OSError(number, "device")

    writer = _Writer(Full(), windows, str(tmp_path))  # type: ignore[arg-type]
    with pytest.raises(error, match="device") as caught:
        writer.add(Fixed(torch.zeros(VOCAB)), 0)
    assert isinstance(caught.value, NoSpaceError) == (number == errno.ENOSPC)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_baseline_that_is_not_finite_names_the_window(windows: Tensor, bad: float, dtype: torch.dtype) -> None:
    logits = torch.zeros(VOCAB, dtype=dtype)
    logits[VOCAB // 2] = bad
    with pytest.raises(LlmQuantError, match="not finite") as caught:
        Reference.compute(Fixed(logits), windows)
    assert caught.value.where == "window 0" and caught.value.hint
