"""Small language models for the recipe: the policy that is fine-tuned, and a pool of others with errors of their own.

    python recipes/rft/policies.py WORK --seed 0

writes to WORK:

- `start`: the policy that reinforcement fine-tuning begins with; it knows the right rule and several wrong ones
- `pool/` and `pool.yaml`: policies that mostly follow one rule, each with wordings of its own (`polar sample`)
- `prompts.jsonl` (what the pool is asked), `rft.jsonl`, `held-out.jsonl`: prompts with a reference in words and the
  answer in digits

No hub is needed: the models are trained from scratch in about three minutes of one CPU core. With models of
yours, leave this step out: name the pool in pool.yaml, and put the policy to `start`.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random

import torch
import yaml
from problems import RULES, WORDINGS, Problem, Speaker, draw_problem, in_words, say
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from polar.training.init_model import BOS, PAD, train_tokenizer

END = "<|reward|>"  # of the four special tokens of the package's tokenizers, the one that ends an output here
CHAT = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


def speakers(seed: int) -> dict[str, Speaker]:
    """The start policy and the pool, by name. Rules are mixed, and every policy has wordings that it prefers."""
    random = Random(f"speakers {seed}")
    wrong = [rule for rule in RULES if rule != "right"]
    found = {"start": Speaker({"right": 0.4, **dict.fromkeys(wrong, 0.15)})}
    for name in ("right-a", "right-b", *wrong):
        own = name.removesuffix("-a").removesuffix("-b")
        rules = {rule: 0.9 if rule == own else 0.025 for rule in RULES}
        found[name] = Speaker(rules, [random.random() + 0.1 for _ in WORDINGS], random.uniform(0.3, 0.7))
    return found


def language_model(seed: int) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A network of 0.3 million parameters with random weights, and its tokenizer."""
    random = Random(0)
    problems = [draw_problem(random, held_out=False) for _ in range(3000)]
    everything = Speaker(dict.fromkeys(RULES, 1.0), digits=0.5)
    numbers = [f" {in_words(number)}" for number in range(60)] * 100
    texts = (text for problem in problems for text in (problem.text + "\n", everything.answer(problem, random)))
    backend = train_tokenizer([*texts, *numbers], vocab_size=420)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(backend.to_str()), pad_token=PAD, bos_token=BOS, eos_token=END
    )
    tokenizer.chat_template = "{{ bos_token }}" + CHAT
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=288,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config), tokenizer


def train(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, speaker: Speaker, steps: int, rate: float, seed: int
) -> None:
    """Supervised training on answers of a speaker, fresh ones in every step, with a loss on the answers alone."""
    random = Random(f"train {seed}")
    optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.98), weight_decay=0.01)
    model.train()
    for step in range(steps):
        decayed = 0.05 + 0.95 * math.cos(math.pi / 2 * step / steps)
        optimizer.param_groups[0]["lr"] = rate * min((step + 1) / 50, decayed)
        problems = [draw_problem(random, held_out=False) for _ in range(64)]
        rows = [_example(tokenizer, problem, speaker.answer(problem, random)) for problem in problems]
        width = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows])
        labels = torch.tensor([[-100] * start + ids[start:] + [-100] * (width - len(ids)) for ids, start in rows])
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def _example(tokenizer: PreTrainedTokenizerFast, problem: Problem, answer: str) -> tuple[list[int], int]:
    """Token ids of prompt and answer, and where the answer begins. Padding may follow: attention is causal."""
    backend = tokenizer.backend_tokenizer
    prompt = backend.encode(problem.text + "\n").ids  # begins with BOS
    output = backend.encode(answer, add_special_tokens=False).ids
    return [*prompt, *output, int(tokenizer.eos_token_id)], len(prompt)


def with_reference(problems: Iterable[Problem], random: Random) -> Iterator[dict[str, str]]:
    """Rows for the fine-tuning: the reference says the answer in words, the verifier reads digits."""
    for problem in problems:
        reference = say(problem, problem.answer, random.choice(WORDINGS), digits=False)
        yield {"prompt": problem.text, "reference": reference, "answer": str(problem.answer)}


def write_rows(path: Path, rows: Iterable[dict[str, str]]) -> None:
    """A JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def make(work: Path, seed: int, *, steps: int = 1200, prompts: int = 3000) -> None:
    """Train all policies and draw all prompts; see the top of this file."""
    model, tokenizer = language_model(seed)
    everybody = speakers(seed)
    train(model, tokenizer, Speaker({"right": 1.0}, digits=0.7), steps, 3e-3, seed)  # what all of them have learned
    for number, (name, speaker) in enumerate(everybody.items()):
        policy = copy.deepcopy(model)
        share = 3 if name == "start" else 6
        train(policy, tokenizer, speaker, steps // share, 2e-3, 100 * seed + number)
        directory = work / ("start" if name == "start" else f"pool/{name}")
        policy.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    pool = [
        {
            "name": name,
            "kind": "chat",
            "decoding": {"temperature": 1.0, "top_p": 1.0, "top_k": None, "max_tokens": 14},
            "engine": {"type": "transformers", "model": str(work / "pool" / name), "batch_size": 256},
        }
        for name in everybody
        if name != "start"
    ]
    (work / "pool.yaml").write_text(yaml.safe_dump({"policies": pool}, sort_keys=False), "utf-8")
    random = Random(f"prompts {seed}")
    for file, count, held_out in (
        ("prompts.jsonl", prompts, False),
        ("rft.jsonl", 4096, False),
        ("held-out.jsonl", 512, True),
    ):
        problems = [draw_problem(random, held_out=held_out) for _ in range(count)]
        write_rows(work / file, with_reference(problems, random))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    make(options.work, options.seed)
