"""Compares two run directories: the metrics of each step bit for bit, and the final weights by digest.

    python benchmarks/compare_runs.py OLD NEW [--json]

Reads plain files only, so that either run may be of any release. Prints what was compared and the first differences.
Exit code 1 where they differ.
"""

import argparse
import hashlib
import json
import pathlib
import sys
from typing import Any

RENAMED: dict[str, str] = {}
"""Name of a metric in OLD -> its name in NEW."""

NOT_COMPARED = ("window/ready_groups", "window/dropped_groups", "learner/mfu", "learner/peak_bytes")
NOT_COMPARED_STARTS, NOT_COMPARED_ENDS = ("sampler/",), ("seconds", "per_second")
"""Metrics of time and memory, and of how far the sampler happened to be."""

MOST_SHOWN = 10


def compare(old: pathlib.Path, new: pathlib.Path) -> dict[str, Any]:
    """What was compared, and every difference in words."""
    before, after = read_metrics(old), read_metrics(new)
    before = [{RENAMED.get(name, name): text for name, text in line.items()} for line in before]
    old_weights, new_weights = read_weights(old), read_weights(new)
    names = {name for line in before + after for name in line}
    return {
        "lines": len(before),
        "metrics": sorted(filter(is_compared, names)),
        "not_compared": sorted(name for name in names if not is_compared(name)),
        "tensors": len(old_weights),
        "differences": [*differing_lines(before, after), *differing_tensors(old_weights, new_weights)],
    }


def is_compared(name: str) -> bool:
    """Whether a metric has to be equal."""
    is_left_out = name in NOT_COMPARED or name.startswith(NOT_COMPARED_STARTS) or name.endswith(NOT_COMPARED_ENDS)
    return not is_left_out


def read_metrics(run: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; numbers stay text, which has every bit of them and keeps 0 and -0 apart."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_float=str, parse_int=str) for line in lines]


def read_weights(run: pathlib.Path) -> dict[str, str]:
    """Name of each tensor of the export -> type, shape and SHA-256 of its bytes."""
    found = {}
    for path in sorted((run / "export").glob("*.safetensors")):
        content = path.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:start])
        header.pop("__metadata__", None)
        for name, tensor in header.items():
            first, end = tensor["data_offsets"]
            digest = hashlib.sha256(content[start + first : start + end]).hexdigest()
            found[name] = f"{tensor['dtype']} {tensor['shape']} sha256 {digest[:16]}"
    return found


def differing_lines(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[str]:
    """Differences between the lines of two runs, in their order."""
    found = [] if len(before) == len(after) else [f"metrics.jsonl has {len(before)} lines -> {len(after)}"]
    if not before:
        found.append("metrics.jsonl has no lines")
    for number, (one, other) in enumerate(zip(before, after, strict=False), start=1):
        for name in [*one, *(name for name in other if name not in one)]:
            values = one.get(name, "absent"), other.get(name, "absent")
            if is_compared(name) and values[0] != values[1]:
                found.append(f"metrics.jsonl line {number}, step {one['step']}, {name}: {values[0]} -> {values[1]}")
    return found


def differing_tensors(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """Differences between the exports of two runs, by tensor."""
    if not before and not after:
        return ["export/*.safetensors: neither run has exported weights"]
    names = sorted(before.keys() | after.keys())
    pairs = {name: (before.get(name, "absent"), after.get(name, "absent")) for name in names}
    return [f"export, {name}: {old} -> {new}" for name, (old, new) in pairs.items() if old != new]


def describe(old: pathlib.Path, new: pathlib.Path, found: dict[str, Any]) -> str:
    """The result for people."""
    differences = found["differences"]
    lines = [
        f"{old} -> {new}",
        f"metrics.jsonl: {found['lines']} lines; {len(found['metrics'])} metrics compared bit for bit,"
        f" {len(found['not_compared'])} not compared: {', '.join(found['not_compared'])}",
        f"export: {found['tensors']} tensors compared by SHA-256",
        f"differences: {len(differences)}" if differences else "equal",
        *(f"  {difference}" for difference in differences[:MOST_SHOWN]),
    ]
    if len(differences) > MOST_SHOWN:
        lines.append(f"  ... and {len(differences) - MOST_SHOWN} more")
    return "\n".join(lines)


def main() -> int:
    """Exit codes: 0 equal, 1 different, 2 no run directory."""
    parser = argparse.ArgumentParser(description="Compares the metrics and the final weights of two runs.")
    parser.add_argument("old", type=pathlib.Path)
    parser.add_argument("new", type=pathlib.Path)
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    arguments = parser.parse_args()
    for run in (arguments.old, arguments.new):
        if not (run / "metrics.jsonl").is_file():
            parser.error(f"{run} has no metrics.jsonl: it is no run directory")
    found = compare(arguments.old, arguments.new)
    print(json.dumps(found, indent=2) if arguments.json else describe(arguments.old, arguments.new, found))
    return 1 if found["differences"] else 0


if __name__ == "__main__":
    sys.exit(main())
