"""The reward for TRL: called as TRL calls it, and by TRL's own trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_config import RLOOConfig
from trl.trainer.rloo_trainer import RLOOTrainer

from polar import Comparison, InputError, RewardError, RewardModel, Template
from polar.rft.trl import polar_reward
from tests.client.fakes import Fake, reward
from tests.client.test_faults import free_port
from tests.conftest import build_model
from tests.corpus.engines.tiny import save_policy

PROMPT, REFERENCE = "What is the capital of China?", "It is Beijing."
CHAT = [{"role": "user", "content": PROMPT}]


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def call(function: Any, prompts: list[Any], completions: list[Any], **columns: list[Any]) -> list[float]:
    more = {"trainer_state": None, "log_extra": None, "log_metric": None}
    return function(prompts=prompts, completions=completions, completion_ids=[[1]] * len(prompts), **columns, **more)


def alone(model: RewardModel, output: str, reference: Any = REFERENCE, prompt: Any = PROMPT) -> float:
    return model.score([Comparison(prompt, reference, output)])[0]


def test_rewards_are_those_of_the_comparisons_in_their_order(llama: RewardModel) -> None:
    outputs = ["Beijing.", "Shanghai.", "fox", "Beijing."]
    prompts = [PROMPT, PROMPT, "dog?", PROMPT]
    references = [REFERENCE, "red fox", "cat", REFERENCE]
    found = call(polar_reward(llama), prompts, outputs, reference=references)
    expected = [alone(llama, *one) for one in zip(outputs, references, prompts, strict=True)]
    assert found == pytest.approx(expected, abs=1e-4)


def test_completions_with_the_same_prompt_and_reference_share_their_prefix(
    llama: RewardModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    score = llama.score_groups

    def counted(groups: Any, **options: Any) -> Any:
        groups = list(groups)
        sizes.extend(len(group.candidates) for group in groups)
        return score(groups, **options)

    monkeypatch.setattr(llama, "score_groups", counted)
    call(polar_reward(llama), [PROMPT] * 4 + ["dog?"], list("abcde"), reference=[REFERENCE] * 5)
    assert sizes == [4, 1]


def test_chats_and_messages_are_scored_like_their_texts(llama: RewardModel) -> None:
    function = polar_reward(llama)
    texts = call(function, [PROMPT], ["Beijing."], reference=[REFERENCE])
    chats = call(function, [CHAT], [said("Beijing.")], reference=[said(REFERENCE)])
    assert chats == pytest.approx(texts, abs=1e-5)


def test_several_references_become_one_reward(llama: RewardModel) -> None:
    references = [REFERENCE, "Beijing"]
    each = [alone(llama, "Beijing.", reference) for reference in references]
    for column in ("reference", "references"):
        found = call(polar_reward(llama), [PROMPT], ["Beijing."], **{column: [references]})
        assert found == pytest.approx([max(each)], abs=1e-4)
    mean = call(polar_reward(llama, aggregate="mean"), [PROMPT], ["Beijing."], reference=[references])
    assert mean == pytest.approx([sum(each) / 2], abs=1e-4)


def test_thinking_reaches_no_reward(llama: RewardModel) -> None:
    function = polar_reward(llama)
    outputs = ["<think>so it is</think>Beijing.", "north</think> Beijing.", "<think>never closed"]
    found = call(function, [PROMPT] * 3, outputs, reference=["<think>hm</think>It is Beijing."] * 3)
    expected = [alone(llama, "Beijing."), alone(llama, "Beijing."), alone(llama, "")]
    assert found == pytest.approx(expected, abs=1e-4)
    (opened,) = call(function, ["Capital?\n<think>\n"], ["still thinking"], reference=[REFERENCE])
    assert opened == pytest.approx(alone(llama, "", prompt="Capital?\n<think>\n"), abs=1e-4)


def test_thinking_that_the_template_of_conversations_opens(
    llama: RewardModel, fake: Fake, served: Path, template: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, empty = alone(llama, "still thinking", prompt=PROMPT), alone(llama, "", prompt=PROMPT)

    def found(**settings: Any) -> Any:
        (value,) = call(polar_reward(**settings), [CHAT], [said("still thinking")], reference=[REFERENCE])
        return pytest.approx(value, abs=1e-4)

    assert found(model=llama) == raw
    assert found(model=llama, thinking="opened") == empty
    server = {"model": served, "server_address": fake.address}
    assert found(**server, thinking="opened") == reward(
        template.encode(Comparison(PROMPT, REFERENCE, "")).sequences()[0]
    )
    monkeypatch.setenv("POLAR_REWARD_THINKING", "opened")
    assert found(model=llama) == empty
    assert found(model=llama, thinking="strip") == raw
    with pytest.raises(InputError, match="reward setting thinking"):
        polar_reward(llama, thinking="open")  # type: ignore[arg-type]


CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "mul", "arguments": {"a": 2}}}]}


@pytest.mark.parametrize(
    ("turns", "output"),
    [
        ([CALL, {"role": "tool", "content": "4"}, *said("It is 4.")], "It is 4."),
        ([{**CALL, "content": None}, {"role": "tool", "content": "4"}, *said("It is 4.")], "It is 4."),
        ([*said("Let me see."), {**CALL, "content": ""}, *said("It is 4.")], "Let me see.\nIt is 4."),
        ([CALL], ""),
        (
            [{"role": "assistant", "content": [{"type": "text", "text": "It is"}, {"type": "text", "text": " 4."}]}],
            "It is 4.",
        ),
        ([], ""),
    ],
)
def test_what_the_assistant_says_in_a_conversation(llama: RewardModel, turns: list[Any], output: str) -> None:
    found = call(polar_reward(llama), [CHAT], [turns], reference=[REFERENCE])
    assert found == pytest.approx([alone(llama, output)], abs=1e-4)


def test_a_turn_that_is_no_text_is_named(llama: RewardModel) -> None:
    turns = [{"role": "assistant", "content": [{"type": "image", "image": "a.png"}]}]
    with pytest.raises(InputError, match=r'completion:1: field "output\[0\]\.content\[0\]\.type": expected "text"'):
        call(polar_reward(llama), [CHAT, CHAT], [said("4"), turns], reference=[REFERENCE] * 2)


@pytest.mark.parametrize("columns", [{}, {"reference": [None]}, {"reference": [""]}, {"reference": [["a", None]]}])
def test_a_row_without_a_reference_is_an_error(llama: RewardModel, columns: dict[str, list[Any]]) -> None:
    with pytest.raises(InputError, match="completion:0"):
        call(polar_reward(llama), [PROMPT], ["Beijing."], **columns)


def test_a_reward_that_is_not_finite_is_an_error(template: Template) -> None:
    broken = build_model("llama", template)
    torch.nn.init.constant_(broken.model.score.weight, float("nan"))
    with pytest.raises(FloatingPointError):
        call(polar_reward(broken), [PROMPT], ["Beijing."], reference=[REFERENCE])


def test_a_server_gives_the_rewards_of_its_model(fake: Fake, served: Path, template: Template) -> None:
    function = polar_reward(served, server_address=fake.address, deadline=5)
    outputs = ["Beijing.", "Shanghai."]
    found = call(function, [PROMPT] * 2, outputs, reference=[REFERENCE] * 2)
    inputs = [template.encode(Comparison(PROMPT, REFERENCE, output)).sequences()[0] for output in outputs]
    assert found == pytest.approx([reward(ids) for ids in inputs])


def test_a_server_that_is_gone_is_an_error(served: Path) -> None:
    function = polar_reward(served, server_address=f"127.0.0.1:{free_port()}", deadline=0.2)
    with pytest.raises(RewardError):
        call(function, [PROMPT], ["Beijing."], reference=[REFERENCE])


def test_settings_of_a_server_need_a_server(llama: RewardModel) -> None:
    with pytest.raises(InputError, match="deadline"):
        polar_reward(llama, deadline=5)
    with pytest.raises(InputError, match="server_address"):
        polar_reward(llama, server_address="127.0.0.1:1")


@pytest.mark.parametrize(("trainer", "options"), [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)])
def test_trainers_of_trl_learn_from_it(
    trainer: Any, options: Any, llama: RewardModel, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    directory = save_policy(tmp_path / "policy", tokenizer)
    rows = [
        {"prompt": CHAT, "reference": REFERENCE},
        {"prompt": [{"role": "user", "content": "dog?"}], "reference": "cat"},
    ]
    own = options(
        output_dir=str(tmp_path / "run"),
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=6,
        max_steps=1,
        learning_rate=1e-3,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    policy = AutoModelForCausalLM.from_pretrained(directory)
    before = policy.model.layers[0].mlp.up_proj.weight.detach().clone()
    running = trainer(
        model=policy,
        reward_funcs=polar_reward(llama),
        args=own,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(directory, padding_side="left"),
    )
    running.train()
    (logs,) = [entry for entry in running.state.log_history if "reward" in entry]
    assert logs["rewards/polar/mean"] == pytest.approx(logs["reward"])
    assert logs["reward"] != 0
    assert logs["reward_std"] > 0
    assert not torch.equal(before, policy.model.layers[0].mlp.up_proj.weight)
