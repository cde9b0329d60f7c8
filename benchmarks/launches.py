"""What a program launches on a GPU, read from its optimized text: `launches.loops(launches.read_module(text))`.

A launch is an instruction that runs on the card: a fusion, a call of a library, a copy. Those in loops count as often
as their loop runs; a loop whose number of trips is not known counts once, and is named.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

# Launch nothing by themselves.
FREE = set(
    "parameter constant tuple get-tuple-element bitcast while conditional call after-all opt-barrier partition-id "
    "replica-id fusion-done async-done copy-done".split()
)
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?[\w.\-]+ = .*? ([a-z][a-z0-9\-]*)\(")


class Module(NamedTuple):
    """The text of an optimized program, taken apart."""

    computations: dict[str, list[str]]  # lines by name
    entry: str
    places: dict[int, str]  # line of `wmjax/`, by number of the stack frame


def read_module(text: str) -> Module:
    """Takes the text of an HLO module apart."""
    found: dict[str, list[str]] = {}
    entry, current = "", None
    for line in text.splitlines():
        head = None if line.startswith(" ") else re.match(r"^(ENTRY )?%?([\w.\-]+) (?:\(|.*->).*\{\s*$", line)
        if head:
            current = head.group(2)
            found[current] = []
            entry = current if head.group(1) else entry
        elif line.startswith("}"):
            current = None
        elif current is not None:
            found[current].append(line)
    return Module(found, entry, _places(text))


def _places(text: str) -> dict[int, str]:
    """Of each stack frame that instructions name, the innermost line in `wmjax/`."""

    def table(name: str, pattern: str) -> dict[int, tuple[str, ...]]:
        part = re.search(rf"^{name}\n((?:\d+ .*\n)+)", text, re.MULTILINE)
        lines = part.group(1).splitlines() if part else []
        return {int(line.split()[0]): re.search(pattern, line).groups() for line in lines}

    files, functions = (table(name, '"(.*)"') for name in ("FileNames", "FunctionNames"))
    locations = table("FileLocations", r"file_name_id=(\d+) function_name_id=(\d+) line=(\d+)")
    frames = table("StackFrames", r"file_location_id=(\d+) parent_frame_id=(\d+)")

    def place(frame: int) -> str:
        while frame in frames:
            location, parent = map(int, frames[frame])
            file, function, line = locations[location]
            (path,), (name,) = files[int(file)], functions[int(function)]
            if "/wmjax/" in path:
                return f"{path.rpartition('/wmjax/')[2]}:{line} {name.rpartition('.')[2]}"
            frame = parent - 1  # counted from 1; 0 is none
        return "elsewhere"

    return {frame: place(frame) for frame in frames}


class Loop(NamedTuple):
    """A loop, or what is outside of all (of one trip)."""

    name: str
    trips: int
    times: int  # that it runs in one call of the program, all trips of the loops around it included
    launches: int  # of one trip, without those of loops in it
    kinds: Counter
    places: Counter


def loops(module: Module) -> tuple[list[Loop], list[str]]:
    """All loops of a program, those with most launches first; and names of those whose trips are not known."""
    found, unknown = [], []

    def visit(name: str, trips: int, times: int) -> None:
        kinds, places = Counter(), Counter()
        for line, kind in _instructions(module, name):
            if kind == "while":
                body = re.search(r"body=%?([\w.\-]+)", line).group(1)
                known = re.search(r'"known_trip_count":\{"n":"?(\d+)', line)
                unknown.extend([] if known else [body])
                inner = int(known.group(1)) if known else 1
                visit(body, inner, times * inner)
            else:
                frame = re.search(r"stack_frame_id=(\d+)", line)
                kinds[kind] += 1
                places[module.places.get(int(frame.group(1)), "elsewhere") if frame else "the compiler"] += 1
        found.append(Loop(name, trips, times, kinds.total(), kinds, places))

    visit(module.entry, 1, 1)
    return sorted(found, key=lambda loop: loop.times * loop.launches, reverse=True), unknown


def _instructions(module: Module, name: str) -> Iterator[tuple[str, str]]:
    """Loops and launches of a computation, with their kinds; of alternatives the one that launches most."""
    for line in module.computations.get(name, ()):
        match = INSTRUCTION.match(line)
        kind = match.group(1) if match else "parameter"
        if kind == "conditional":
            listed = re.search(r"branch_computations=\{([^}]*)\}", line)
            names = re.findall(r"[\w.\-]+", listed.group(1)) if listed else re.findall(
                r"(?:true|false)_computation=%?([\w.\-]+)", line
            )  # fmt: skip
            yield from max(([*_instructions(module, branch)] for branch in names), key=len, default=[])
        elif kind == "call":
            yield from _instructions(module, re.search(r"to_apply=%?([\w.\-]+)", line).group(1))
        elif kind == "while" or kind not in FREE:
            target = re.search(r'custom_call_target="([^"]+)"', line)
            yield line, target.group(1) if target else kind


def total(loops: list[Loop]) -> Counter:
    """Launches of one call of a program, by kind."""
    kinds: Counter = Counter()
    for loop in loops:
        kinds.update({kind: loop.times * number for kind, number in loop.kinds.items()})
    return kinds
