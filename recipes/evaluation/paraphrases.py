"""Paraphrases of the best answers of a data set by a language model, for the perturbation "paraphrase".

    python recipes/evaluation/paraphrases.py ask suite.yaml alpaca-eval WORK WORK/asked.jsonl
    polar sample WORK/asked.jsonl --pool pool.yaml --design grid --output WORK/said
    python recipes/evaluation/paraphrases.py collect WORK/said WORK/paraphrases.jsonl

The pool names the model and where it runs: any OpenAI-compatible endpoint, vLLM, or this process (docs/corpus.md); the
best one that you have, because a paraphrase that says something else is worthless: read some. The suite:

    perturbations: [paraphrase]
    paraphrases: paraphrases.jsonl
"""

from __future__ import annotations

import sys

from polar.core.errors import InputError
from polar.core.records import text_of
from polar.data.readers import ReadReport, read_trajectories
from polar.data.writers import open_writer
from polar.evaluation.datasets import read_items
from polar.evaluation.suites import read_suite

REQUEST = (
    "Say the following text in other words, in the same language and in as much detail. Keep every fact, number, name "
    "and formula, add nothing, and leave nothing out. Answer with the new text alone.\n\n"
)


def ask(suite: str, dataset: str, data: str, target: str) -> None:
    """Write a request for the best answer of every item, each text once."""
    chosen = [one for one in read_suite(suite, data).datasets if one.name == dataset]
    if not chosen:
        raise InputError(f"{suite}: no data set {dataset!r}")
    texts: dict[str, None] = {}
    for item in read_items(chosen[0], "skip", ReadReport()):
        best = max(range(len(item.quality)), key=item.quality.__getitem__)
        texts[text_of(item.group.candidates[best])] = None
    with open_writer(target) as writer:
        for text in texts:
            writer.write({"prompt": REQUEST + text})


def collect(corpus: str, target: str) -> None:
    """Turn what was sampled into rows of text and paraphrase."""
    with open_writer(target) as writer:
        for sample in read_trajectories(corpus):
            text = text_of(sample.prompt)
            if text.startswith(REQUEST) and text_of(sample.output).strip():
                row = {"text": text.removeprefix(REQUEST), "paraphrase": text_of(sample.output).strip()}
                writer.write({**row, "policy": sample.policy})


if __name__ == "__main__":
    if sys.argv[1] == "ask":
        ask(*sys.argv[2:])
    else:
        collect(*sys.argv[2:])
