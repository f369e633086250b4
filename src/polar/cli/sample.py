"""`polar sample`: a pool of policies is sampled into a corpus."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from polar.cli.common import Inputs, OnBadRow, progress_bar

if TYPE_CHECKING:
    from polar.corpus.journal import Totals
    from polar.corpus.sample import SampleReport

MAX_REASONS_SHOWN = 3
"""Of a policy, in the table."""


def sample(
    inputs: Inputs,
    /,
    *,
    pool: str,
    output: str,
    design: Literal["paper", "grid"] = "paper",
    samples: int = 2,
    seed: int = 0,
    shard_prompts: int = 1000,
    ray: str | None = None,
    on_bad_row: OnBadRow = "error",
) -> None:
    """Sample a pool of policies: for every prompt some policies are drawn, and trajectories sampled from them.

    Prompts are rows {"prompt"}: a string or a list of chat messages, answered by chat policies; with "wrapper":
    "pretrain" a text that base policies continue (polar corpus prompts makes such prefixes). The output is a directory
    of Parquet files and a manifest, for polar corpus clean, polar corpus report and polar pair. Stopped at any moment,
    the same command goes on and ends with the corpus of an undisturbed run.

    The pool is a YAML file:

      policies:
        - name: qwen3-0.6b-base
          kind: base
          family: qwen3
          engine: {type: transformers, model: Qwen/Qwen3-0.6B-Base}
        - name: llama-3.1-8b-instruct
          kind: chat
          family: llama
          weight: 2
          decoding: {temperature: 1.0, top_p: 0.9, top_k: 50, max_tokens: 1024}
          engine: {type: http, base_url: "http://127.0.0.1:8000/v1", model: meta-llama/Llama-3.1-8B-Instruct,
                   api_key_env: LLAMA_KEY, concurrency: 64, deadline: 600}

    Engines: transformers and vllm (in this process), http (any OpenAI-compatible server). A key is only ever read from
    the environment variable that api_key_env names.

    Examples:
      polar sample prompts.jsonl --pool pool.yaml --output corpus
      polar sample prefixes.parquet instructions.jsonl --pool pool.yaml --output corpus --seed 1
      polar sample prompts.jsonl --pool pool.yaml --output grid --design grid --samples 4
      polar sample prompts.jsonl --pool pool.yaml --output corpus --ray auto

    Args:
        inputs: Files of prompts (JSONL, also .gz and .zst, or Parquet), or directories of such files.
        pool: YAML file with the policies.
        output: Directory for the corpus.
        design: "paper" draws two policies per prompt and samples the first twice, the second once; "grid" samples
            every policy that takes the prompt.
        samples: Samples per policy and prompt in the grid design.
        seed: Another seed is another corpus.
        shard_prompts: Prompts per Parquet file.
        ray: Sample on a Ray cluster: its address, "auto", or "local" for a new one on this machine.
        on_bad_row: "skip" leaves unreadable rows out and says how many.
    """
    from polar.corpus import sample as sampling
    from polar.corpus.journal import Totals
    from polar.data.readers import ReadReport

    read, console = ReadReport(), Console(stderr=True)
    with progress_bar(console) as progress:
        task = progress.add_task("sampling", total=None)
        spent = Totals()

        def begin(report: SampleReport) -> None:
            if transformers := sys.modules.get("transformers"):  # imported by now where a policy needs it
                transformers.utils.logging.disable_progress_bar()
            progress.reset(task, total=report.expected - report.found)

        def advance(totals: Totals) -> None:
            nonlocal spent
            spent += totals
            progress.update(task, advance=totals.samples)
            rate = progress.tasks[0].finished_speed or progress.tasks[0].speed or 0
            progress.update(task, description=f"sampling ({rate:,.1f}/s, {_tokens(spent)})")

        try:
            report = sampling.sample(
                inputs,
                pool,
                output,
                design=design,
                samples=samples,
                seed=seed,
                shard_prompts=shard_prompts,
                ray=ray,
                on_bad_row=on_bad_row,
                read=read,
                begin=begin,
                progress=advance,
            )
        except sampling.IncompleteError as error:
            progress.stop()
            console.print(_table(error.report))
            raise
    console.print(_table(report))
    if read.skipped:
        sys.stderr.write(f"skipped {read.skipped} unreadable rows\n")
    sys.stderr.write(f"wrote {report.manifest['totals']['samples']} samples to {output}\n")


def _tokens(totals: Totals) -> str:
    return f"{totals.prompt_tokens:,} tokens in, {totals.output_tokens:,} out"


def _table(report: SampleReport) -> Table:
    """Samples and tokens per policy, and how many samples failed for which reason."""
    from polar.corpus.journal import Totals

    table = Table("policy", box=None, pad_edge=False)
    for heading in ("samples", "tokens in", "tokens out"):
        table.add_column(heading, justify="right")
    table.add_column("failed")
    aside: dict[str, list[str]] = {}
    for (policy, reason), count in report.set_aside.most_common():
        aside.setdefault(policy, []).append(f"{count:,}: {reason}")
    per_policy = report.manifest["per_policy"]
    for name in sorted({*per_policy, *aside}):
        totals = Totals(**per_policy.get(name, {}))
        numbers = (totals.samples, totals.prompt_tokens, totals.output_tokens)
        reasons = aside.get(name, [])
        shown = reasons[:MAX_REASONS_SHOWN] + [f"and {len(reasons) - MAX_REASONS_SHOWN} more reasons"] * (
            len(reasons) > MAX_REASONS_SHOWN
        )
        table.add_row(Text(name), *(f"{number:,}" for number in numbers), Text("\n".join(shown)))
    return table
