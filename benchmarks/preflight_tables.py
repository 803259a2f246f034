"""The tables of docs/preflight.md: preflight of the large configs on the slices that they are meant for.

    PYTHONPATH=. .venv/bin/python benchmarks/preflight_tables.py [--reports DIR]

Needs libtpu (``make tpu``) and, on two busy cores, 5 to 10 minutes a case. Reports are kept in DIR, and a case that
has one there is not compiled again. Prints Markdown; sizes are GiB of one device, times are bounds from below.
"""

import argparse
import json
import pathlib
import shlex
import subprocess
import sys
from typing import Any

GIB = 2**30

CASES = {
    "Qwen3-4B, 16,384 tokens, 128 rollouts": {
        "4b_v5p-32": "configs/math_qwen3_4b.yaml --topology v5p-32",
        "4b_v6e-64": "configs/math_qwen3_4b.yaml --topology v6e-64 mesh.trainer=fsdp=16,tensor=4",
    },
    "Qwen3-30B-A3B, 16,384 tokens, 128 rollouts": {
        "30b_v5p-64": "configs/math_qwen3_4b.yaml --topology v5p-64 model.path=Qwen/Qwen3-30B-A3B mesh.trainer=fsdp=8,tensor=4",
    },
    "DeepSeek-R1-Distill-Qwen-14B, 32,000 tokens, 256 rollouts": {
        "14b_v5p-64": "configs/math_r1_distill_14b.yaml --topology v5p-64",
        "14b_v5p-128": "configs/math_r1_distill_14b.yaml --topology v5p-128",
        "14b_2xv5p-64": "configs/math_r1_distill_14b.yaml --topology v5p-64 --num-slices 2"
        " mesh.trainer=data=2,fsdp=8,tensor=4 learner.micro_batch_rows=16",
    },
    "Qwen2.5-0.5B, 640 tokens, 128 rollouts": {
        "05b_v5e-8": "configs/math_qwen2.5_0.5b.yaml --topology v5e-8",
        "05b_v5e-1": "configs/math_qwen2.5_0.5b.yaml --topology v5e-1 learner.micro_batch_rows=1",
    },
}

HEAD = "| program | arguments | temporaries | beside | total | of usable | at least, s | bound | MFU at most | ICI | DCN | compile, s |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reports", type=pathlib.Path, default=pathlib.Path("runs/preflight"))
    folder = parser.parse_args().reports
    for title, cases in CASES.items():
        print(f"### {title}\n")
        for name, words in cases.items():
            print(f"`python -m oapl_jax preflight --config {words}`\n")
            print(table(read_report(folder, name, words)) + "\n", flush=True)


def read_report(folder: pathlib.Path, name: str, words: str) -> dict[str, Any]:
    """The report of a case; makes it where the folder has none."""
    report = folder / f"{name}.json"
    if not report.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        command = f"{sys.executable} -m oapl_jax preflight --config {words} --json {report}"
        subprocess.run(shlex.split(command), stdout=sys.stderr, check=False)
    return json.loads(report.read_text())


def table(report: dict[str, Any]) -> str:
    """Markdown of one report."""
    cache = report["kv_cache"]
    lines = [HEAD, "|" + "---|" * (HEAD.count("|") - 1)]
    for program in report["programs"]:
        seconds = program["seconds"]
        received = {
            network: sum(each["num_bytes"] for each in program["collectives"] if each["network"] == network)
            for network in ("ICI", "DCN")
        }
        sizes = [program[name] / GIB for name in ("arguments", "temporaries", "beside", "total")]
        cells = [
            f"`{program['name']}`",
            *(f"{size:.2f}" for size in sizes),
            f"{program['total'] / program['usable']:.0%}",
            f"{seconds[program['bound']]:.3g}",
            program["bound"],
            f"{program['mfu']:.0%}" if program["mfu"] else "",
            *(f"{received[network] / GIB:.3g}" for network in ("ICI", "DCN")),
            f"{program['compile_seconds']:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    verdict = "Fits" if report["fits"] else "Does not fit"
    lines.append(
        f"\n{verdict}. The cache holds {cache['tokens']:,.0f} tokens, {cache['rollouts']:,.0f} rollouts of full length at"
        f" once, for {cache['rows']:,.0f} rows."
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
