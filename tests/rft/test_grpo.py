"""`polar rft`: from files to figures, a plot and a policy; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from polar import Comparison, InputError, RewardError, Template
from polar.cli.main import main
from polar.rft import grpo
from polar.rft.config import RftConfig
from polar.rft.curves import read_figures
from polar.rft.guard import Measurement
from polar.rft.named_rewards import named_reward, verifier
from tests.client.fakes import Fake
from tests.client.fakes import reward as server_reward
from tests.corpus.engines.tiny import save_policy

ROWS = [
    {"prompt": "1 2 3", "reference": "four", "answer": "4"},
    {"prompt": "dog", "references": ["cat", "fox"], "answer": "7"},
]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


@pytest.fixture
def words(tokenizer: Tokenizer, tmp_path: Path) -> list[str]:
    """A command that takes a second."""
    rows = write(tmp_path / "rows.jsonl", ROWS)
    policy = save_policy(tmp_path / "policy", tokenizer)
    size = ["--prompts", "2", "--generations", "2", "--max-completion-length", "5", "--max-steps", "2"]
    files = ["--model", str(policy), "--data", rows, "--eval-data", rows, "--output", str(tmp_path / "run")]
    return ["rft", *files, *size, "--eval-steps", "1", "--learning-rate", "1e-2"]


def changed(words: list[str], *more: str) -> list[str]:
    """The command with other values of some flags, which may be given once only."""
    for flag in (word for word in more if word.startswith("--") and word in words):
        position = words.index(flag)
        words = words[:position] + words[position + 2 :]
    return [*words, *more]


def test_a_run_leaves_figures_a_plot_and_policies(words: list[str], checkpoint: Path, tmp_path: Path) -> None:
    assert main([*words, "--reward", str(checkpoint)]) == 0
    run = tmp_path / "run"
    steps, held_out = read_figures(run / "steps.jsonl"), read_figures(run / "held-out.jsonl")
    assert [row["step"] for row in steps] == [1, 2]
    assert {"reward", "accuracy", "kl", "length"} <= steps[0].keys()
    assert [row["step"] for row in held_out] == [0, 1, 2]
    assert held_out[0]["reward"] != held_out[-1]["reward"]
    assert (run / "curves.svg").stat().st_size > 1000
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    AutoModelForCausalLM.from_pretrained(run / "last")
    AutoModelForCausalLM.from_pretrained(run / "best")
    assert main(["rft", "--config", str(run / "config.yaml"), "--output", str(tmp_path / "again")]) == 0
    assert read_figures(tmp_path / "again" / "held-out.jsonl") == held_out  # the saved settings are the whole run


def test_the_verdict_does_not_touch_the_training(words: list[str], checkpoint: Path, tmp_path: Path) -> None:
    with_truth, without = tmp_path / "with", tmp_path / "without"
    blank = write(tmp_path / "blank.jsonl", [{k: v for k, v in row.items() if k != "answer"} for row in ROWS])
    reward = ["--reward", str(checkpoint)]
    assert main(changed(words, *reward, "--output", str(with_truth))) == 0
    assert main(changed(words, *reward, "--data", blank, "--eval-data", blank, "--output", str(without))) == 0
    rewards = [[row["reward"] for row in read_figures(run / "held-out.jsonl")] for run in (with_truth, without)]
    assert rewards[0] == rewards[1]
    assert read_figures(without / "held-out.jsonl")[0]["accuracy"] is None


def test_the_guard_ends_a_run_and_the_best_policy_stays(
    words: list[str], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hacked(self: Any, model: Any, step: int) -> Measurement:
        return Measurement(step, float(step), 1.0, 0.9 - 0.1 * step, None, None, 5.0, 2)

    monkeypatch.setattr(grpo.Examiner, "measure", hacked)
    guard = ["--guard", "--guard-window", "4", "--max-steps", "9"]
    assert main(changed(words, "--reward", str(checkpoint), *guard)) == 0
    assert [row["step"] for row in read_figures(tmp_path / "run" / "held-out.jsonl")] == [0, 1, 2, 3]
    best = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "best").state_dict()
    start = AutoModelForCausalLM.from_pretrained(tmp_path / "policy").state_dict()
    assert all(best[name].equal(start[name]) for name in start)  # the accuracy was highest before the training


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--reward", "/no/such/place"], "/no/such/place"),
        (["--model", "/no/such/policy"], "/no/such/policy"),
        (["--data", "none.jsonl"], "none.jsonl"),
        (["--generations", "1"], "generations must be at least 2"),
        (["--guard-window", "3"], "even number"),
        (["--answer-pattern", "("], "answer_pattern"),
        (["--prompts", "3", "--gradient-accumulation", "2"], "gradient_accumulation"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str], more: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(changed(words, *more)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("polar: error")]
    assert said in line


def test_rows_must_all_have_an_answer_or_none(tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", [ROWS[0], {"prompt": "p", "reference": "r"}])
    with pytest.raises(InputError, match="1 of 2 rows have no answer"):
        grpo.read_tasks([rows])


@pytest.mark.parametrize("more", [["--reward", "exact"], ["--guard"]])
def test_the_truth_is_asked_for_where_it_is_needed(words: list[str], more: list[str], tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", [{"prompt": "p", "reference": "r"}])
    assert main([*words, *more]) == 2


def test_a_reward_that_cannot_be_had_ends_the_run_and_the_policy_stays(
    words: list[str], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(config: RftConfig, thinking: str) -> Any:
        calls = iter(range(9))

        def reward(prompts: list[str], **batch: Any) -> list[float]:
            if next(calls) == 3:
                raise RewardError([None], {0: "the server is gone"})
            return [float(number) for number, _ in enumerate(prompts)]

        return reward

    monkeypatch.setattr(grpo, "named_reward", failing)
    assert main(words) == 2
    assert len(read_figures(tmp_path / "run" / "steps.jsonl")) == 1
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "last")


def test_an_output_directory_must_be_new(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert main([*words, "--reward", "exact"]) == 2
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("output", ["file", "file/below"])
def test_an_output_that_cannot_be_written_is_one_line(
    output: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    assert main(changed(words, "--reward", "exact", "--output", str(tmp_path / output))) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("polar: error: ")]
    assert str(tmp_path / output) in line


@pytest.mark.parametrize(
    ("output", "verdict"),
    [("It is 4.", 1), ("First 3, then 4", 1), ("4 or 5", 0), ("four", 0), ("", 0), ("<think>4</think>5", 0)],
)
def test_the_verifier_reads_the_last_number_of_the_answer(output: str, verdict: int) -> None:
    assert verifier(r"-?\d+")(completions=[output], answer=["4"]) == [verdict]


def test_the_chat_template_tells_whether_it_opens_the_thinking(tokenizer: Tokenizer) -> None:
    policy = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert not grpo.template_opens_thinking(policy)
    turns = "{% for message in messages %}{{ message.content }}{% endfor %}"
    policy.chat_template = turns
    assert not grpo.template_opens_thinking(policy)
    policy.chat_template = turns + "{% if add_generation_prompt %}{{ '<think>\n' }}{% endif %}"
    assert grpo.template_opens_thinking(policy)


def test_an_unfinished_thought_is_no_answer_where_the_template_opens_it() -> None:
    assert verifier(r"-?\d+", "opened")(completions=["so 4", "so 3</think>4"], answer=["4", "4"]) == [0, 1]
    rouge = named_reward(RftConfig(model="", data=["-"], output="", reward="rouge-l"), "opened")
    assert rouge(prompts=["p", "p"], completions=["a fox", "hm</think>a fox"], references=["a fox"] * 2) == [0, 1]


def test_a_group_of_the_pattern_is_the_answer() -> None:
    boxed = verifier(r"boxed\{(\d+)\}")
    assert boxed(completions=["boxed{4} of 9"], answer=["4"]) == [1]


def test_an_address_is_a_server(fake: Fake, served: Path, template: Template) -> None:
    config = RftConfig(model="", data=["-"], output="", reward=fake.address, served_checkpoint=str(served))
    found = named_reward(config)(prompts=["p"], completions=["a fox"], references=[["a dog"]])
    (ids,) = template.encode(Comparison("p", "a dog", "a fox")).sequences()
    assert found == pytest.approx([server_reward(ids)])


def test_rouge_l_takes_the_closest_reference() -> None:
    reward = named_reward(RftConfig(model="", data=["-"], output="", reward="rouge-l"))
    found = reward(prompts=["p", "p"], completions=["a red fox", "a dog"], references=[["a dog", "a fox"]] * 2)
    assert found == pytest.approx([0.8, 1.0])
