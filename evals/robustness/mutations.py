"""Mutated files for every reader: `python evals/robustness/mutations.py [READER ...] --files 100000`.

Each file is a whole one, or one of the corpus, with some damage: bits, bytes, numbers and words changed, parts cut,
doubled, swapped or moved from another file; of safetensors files half keep a right length of the header. Counted are
the errors by name; defects are any other exception, more than a second of processor time, and more memory than the
file's size and 64 MB. Memory that Python takes is asked of `tracemalloc` for a share of the files (it makes everything
slow), and for all of them the process may not grow past the same.
"""

from __future__ import annotations

import argparse
import collections
import gc
import json
import random
import resource
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from readers import READERS, Reader, kept, run

ROOM, SECOND = 64 << 20, 1.0
TRACED = 20  # one file in so many
_NUMBERS = (
    b"0",
    b"-1",
    b"1",
    b"255",
    b"4096",
    b"4294967296",
    b"9223372036854775807",
    b"18446744073709551616",
    b"1e9",
    b"0.5",
)
Mutation = Callable[[bytearray, random.Random, "Source"], None]


class Source:
    """What files are made from."""

    def __init__(self, reader: Reader) -> None:
        self.files = [*reader.seeds(), *(path.read_bytes() for path in kept(reader))]
        self.words = (*reader.words, *_NUMBERS, b"null", b"true", b'""', b"[]", b"{}")

    def mutated(self, chosen: random.Random) -> bytes:
        """A damaged file."""
        whole = chosen.choice(self.files)
        if chosen.random() < 0.5 and _is_framed(whole):
            begin = 8 + int.from_bytes(whole[:8], "little")
            head = self._damaged(whole[8:begin], chosen)
            return len(head).to_bytes(8, "little") + head + whole[begin:]
        return self._damaged(whole, chosen)

    def _damaged(self, content: bytes, chosen: random.Random) -> bytes:
        damaged = bytearray(content)
        for _ in range(1 << chosen.randrange(4)):
            chosen.choice(MUTATIONS)(damaged, chosen, self)
        return bytes(damaged)


def _is_framed(content: bytes) -> bool:
    """Whether a header follows its length; half of its mutations leave the length right."""
    return content[8:9] == b"{" and int.from_bytes(content[:8], "little") <= len(content) - 8


def _flip_bit(content: bytearray, chosen: random.Random, source: Source) -> None:
    if content:
        content[chosen.randrange(len(content))] ^= 1 << chosen.randrange(8)


def _set_byte(content: bytearray, chosen: random.Random, source: Source) -> None:
    if content:
        content[chosen.randrange(len(content))] = chosen.choice((0, 1, 0x22, 0x2C, 0x5B, 0x7B, 0x7F, 0x80, 0xFF))


def _cut(content: bytearray, chosen: random.Random, source: Source) -> None:
    begin, end = _part(content, chosen)
    del content[begin:end]


def _double(content: bytearray, chosen: random.Random, source: Source) -> None:
    begin, end = _part(content, chosen)
    content[begin:begin] = content[begin:end] * chosen.choice((1, 1, 2, 50))
    del content[1 << 17 :]


def _swap(content: bytearray, chosen: random.Random, source: Source) -> None:
    (a, b), (c, d) = sorted((_part(content, chosen), _part(content, chosen)))
    if b <= c:
        content[a:d] = content[c:d] + content[b:c] + content[a:b]


def _word(content: bytearray, chosen: random.Random, source: Source) -> None:
    place = chosen.randrange(len(content) + 1)
    content[place : place + chosen.choice((0, 0, 1, 4, 8))] = chosen.choice(source.words)


def _number(content: bytearray, chosen: random.Random, source: Source) -> None:
    """Another number in the place of one that is there, so that the rest stays as it was."""
    digits = [i for i, byte in enumerate(content) if 48 <= byte < 58 and (i == 0 or not 48 <= content[i - 1] < 58)]
    if digits:
        begin = end = chosen.choice(digits)
        while end < len(content) and 48 <= content[end] < 58:
            end += 1
        content[begin:end] = chosen.choice(_NUMBERS)


def _length(content: bytearray, chosen: random.Random, source: Source) -> None:
    """Another length of the header."""
    near = int.from_bytes(content[:8], "little") + chosen.randrange(-9, 10)
    length = chosen.choice((0, 1, 2, 99_999_999, 2**32, 2**63, 2**64 - 1, max(near, 0)))
    content[:8] = (length % 2**64).to_bytes(8, "little")


def _splice(content: bytearray, chosen: random.Random, source: Source) -> None:
    other = bytearray(chosen.choice(source.files))
    begin, end = _part(other, chosen)
    place = chosen.randrange(len(content) + 1)
    content[place:place] = other[begin:end]


def _nest(content: bytearray, chosen: random.Random, source: Source) -> None:
    place = chosen.randrange(len(content) + 1)
    content[place:place] = chosen.choice((b"[", b"{", b'{"a":', b"- ", b"? ")) * chosen.choice((1, 60, 3000))


def _part(content: bytearray, chosen: random.Random) -> tuple[int, int]:
    begin = chosen.randrange(len(content) + 1)
    return begin, min(len(content), begin + chosen.choice((1, 2, 8, 64, 1024)))


MUTATIONS: list[Mutation] = [_flip_bit, _set_byte, _cut, _double, _swap, _word, _number, _length, _splice, _nest]


def attack(reader: Reader, files: int, seed: int, folder: Path) -> dict[str, object]:
    """What came of so many files: outcomes by name, the slowest, the most memory, and defects."""
    source, chosen = Source(reader), random.Random(seed)
    reader.beside(folder)
    for content in source.files:
        run(reader, content, folder)  # imports what is imported late
    outcomes: collections.Counter[str] = collections.Counter()
    defects: list[str] = []
    slowest, most, began = 0.0, 0, time.time()
    for number in range(files):
        content = source.mutated(chosen)
        found, spent, taken = _measured(reader, content, folder, traced=number % TRACED == 0)
        outcomes[found] += 1
        slowest, most = max(slowest, spent), max(most, taken - len(content))
        if found.startswith("DEFECT") or spent > SECOND or taken > len(content) + ROOM:
            defects.append(f"{number}: {found}, {spent:.2f} s, {taken:,} bytes for {len(content):,}")
            (folder.parent / f"{reader.name}-{number}").write_bytes(content)
    return {
        "reader": reader.name,
        "files": files,
        "seconds": round(time.time() - began, 1),
        "outcomes": dict(outcomes.most_common()),
        "slowest_seconds": round(slowest, 3),
        "most_bytes_beyond_the_file": most,
        "defects": defects[:20],
    }


def _measured(reader: Reader, content: bytes, folder: Path, traced: bool) -> tuple[str, float, int]:
    """Outcome, processor seconds, and bytes taken: what Python had at most, or how far the process grew."""
    if traced:
        tracemalloc.start()
    before, peak = time.process_time(), _peak()
    try:
        found = run(reader, content, folder)
    except Exception as error:
        found = f"DEFECT {type(error).__name__}: {str(error)[:200]}"
    spent, taken = time.process_time() - before, _peak() - peak
    if traced:
        taken = max(taken, tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        gc.collect(0)
    return found, spent, taken


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Attacks each reader; a line of JSON for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("readers", nargs="*", help="names of readers; all by default")
    parser.add_argument("--files", type=int, default=100_000, help="for each reader")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    defects = 0
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as place:
        for name in asked.readers or READERS:
            folder = Path(place) / name
            folder.mkdir()
            found = attack(READERS[name], asked.files, asked.seed, folder)
            defects += len(found["defects"])  # type: ignore[arg-type]
            print(json.dumps(found), flush=True)
    sys.exit(1 if defects else 0)


if __name__ == "__main__":
    main()
