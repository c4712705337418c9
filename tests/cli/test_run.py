"""`llmquant run`: programs that never heard of llmquant load its checkpoints; all else about them is as without it."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from models import Folders
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llmquant.errors import ProgramError, ProgramNotFoundError
from llmquant.integrations import program

MODULE = [sys.executable, "-m"]
RUN = [*MODULE, "llmquant", "run", "--"]
SIZES = dict(hidden_size=64, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4)
ROOT = str(Path(program.__file__).parents[2])
PATHS = os.pathsep.join([ROOT, *filter(None, [os.environ.get("PYTHONPATH")])])
LOADS = """
import sys
from transformers import AutoModelForCausalLM
assert "llmquant.quantize" not in sys.modules
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(type(model.model.layers[0].mlp.up_proj.weight).__name__)
"""
PARENT = "import subprocess, sys\nsys.exit(subprocess.run([sys.executable, *sys.argv[1:]]).returncode)\n"
SEEN = "import sys; print('llmquant' in sys.modules, 'torch' in sys.modules)"


def run(*command: object, start: list[str] = RUN, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command in a fresh process, through `llmquant run` unless `start` is another beginning."""
    return subprocess.run(
        [*start, *map(str, command)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": PATHS, "HF_HUB_OFFLINE": "1", **environment},
    )


def script(folder: Path, content: str, name: str = "script.py") -> Path:
    path = folder / name
    path.write_text(content)
    return path


def test_a_script_loads_a_checkpoint_only_with_it(folders: Folders, tmp_path: Path) -> None:
    checkpoint, path = folders.quantized("llama", "int4-g32"), script(tmp_path, LOADS)
    without = run(path, checkpoint, start=[sys.executable])
    assert without.returncode != 0 and without.stdout == ""
    within = run("python", path, checkpoint)
    assert (within.returncode, within.stdout) == (0, "Int4Tensor\n"), within.stderr


def test_child_processes_have_it_too(folders: Folders, tmp_path: Path) -> None:
    checkpoint = folders.quantized("llama", "int4-g32")
    script(tmp_path, PARENT, "parent.py")
    done = run("python", tmp_path / "parent.py", script(tmp_path, LOADS), checkpoint)
    assert (done.returncode, done.stdout) == (0, "Int4Tensor\n"), done.stderr


def test_it_is_registered_without_a_heavy_import() -> None:
    within = run("python", "-c", SEEN)
    assert (within.stdout, within.stderr) == ("True False\n", "")
    assert run("-c", SEEN, start=[sys.executable]).stdout == "False False\n"


@pytest.mark.parametrize("status", [0, 1, 77])
def test_the_exit_status_is_the_programs(status: int) -> None:
    assert run("sh", "-c", f"exit {status}").returncode == status


def test_arguments_arrive_as_they_are() -> None:
    arguments = ["--help", "-h", "a b", "", "--", "*", "--version"]
    done = run("python", "-c", "import json, sys; print(json.dumps(sys.argv[1:]))", *arguments)
    assert json.loads(done.stdout) == arguments
    assert run("llmquant", "run", "sh", "-c", "echo $0 $1", "-h", "--x", start=MODULE).stdout == "-h --x\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_reach_the_program_itself(number: signal.Signals, tmp_path: Path) -> None:
    """It is the very process that was started, so that nothing stands between it and its terminal."""
    waits = "import os, signal; print(os.getpid(), flush=True); signal.pause()"
    command = [*RUN, sys.executable, "-c", waits]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env={**os.environ, "PYTHONPATH": PATHS}
    )
    assert process.stdout is not None
    with process.stdout:
        assert int(process.stdout.readline()) == process.pid
        process.send_signal(number)
        assert process.wait(60) == -number


def test_a_closed_pipe_ends_the_program() -> None:
    """Python ignores SIGPIPE; a program started by it must not."""
    line = " ".join([*RUN, "sh", "-c", "'yes; echo $? >&2'", "| head -n 1"])
    done = run("-c", line, start=["sh"])
    assert (done.stdout, done.stderr) == ("y\n", f"{128 + signal.SIGPIPE}\n") or done.stderr == ""


OWN = "import sys, builtins\nbuiltins.own = sys.modules[__name__]\n"
ASKS = "import builtins, sys; print(builtins.own is sys.modules['sitecustomize'], 'llmquant' in sys.modules)"


def test_the_users_sitecustomize_still_runs(tmp_path: Path) -> None:
    script(tmp_path, OWN, "sitecustomize.py")
    paths = f"{tmp_path}{os.pathsep}{PATHS}"
    assert run("python", "-c", ASKS, PYTHONPATH=paths).stdout == "True True\n"
    nested = run("llmquant", "run", "--", "python", "-c", ASKS, PYTHONPATH=paths, start=[*RUN, sys.executable, "-m"])
    assert nested.stdout == "True True\n", nested.stderr


def test_the_error_of_the_users_sitecustomize_is_seen(tmp_path: Path) -> None:
    script(tmp_path, "import no_such_module_anywhere\n", "sitecustomize.py")
    done = run("python", "-c", SEEN, PYTHONPATH=f"{tmp_path}{os.pathsep}{PATHS}")
    assert done.stdout == "True False\n" and "no_such_module_anywhere" in done.stderr


def test_a_python_without_llmquant_starts_as_ever(tmp_path: Path) -> None:
    """-S: no site-packages, so no sitecustomize by itself; the module is run on its own."""
    module = Path(program.STARTUP) / "sitecustomize.py"
    done = run("-S", "-c", f"import runpy; runpy.run_path({str(module)!r}); print('on')", start=[sys.executable, "-E"])
    assert (done.returncode, done.stdout, done.stderr) == (0, "on\n", "")


def test_failures_name_what_to_do(tmp_path: Path) -> None:
    plain = script(tmp_path, "print(1)\n")
    bare = script(tmp_path, f"#!{sys.executable} -E\n", "bare")
    broken = script(tmp_path, "#!/no/such/program\n", "broken")
    for path in (bare, broken):
        path.chmod(0o755)
    cases = [
        ("no-such-program", 127, "no such program"),
        (tmp_path / "none", 127, "no such program"),
        (plain, 126, f"llmquant run -- python {plain}"),
        (tmp_path, 126, "not an executable program"),
        (bare, 126, "without -E"),
        (broken, 126, "cannot be started"),
    ]
    for name, status, words in cases:
        done = run(name)
        assert (done.returncode, done.stdout) == (status, ""), name
        assert words in done.stderr and str(name) in done.stderr and "Traceback" not in done.stderr
    assert "without -I" in run("python", "-I", "-c", "1").stderr
    assert run().returncode == 2


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (b"#!/opt/x/bin/python3.11\n", ["/opt/x/bin/python3.11"]),
        (b"#! /opt/x/bin/python -s -E\n", ["/opt/x/bin/python", "-s", "-E"]),
        (b"#!/opt/x/bin/python3 -uE\n", ["/opt/x/bin/python3", "-E"]),
        (b"#!/usr/bin/env -S /opt/python -I\n", ["/opt/python", "-I"]),
        (b"#!/usr/bin/env no-such-python\n", None),
        (b"#!/usr/bin/env\n", None),
        (b"#!/bin/sh\n", None),
        (b"\x7fELF python\n", None),
        (b"", None),
    ],
)
def test_the_first_line_tells_the_python(line: bytes, found: list[str] | None, tmp_path: Path) -> None:
    (tmp_path / "program").write_bytes(line)
    assert program.find_interpreter(str(tmp_path / "program")) == found


def test_flags_of_a_python_are_read_up_to_its_script() -> None:
    for arguments, flags in {
        ("-uE", "script.py", "-I"): ["-E"],
        ("-c", "-I"): [],
        ("-sS", "-m", "x"): ["-s", "-S"],
        (): [],
    }.items():
        assert program.find_interpreter("/opt/bin/python3.12", arguments) == ["/opt/bin/python3.12", *flags]


def test_the_path_of_modules_keeps_what_was_there() -> None:
    assert program.with_startup({})["PYTHONPATH"] == program.STARTUP
    once = program.with_startup({"PYTHONPATH": f"{os.pathsep}/a", "B": "c"})
    assert once == {"PYTHONPATH": f"{program.STARTUP}{os.pathsep}{os.pathsep}/a", "B": "c"}
    assert program.with_startup(once) == once


def test_errors_have_the_statuses_of_a_shell() -> None:
    with pytest.raises(ProgramNotFoundError, match=r"llmquant\[tasks\]") as none:
        program.find_program("lm-eval") if not _has("lm_eval") else program.start(["no-such-program-llmquant[tasks]"])
    assert (none.value.status, ProgramError.status) == (127, 126)


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


WORKER = LOADS + "import os\nprint(os.environ['RANK'], os.environ['WORLD_SIZE'])\n"


@pytest.mark.slow
def test_workers_of_accelerate_have_it(folders: Folders, tmp_path: Path) -> None:
    checkpoint = folders.quantized("llama", "int4-g32")
    options = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    options += ["--main_process_port", "0"]  # any that is free
    done = run("accelerate", "launch", *options, script(tmp_path, WORKER), checkpoint, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split()) == ["0", "1", "2", "2", "Int4Tensor", "Int4Tensor"]


SERVING = [package for package in ("fastapi", "uvicorn", "openai") if not _has(package)]


def _chat_model(folder: Path, recipe: str = "int8") -> Path:
    """A tiny quantized model with a tokenizer of bytes and a chat template."""
    config = LlamaConfig(**SIZES, vocab_size=300, max_position_embeddings=64)
    LlamaForCausalLM(config).save_pretrained(folder / "plain")
    alphabet = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template).save_pretrained(folder / "plain")
    done = run("llmquant", "quantize", folder / "plain", "-o", folder / "small", "--recipe", recipe, start=MODULE)
    assert done.returncode == 0, done.stderr
    return folder / "small"


def _wait(server: subprocess.Popen[bytes], port: int) -> None:
    """Until the server accepts connections."""
    end = time.monotonic() + 120
    while server.poll() is None and time.monotonic() < end:
        with socket.socket() as probe:
            probe.settimeout(1)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        threading.Event().wait(0.1)
    pytest.fail(f"the server did not answer, exit status {server.poll()}")


def _ask(port: int, model: str) -> dict[str, Any]:
    """One answer of the chat completions of OpenAI's interface."""
    content = {"model": model, "messages": [{"role": "user", "content": "ab"}], "max_tokens": 4, "stream": False}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json.dumps(content).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)


@contextmanager
def _serving(checkpoint: Path) -> Iterator[int]:
    """`llmquant run -- transformers serve`, and the port where it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [*RUN, "transformers", "serve", str(checkpoint), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"],
        env={**os.environ, "PYTHONPATH": PATHS, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait(server, port)
        yield port
    finally:
        server.terminate()
        server.wait(60)


@pytest.mark.slow
@pytest.mark.skipif(bool(SERVING), reason=f"transformers serve needs {', '.join(SERVING)}")
def test_transformers_serve_answers_with_a_quantized_model(tmp_path: Path) -> None:
    checkpoint = _chat_model(tmp_path)
    with _serving(checkpoint) as port:
        answer = _ask(port, str(checkpoint))
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 4


@pytest.mark.slow
@pytest.mark.skipif(bool(SERVING), reason=f"transformers serve needs {', '.join(SERVING)}")
def test_a_client_of_openai_streams_from_the_quantized_model(tmp_path: Path) -> None:
    """What is served is the quantized model: its greedy words, which the plain one does not say."""
    import openai

    checkpoint = _chat_model(tmp_path, "int2-g32")
    expected = {name: _greedy(tmp_path / name) for name in ("plain", "small")}
    assert expected["plain"] != expected["small"]
    ask: dict[str, Any] = dict(model=str(checkpoint), max_tokens=24, messages=[{"role": "user", "content": "ab"}])
    with _serving(checkpoint) as port, openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none") as client:
        whole = client.chat.completions.create(**ask, temperature=0).choices[0].message.content
        chunks = list(client.chat.completions.create(**ask, temperature=0, stream=True))
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert len(pieces) > 1 and "".join(pieces) == whole == expected["small"]


def _greedy(folder: Path) -> str:
    """What a model answers to `ab`, always with the likeliest token."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer("ab", return_tensors="pt")
    found = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs.input_ids.shape[1] :]
    return tokenizer.decode(found, skip_special_tokens=True)
