"""Any program with llmquant: Python registers it at its start, in the program and in the processes it starts.

A folder on PYTHONPATH holds a `sitecustomize` module, which every Python imports when it starts; child processes
inherit the variable. Nothing is written anywhere, so the program can take the place of this process.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from llmquant.errors import ProgramError, ProgramNotFoundError

STARTUP = str(Path(__file__).parent / "startup")
PYTHON = re.compile(r"python(\d+(\.\d+)*)?t?(\.exe)?", re.IGNORECASE)
REGISTERED = "import sys; sys.exit('llmquant' not in sys.modules)"
PACKAGES = {"lm_eval": "llmquant[tasks]", "lm-eval": "llmquant[tasks]", "ray": "llmquant[ray]"}


def start(command: Sequence[str]) -> NoReturn:
    """Replaces this process by a program: its exit status, its signals and its terminal are the program's own.

    Args:
        command: the program, by path or name, and its arguments. A name is looked up beside llmquant's own commands
            first (`python` is the one that has llmquant), then on PATH.

    Raises:
        ProgramNotFoundError: there is no such program.
        ProgramError: it cannot be executed, or its Python would run without llmquant.
    """
    path, environment = find_program(command[0]), with_startup(os.environ)
    interpreter = find_interpreter(path, command[1:])
    if interpreter:
        check_registers(path, interpreter, environment)
    sys.stdout.flush()
    sys.stderr.flush()
    _restore_signals()
    try:
        os.execve(path, [path, *command[1:]], environment)  # a Python finds its packages by the path it is called by
    except OSError as error:
        raise ProgramError(f"the program cannot be started: {error.strerror}", where=path) from error


def find_program(name: str) -> str:
    """The path of a program. Raises `ProgramNotFoundError`, or `ProgramError` for what may not be executed."""
    own = None if os.path.dirname(name) else shutil.which(name, path=sysconfig.get_path("scripts"))
    found = own or shutil.which(name)
    if found:
        return os.path.abspath(found)
    script = f"`llmquant run -- python {name}`" if name.endswith(".py") else None
    if os.path.exists(name):
        raise ProgramError("not an executable program", where=name, hint=script or "the program's name or path")
    package = f"pip install {PACKAGES[name]}" if name in PACKAGES else None
    raise ProgramNotFoundError(
        "no such program", where=name, hint=package or "the path of a program, or a name on PATH; install it first"
    )


def with_startup(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment with the folder of `sitecustomize` first on PYTHONPATH; what was there stays behind it."""
    before = environment.get("PYTHONPATH")
    if before and before.split(os.pathsep)[0] == STARTUP:
        return dict(environment)
    return {**environment, "PYTHONPATH": f"{STARTUP}{os.pathsep}{before}" if before else STARTUP}


def find_interpreter(path: str, arguments: Iterable[str] = ()) -> list[str] | None:
    """The Python that a program runs in, with its flags; None where that is not to be seen from outside.

    A Python given by name is that itself, a script says it in its first line (`#!`).
    """
    if PYTHON.fullmatch(os.path.basename(path)):
        return [path, *_isolating(arguments)]
    words = _first_line(path)
    if words and os.path.basename(words[0]) == "env":
        words = [word for word in words[1:] if word != "-S"]
        words[:1] = [shutil.which(words[0]) or words[0]] if words else []
    if not words or not PYTHON.fullmatch(os.path.basename(words[0])):
        return None
    return [words[0], *_isolating(words[1:])]


def check_registers(path: str, interpreter: Sequence[str], environment: Mapping[str, str]) -> None:
    """Starts a program's Python for a moment: is llmquant registered in it? Raises `ProgramError` if not."""
    try:
        done = subprocess.run(
            [*interpreter, "-c", REGISTERED], env=environment, stdin=subprocess.DEVNULL, capture_output=True
        )
    except OSError as error:
        raise ProgramError(
            f"its Python cannot be started: {error.strerror}", where=f"{path}: {interpreter[0]}"
        ) from error
    if done.returncode == 0:
        return
    deaf = [flag for flag in interpreter[1:] if set(flag) & set("EIS")]
    hint = f"start it without {' '.join(deaf)}" if deaf else f"install llmquant there, or use {sys.executable}"
    where = path if path == interpreter[0] else f"{path} (run by {' '.join(interpreter)})"
    raise ProgramError("the program's Python would run without llmquant", where=where, hint=hint)


def _first_line(path: str) -> list[str]:
    """The words behind `#!`; none in a binary program, or in one that may be executed but not read."""
    try:
        with open(path, "rb") as file:
            return file.readline(4096).decode("utf-8", "replace").split() if file.read(2) == b"#!" else []
    except OSError:
        return []


def _isolating(arguments: Iterable[str]) -> list[str]:
    """Of a Python's flags, those that decide where it looks for modules: E, I, P, s, S; up to the script."""
    found = []
    for argument in arguments:
        if not re.fullmatch(r"-[a-zA-Z]+", argument) or argument[1] in "cmWX":
            break
        found += [f"-{letter}" for letter in argument[1:] if letter in "EIPsS"]
    return found


def _restore_signals() -> None:
    """Python ignores two signals, and what a process ignores its successor ignores too: `... | head` would not end."""
    for name in ("SIGPIPE", "SIGXFSZ"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_DFL)
