"""Speed and memory of the corpus commands on synthetic data, each measured as a process of its own.

    python benchmarks/corpus.py pair --sizes 100000 1000000 10000000 --directory /a/large/disk --report pair

makes trajectories as in the paper (for every prompt two policies of 131, one of them sampled twice), runs `polar pair`
on them, and writes the measurements to pair.json and pair.md. Ten million trajectories need about 8 GB of disk.

    python benchmarks/corpus.py sample --rounds 5 --report sample

compares `polar sample` with the bare engine (see sampling.py).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import sampling

POLICIES, FAMILIES = 131, 20
CHUNK = 30_000
"""Rows that are made at a time."""
VOCABULARY, LONG = 20_000, 1_000_000
"""Different words, and words of the long text that all prompts and outputs are slices of."""
LONGEST = 800
"""Words of the longest output."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """One run of a command."""

    trajectories: int
    input_mb: float
    seconds: float
    cpu_seconds: float
    trajectories_per_second: float
    peak_mb: float
    """Largest resident set of the process."""
    temporary_mb: float
    """Most that lay in the temporary directory."""


def main() -> None:
    """Parse the command line and run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    pair = commands.add_parser("pair", help="trajectories to triples")
    pair.add_argument("--sizes", type=int, nargs="+", default=[100_000, 1_000_000], help="trajectories of each run")
    pair.add_argument("--directory", type=Path, default=None, help="for corpora and temporary files")
    pair.add_argument("--report", type=Path, required=True, help="name of the report, without .json and .md")
    pair.add_argument("flags", nargs="*", help="more flags for polar pair, after --")
    pair.set_defaults(run=lambda arguments: measure_pair(arguments))
    sample = commands.add_parser("sample", help="what sampling costs beside the engine")
    sample.add_argument("--rounds", type=int, default=5, help="runs of each side")
    sample.add_argument("--report", type=Path, required=True, help="name of the report, without .json and .md")
    sample.set_defaults(run=lambda arguments: sampling.run(arguments.rounds, arguments.report, machine()))
    arguments = parser.parse_args()
    arguments.run(arguments)


def measure_pair(arguments: argparse.Namespace) -> None:
    """Run `polar pair` on a corpus of every size, and report after each."""
    measurements = []
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory(dir=arguments.directory, prefix="polar-benchmark-") as name:
            directory = Path(name)
            corpus, temporary = directory / "corpus.parquet", directory / "temporary"
            temporary.mkdir()
            write_trajectories(corpus, size)
            command = [sys.executable, "-m", "polar.cli.main", "pair", str(corpus)]
            command += ["--output", str(directory / "triples.parquet"), "--temp", str(temporary), *arguments.flags]
            measurements.append(measure(command, corpus, temporary))
        table = markdown(measurements)
        sys.stdout.write(table)
        arguments.report.with_suffix(".md").write_text(table, "utf-8")
        found = {"machine": machine(), "flags": arguments.flags, "runs": [asdict(run) for run in measurements]}
        arguments.report.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")


def measure(command: Sequence[str], corpus: Path, temporary: Path) -> Measurement:
    """Run a command to its end; the peak of its memory is the kernel's own count, of this process alone."""
    start, largest = time.perf_counter(), 0
    process = subprocess.Popen(command)
    while True:
        done, status, usage = os.wait4(process.pid, os.WNOHANG)
        if done:
            break
        largest = max(largest, size_of(temporary))
        time.sleep(0.2)
    seconds = time.perf_counter() - start
    if status:
        sys.exit(f"{' '.join(command)}: failed")
    rows = pq.ParquetFile(corpus).metadata.num_rows
    return Measurement(
        trajectories=rows,
        input_mb=corpus.stat().st_size / 1e6,
        seconds=seconds,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        trajectories_per_second=rows / seconds,
        peak_mb=usage.ru_maxrss * 1024 / 1e6,
        temporary_mb=largest / 1e6,
    )


def size_of(directory: Path) -> int:
    """Bytes of all files below a directory that another process changes."""
    total = 0
    for parent, _, files in os.walk(directory):
        for file in files:
            try:
                total += os.stat(os.path.join(parent, file)).st_blocks * 512
            except FileNotFoundError:
                continue
    return total


def markdown(measurements: Sequence[Measurement]) -> str:
    """The measurements as a table."""
    lines = [
        "| trajectories | Parquet MB | seconds | CPU seconds | trajectories/s | peak memory MB | temporary files MB |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for run in measurements:
        numbers = (run.input_mb, run.seconds, run.cpu_seconds, run.trajectories_per_second, run.peak_mb)
        cells = " | ".join(f"{number:,.0f}" for number in (*numbers, run.temporary_mb))
        lines.append(f"| {run.trajectories:,} | {cells} |")
    return "\n".join([*lines, "", machine(), ""])


def machine() -> str:
    """Where this was measured."""
    return f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {platform.system()}"


def write_trajectories(path: Path, number: int, seed: int = 0) -> None:
    """Write a corpus of about `number` rows; the rows of a prompt lie far apart."""
    random = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = np.array(["".join(random.choice(letters, size)) for size in random.integers(2, 10, VOCABULARY)])
    # Every text is a slice of one long text, so that making it costs little; some words are more common.
    text = words[(VOCABULARY * random.random(LONG) ** 3).astype(int)].tolist()
    prompts = (number + 2) // 3
    first = random.integers(POLICIES, size=prompts)
    second = (first + random.integers(1, POLICIES, size=prompts)) % POLICIES
    rows = random.permutation(3 * prompts)
    writer = None
    for start in range(0, len(rows), CHUNK):
        prompt, role = np.divmod(rows[start : start + CHUNK], 3)
        policy = np.where(role < 2, first[prompt], second[prompt])
        sizes = np.clip(random.lognormal(4.0, 0.6, len(prompt)), 4, LONGEST).astype(int).tolist()
        begins = random.integers(0, LONG - LONGEST, len(prompt)).tolist()
        table = pa.table(
            {
                "prompt": [f"Question {p}: {' '.join(text[p % 1_000 : p % 1_000 + 12])}?" for p in prompt.tolist()],
                "policy": [f"policy-{p:03}" for p in policy.tolist()],
                "output": [" ".join(text[b : b + s]) for b, s in zip(begins, sizes, strict=True)],
                "family": [f"family-{p % FAMILIES:02}" for p in policy.tolist()],
                "step": pa.array([1000 * (p // FAMILIES + 1) for p in policy.tolist()], pa.int64()),
            }
        )
        writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
        writer.write_table(table)
    if writer:
        writer.close()


if __name__ == "__main__":
    main()
