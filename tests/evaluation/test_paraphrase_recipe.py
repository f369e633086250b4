"""Requests of the recipe go out, answers of any language model come back, and the perturbation reads them."""

import json
import subprocess
import sys
from pathlib import Path

from polar.evaluation.perturbations import read_paraphrases
from tests.evaluation.evaluating import write_rows

RECIPE = Path(__file__).parents[2] / "recipes" / "evaluation" / "paraphrases.py"


def test_paraphrases_come_back_with_their_texts(tmp_path: Path) -> None:
    rows = [
        {"prompt": "2+2?", "reference": "4", "chosen": "It is 4.", "rejected": "5"},
        {"prompt": "again?", "reference": "4", "chosen": "It is 4.", "rejected": "6"},
        {"prompt": "3+3?", "reference": "6", "chosen": [{"role": "assistant", "content": "六"}], "rejected": "7"},
    ]
    write_rows(tmp_path / "data.jsonl", rows)
    (tmp_path / "suite.yaml").write_text("datasets:\n  - {name: d, path: data.jsonl, task: preference accuracy}\n")
    asked, said, target = (str(tmp_path / name) for name in ("asked.jsonl", "said.jsonl", "paraphrases.jsonl"))
    run = [sys.executable, str(RECIPE)]
    subprocess.run([*run, "ask", str(tmp_path / "suite.yaml"), "d", str(tmp_path), asked], check=True)
    requests = [json.loads(line)["prompt"] for line in Path(asked).read_text("utf-8").splitlines()]
    assert len(requests) == 2  # each text once
    outputs = [{"prompt": text, "policy": "m", "output": f" other words {n}\n"} for n, text in enumerate(requests)]
    write_rows(Path(said), [*outputs, {"prompt": "something else", "policy": "m", "output": "x"}])
    subprocess.run([*run, "collect", said, target], check=True)
    assert read_paraphrases(target) == {"It is 4.": "other words 0", "六": "other words 1"}
