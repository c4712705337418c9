"""Runs a save again and again in forked children, each killed at the next moment at which it touches the disk.

Run as a program: `killer.py ROOT OLD ACTION`, where ACTION is JSON. Attempt i works in ROOT/i, into which the folder
OLD (if it is not "-") is copied as `out` first; it ends with SIGKILL just before step i, and ROOT/i.txt says which that
was. The last attempt has no step left and ends well. Forks save the time of importing torch forty times.
"""

from __future__ import annotations

import itertools
import json
import os
import runpy
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate"}


class Killer:
    """Counts the moments, and ends the process at one of them."""

    def __init__(self, folder: Path, step: int) -> None:
        self.folder, self.step, self.seen, self.quiet = str(folder), step, 0, False

    def moment(self, what: str) -> None:
        self.seen += 1
        if self.seen > self.step:
            self.quiet = True
            Path(f"{self.folder}.txt").write_text(what)
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Python's own file operations, each announced before it happens."""
        if self.quiet or event not in EVENTS:
            return
        path, inside = str(arguments[0]), str(arguments[0]).startswith(self.folder)
        if event == "open":
            if not inside or not int(arguments[2]) & (os.O_WRONLY | os.O_RDWR):
                return
            if path.endswith(".safetensors") and os.path.exists(path):
                return  # a tensor goes to its place in it: see `halved`
            self.torn(path)
        elif not inside and arguments[-1] in (None, -1):  # with a folder's descriptor the path is relative
            return
        self.moment(f"{event} {path}")

    def torn(self, path: str) -> None:
        """A file that was cut while it was written."""
        self.quiet = True
        if self.seen == self.step:
            Path(path).write_text('{"architectures": [')
        self.quiet = False
        self.moment(f"torn {path}")

    def wrap(self, save_file: Any) -> Any:
        """safetensors writes past Python: before, cut in the middle, and after."""

        def wrapped(tensors: Any, path: Any, metadata: Any = None) -> None:
            self.moment(f"before {path}")
            self.quiet = True
            save_file(tensors, path, metadata=metadata)
            content = Path(path).read_bytes()
            Path(path).write_bytes(content[: len(content) // 2])
            self.quiet = False
            self.moment(f"half of {path}")
            self.quiet = True
            Path(path).write_bytes(content)
            self.quiet = False
            self.moment(f"after {path}")

        return wrapped

    def halved(self, pwrite: Any) -> Any:
        """A tensor that is cut in the middle."""

        def wrapped(file: int, content: Any, place: int) -> int:
            half = len(content) // 2
            pwrite(file, content[:half], place)
            self.moment(f"half of {place}")
            pwrite(file, content[half:], place + half)
            return len(content)

        return wrapped

    def behind(self, fsync: Any) -> Any:
        """Behind the moment at which something is on the disk."""

        def wrapped(file: int) -> None:
            fsync(file)
            self.moment("after fsync")

        return wrapped


def act(action: dict[str, Any], out: Path) -> None:
    """What is to be killed."""
    import torch

    torch.set_num_threads(1)
    if action["do"] == "quantize":
        sys.argv = ["llmquant", "quantize", action["source"], "-o", str(out), *action["options"]]
        runpy.run_module("llmquant", run_name="__main__", alter_sys=True)
        return
    from transformers import AutoModelForCausalLM

    import llmquant

    model = AutoModelForCausalLM.from_pretrained(action["source"])
    if action["do"] == "save":
        llmquant.save(model, out, overwrite=True, **action["options"])
    else:
        model.save_pretrained(out, **action["options"])


def child(action: dict[str, Any], folder: Path, step: int) -> None:
    """One attempt. Does not return."""
    import transformers.modeling_utils

    from llmquant.checkpoint import output

    for stream in (1, 2):
        os.dup2(os.open(f"{folder}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream)
    killer = Killer(folder, step)
    transformers.modeling_utils.safe_save_file = killer.wrap(transformers.modeling_utils.safe_save_file)
    os.pwrite, os.fsync = killer.halved(os.pwrite), killer.behind(os.fsync)
    output.COMMIT_SECONDS = 0.0
    sys.addaudithook(killer.audit)
    try:
        act(action, folder / "out")
    except SystemExit as end:
        os._exit(int(end.code or 0))
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def main(root: Path, old: str, action: dict[str, Any]) -> None:
    """All attempts; prints how many there were."""
    import transformers.modeling_utils  # noqa: F401  (imported once, for all children)

    import llmquant.checkpoint.stream
    import llmquant.cli.main
    import llmquant.integrations.transformers  # noqa: F401

    for step in itertools.count():
        folder = root / str(step)
        folder.mkdir()
        if old != "-":
            shutil.copytree(old, folder / "out")
        pid = os.fork()
        if pid == 0:
            child(action, folder, step)
        _, status = os.waitpid(pid, 0)
        if not os.WIFSIGNALED(status):
            print(step)
            sys.exit(os.WEXITSTATUS(status))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))
