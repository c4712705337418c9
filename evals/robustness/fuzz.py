"""Coverage-guided fuzzing of every reader: `python evals/robustness/fuzz.py [READER ...] --seconds 1800` (`make fuzz`).

Needs `atheris` (extra `fuzz`). Inputs that reach new code are collected in `build/fuzz/READER`; with `--keep` they
are put into the corpus, which the ordinary tests replay. An input that is a defect (an
exception that is no `LlmQuantError`, more than a second of processor time, more memory than its size and 64 MB) stops
the reader's run and is written to `build/fuzz/READER-crash-...`.
"""

from __future__ import annotations

import argparse
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
BUILD = HERE.parents[1] / "build" / "fuzz"
MODULES = [
    "llmquant.checkpoint",
    "llmquant.documents",
    "llmquant.config",
    "llmquant.study.spec",
    "llmquant.tune.journal",
]
MODULES += ["llmquant.calibrate.imatrix", "llmquant.measure.reference_file", "llmquant.report", "llmquant.foreign"]
MODULES += ["llmquant.export", "llmquant.primitives.dynamic", "json.decoder", "yaml.constructor", "yaml.resolver"]
SECOND, ROOM = 1.0, 64 << 20
MOST_KEPT = 40


def main() -> None:
    """Fuzzes each reader in a process of its own, and prints what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("readers", nargs="*", help="names of readers; all by default")
    parser.add_argument("--seconds", type=int, default=1800, help="for each reader")
    parser.add_argument("--keep", action="store_true", help="put what reached new code into the corpus")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    asked, flags = parser.parse_known_args()
    if asked.inside:
        _fuzz(asked.readers[0], flags)
        return
    from readers import READERS

    unknown = set(asked.readers) - set(READERS)
    if unknown:
        parser.error(f"there is no reader {', '.join(sorted(unknown))}: {', '.join(READERS)}")
    failed = [name for name in asked.readers or READERS if not _run(name, asked.seconds, asked.keep)]
    sys.exit(f"defects in {', '.join(failed)}" if failed else 0)


def _run(name: str, seconds: int, keep: bool) -> bool:
    """Whether a reader withstood so many seconds."""
    found = BUILD / name
    found.mkdir(parents=True, exist_ok=True)
    began = time.time()
    flags = [f"-max_total_time={seconds}", "-timeout=120", "-rss_limit_mb=0", "-print_final_stats=1", "-max_len=8192"]
    flags += [f"-artifact_prefix={BUILD / name}-", "-len_control=0", str(found)]
    status, log = _inside(name, flags)
    counts = re.findall(r"stat::(\w+):\s+(\d+)", log)
    told = {key: int(value) for key, value in counts}.get("number_of_executed_units", 0)
    coverage = re.findall(r"cov: (\d+)", log)[-1:] or ["?"]
    verdict = "ok" if status == 0 else "DEFECT"
    files = len(list(found.iterdir()))
    print(
        f"{name}: {verdict}, {time.time() - began:.0f} s, {told:,} inputs, coverage {coverage[0]}, {files} files",
        flush=True,
    )
    if status:
        print(log[-6000:], flush=True)
    if keep and status == 0:
        _keep(name, found)
    return status == 0


def _keep(name: str, found: Path) -> None:
    """Puts the inputs that reached new code into the corpus, the smallest of them where there are many."""
    from readers import CORPUS

    kept = sorted(found.iterdir(), key=lambda path: path.stat().st_size)[:MOST_KEPT]
    shutil.rmtree(CORPUS / name, ignore_errors=True)
    (CORPUS / name).mkdir(parents=True)
    for path in kept:
        shutil.copy(path, CORPUS / name / path.name[:16])
    print(f"{name}: {len(kept)} files kept", flush=True)


def _inside(name: str, flags: list[str]) -> tuple[int, str]:
    command = [sys.executable, __file__, name, "--inside", *flags]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    return done.returncode, done.stdout


def _fuzz(name: str, flags: list[str]) -> None:
    """Fuzzes a reader in this process, which does not come back."""
    import atheris
    import torch  # noqa: F401  (before anything is instrumented: it is large)
    import transformers  # noqa: F401

    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as place:
        folder, begin = Path(place) / "model", Path(place) / "seeds"
        folder.mkdir()
        begin.mkdir()
        with atheris.instrument_imports(include=MODULES, enable_loader_override=False):
            from readers import READERS, kept, run

            reader = READERS[name]
            reader.beside(folder)
            seeds = [*reader.seeds(), *(path.read_bytes() for path in kept(reader))]
            for number, content in enumerate(seeds):
                (begin / str(number)).write_bytes(content)
                run(reader, content, folder)  # imports what is imported late
        words = Path(place) / "words"
        words.write_text("".join(f'"{_escaped(word)}"\n' for word in reader.words))

        def one(data: bytes) -> None:
            before, peak = time.process_time(), _peak()
            run(reader, data, folder)
            spent, grown = time.process_time() - before, _peak() - peak
            if spent > SECOND or grown > len(data) + ROOM:
                raise RuntimeError(f"{spent:.2f} s, {grown / 1e6:.0f} MB for {len(data):,} bytes")

        atheris.Setup([sys.argv[0], *flags, str(begin), f"-dict={words}"], one)
        atheris.Fuzz()


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _escaped(word: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in word)


if __name__ == "__main__":
    main()
