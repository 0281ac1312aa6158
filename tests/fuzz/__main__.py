"""`make fuzz`: thousands of random command lines, and some that are accepted and then train for two batches."""

import argparse
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from fuzz import KINDS
from fuzz.child import World, fault
from fuzz.grammar import TRAINING, Grammar, Line

Found = dict[str, tuple[Line, str, int]]
"""The faults by their kind: the shortest line, what is wrong, and how many lines have it."""


def campaign(world: World, seed: int, lines: int, say: Callable[[str], None] = print) -> Found:
    """Try random lines, and return the faults."""
    grammar, found, codes, began = Grammar(seed), Found(), Counter[int](), time.monotonic()
    for number in range(lines):
        line = grammar.line()
        end = world.end(line)
        codes[end.code] += 1
        if wrong := fault(line, end):
            kind = kind_of(wrong)
            if kind not in found:
                line, wrong = shortest(world, line, wrong)
                say(f"{line}\n    {wrong}")
            found[kind] = (*found.get(kind, (line, wrong, 0))[:2], found.get(kind, (line, wrong, 0))[2] + 1)
        if (number + 1) % 500 == 0:
            say(
                f"{number + 1} lines in {time.monotonic() - began:.0f} s, exit codes {dict(codes)}, faults {len(found)}"
            )
    return found


def kind_of(wrong: str) -> str:
    """Return the part of a fault that others of its kind share: the place of a traceback, or the first words."""
    return wrong.partition(": ")[0] if wrong.startswith("traceback at") and "?" not in wrong[:15] else wrong[:60]


def shortest(world: World, line: Line, wrong: str) -> tuple[Line, str]:
    """Drop words as long as the same kind of fault stays."""
    for word in reversed(line.words):
        words = list(line.words)
        words.remove(word)
        shorter = Line(line.door, tuple(words))
        again = fault(shorter, world.end(shorter))
        if again and kind_of(again) == kind_of(wrong):
            line, wrong = shorter, again
    return line, wrong


def accepted(world: World, seed: int, runs: int, say: Callable[[str], None] = print) -> Found:
    """Let random lines that are accepted train for two batches and evaluate, and return the faults."""
    grammar, found, done = Grammar(seed), Found(), 0
    while done < runs:
        line = grammar.meant()
        line = Line("run", (*line.words, *(word for word in TRAINING)))
        if world.end(line).code != 0:
            continue
        done += 1
        began = time.monotonic()
        end = world.end(line, stops=False)
        wrong = fault(line, end) or (f"refused after it was accepted: {end.err}" if end.code else None)
        say(f"{done} of {runs}: {time.monotonic() - began:.0f} s, exit code {end.code}")
        if wrong:
            found[kind_of(wrong)] = (line, wrong, 1)
            say(f"{line}\n    {wrong}")
    return found


def foreign(seed: int, runs: int) -> Found:
    """Let atheris change files of each kind, and return the kinds with a fault; none where it is not installed."""
    found = Found()
    for kind in KINDS if find_spec("atheris") else ():
        line = [sys.executable, "-m", "fuzz.foreign", kind, str(runs), str(seed)]
        done = subprocess.run(line, capture_output=True, text=True, errors="replace", check=False)
        print(f"{kind}: {runs} files, exit code {done.returncode}")
        if done.returncode:
            said = [word for word in done.stderr.splitlines() if "Error" in word or "Uncaught" in word]
            found[kind] = (Line("foreign", (kind,)), "; ".join(said[:3]) or done.stderr[-300:], 1)
    return found


def main() -> int:
    """Print the seed, every fault with its shortest line, and a summary; the exit code is 1 if there is a fault."""
    parser = argparse.ArgumentParser(prog="python -m fuzz")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--lines", type=int, default=5000)
    parser.add_argument("--runs", type=int, default=60)
    parser.add_argument("--files", type=int, default=2000)
    options = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")  # type: ignore[union-attr]
    print(f"seed {options.seed}")
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        found = campaign(world, options.seed, options.lines)
        found |= accepted(world, options.seed, options.runs)
    found |= foreign(options.seed, options.files)
    for line, wrong, times in found.values():
        print(f"\n{times} x {line}\n    {wrong}")
    print(f"\nseed {options.seed}: {options.lines} lines and {options.runs} runs, {len(found)} kinds of faults")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
