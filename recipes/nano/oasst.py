"""Turn a clone of Open-Assistant/oasst-model-eval into trajectories for `polar pair`.

    git clone https://github.com/Open-Assistant/oasst-model-eval
    git -C oasst-model-eval checkout ce935dee6922
    python recipes/nano/oasst.py oasst-model-eval trajectories.parquet

Every report is one model under one prompting mode, with several samples per prompt. A model that was sampled under
several modes counts as several policies. Samples are taken, beam search and typical sampling are not (they would be
other policies); trailing special tokens are stripped, outputs are cut at 8,000 characters, empty and repeated ones are
left out.
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from polar.core.errors import InputError
from polar.data.writers import open_writer

SPECIAL = re.compile(r"(\s*(<\|[a-z_]+\|>|</s>|<s>|<pad>|<unk>))+\s*$")
MAX_CHARACTERS = 8000
CONFIGS = {"k50", "nucleus9", "greedy", "sample", "humor_0.1", "humor_0.9", "quality_0.1_humor_0.9"}


def main(clone: str, target: str) -> None:
    """Read all reports of a clone and write one row per output."""
    reports = list(read_reports(Path(clone) / "sampling_reports"))
    modes = defaultdict(set)
    for model, mode, _ in reports:
        modes[model].add(mode)
    seen: set[tuple[str, str, str]] = set()
    with open_writer(target) as writer:
        for model, mode, report in reports:
            policy = f"{model}#{mode}" if len(modes[model]) > 1 else model
            for prompt, output, decoding in outputs_of(report):
                if output and (policy, prompt, output) not in seen:
                    seen.add((policy, prompt, output))
                    messages = [{"role": "user", "content": prompt}]
                    writer.write({"prompt": messages, "policy": policy, "output": output, "decoding": decoding})
    print(f"wrote {len(seen)} trajectories of {len({policy for policy, _, _ in seen})} policies to {target}")


def read_reports(directory: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Model, prompting mode and content of every report."""
    paths = sorted([*directory.rglob("*.json"), *directory.rglob("*.jsonl")])
    if not paths:
        raise InputError(f"{directory}: no reports; expected a clone of Open-Assistant/oasst-model-eval")
    for path in paths:
        report = json.loads(path.read_text("utf-8"))
        arguments = report.get("args") or {}
        mode = f"{arguments.get('mode')}-{Path(str(arguments.get('config'))).stem}"
        yield report["model_name"].rstrip("/").split("/")[-1], mode, report


def outputs_of(report: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Prompt, cleaned output and sampling parameters of every sample."""
    for entry in report["prompts"]:
        for result in entry["results"]:
            for output in result["outputs"] if result["sampling_config"] in CONFIGS else ():
                yield entry["prompt"], SPECIAL.sub("", output)[:MAX_CHARACTERS], result.get("sampling_params") or {}


if __name__ == "__main__":
    main(*sys.argv[1:])
