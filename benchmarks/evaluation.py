"""Memory and time of `polar eval` and `polar eval report` on synthetic preferences, each measured as a process.

    python benchmarks/evaluation.py --sizes 20000 100000 --report evaluation

makes preferences of three words a text, so that the model takes little of the time, evaluates the bundled model and
the baselines on them, makes the report of the records, and writes evaluation.json and evaluation.md. With --onednn the
model is scored by oneDNN (`polar.model.cpu`), which takes more memory, whether or not it is the faster kernel here.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random

from corpus import machine

PROGRAM = "from polar.cli.main import script; script()"
WORDS = [f"{first}{second}" for first in "bdfglmnprstvw" for second in ("a", "en", "ick", "old", "un")]
PER_PROMPT = 2


def main() -> None:
    """Parse the command line and run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[20_000, 100_000], help="comparisons of each run")
    parser.add_argument("--onednn", action="store_true", help="score by oneDNN (`polar.model.cpu`)")
    parser.add_argument("--report", type=Path, required=True, help="name of the report, without .json and .md")
    arguments = parser.parse_args()
    if arguments.onednn:
        os.environ["POLAR_CPU_KERNEL"] = "onednn"
    runs = []
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory(prefix="polar-benchmark-") as name:
            data, records = Path(name) / "preferences.jsonl", Path(name) / "records"
            write_preferences(data, size)
            evaluate = measure(PROGRAM, ["eval", "--preferences", str(data), "--output", str(records)])
            report = measure(PROGRAM, ["eval", "report", str(records), "--output", str(Path(name) / "report.html")])
            runs.append({"comparisons": size, "evaluate": evaluate, "report": report})
    lines = [
        "| comparisons | eval, CPU s | eval, peak MB | report, CPU s | report, peak MB |",
        "|---:|---:|---:|---:|---:|",
    ]
    for run in runs:
        numbers = [run[command][field] for command in ("evaluate", "report") for field in ("cpu_seconds", "peak_mb")]
        lines.append(f"| {run['comparisons']:,} | {' | '.join(f'{number:,.0f}' for number in numbers)} |")
    table = "\n".join([*lines, "", machine(), ""])
    sys.stdout.write(table)
    arguments.report.with_suffix(".md").write_text(table, "utf-8")
    found = {"machine": machine(), "onednn": arguments.onednn, "runs": runs}
    arguments.report.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")


def write_preferences(path: Path, size: int) -> None:
    """Short texts; the chosen one shares more words with the reference."""
    random = Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(size):
            reference = random.sample(WORDS, 3)
            row = {
                "prompt": f"{number // PER_PROMPT}?",
                "reference": " ".join(reference),
                "chosen": " ".join([*reference[:2], random.choice(WORDS)]),
                "rejected": " ".join([reference[0], *random.sample(WORDS, 2)]),
                "domain": random.choice(WORDS[:10]),
            }
            file.write(json.dumps(row) + "\n")


def measure(program: str, words: list[str]) -> dict[str, float]:
    """Run a command to its end; the peak of its memory is the kernel's own count."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", program, *words], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"polar {' '.join(words)}: failed")
    cpu = usage.ru_utime + usage.ru_stime
    return {"seconds": time.perf_counter() - start, "cpu_seconds": cpu, "peak_mb": usage.ru_maxrss * 1024 / 1e6}


if __name__ == "__main__":
    main()
