"""The real verl: its own reward managers and workers call our functions, and its own config takes the recipes.

`make test-frameworks` makes an environment with it and runs these.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polar import Comparison, Message, RewardError, RewardModel
from polar.cli.main import main
from polar.core.checkpoint import BUNDLED
from polar.rft.prompts import BOXED
from tests.serving.serving import Process, serving

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not importlib.util.find_spec("verl"), reason="verl is not installed here: make test-frameworks"),
]

RECIPES = Path(__file__).parents[2] / "recipes" / "verl"
GIVEN = ("actor_rollout_ref.model.path=policy", "data.train_files=train.parquet")
ROWS = [
    (f"What is {a} plus {b}?", [f"It is {a + b}.", f"{a} plus {b} is {a + b}."], f"{thinking}It is {a + b + wrong}.")
    for a in range(3, 7)
    for b in range(5, 8)
    for wrong, thinking in ((0, ""), (1, ""), (0, "<think>hm</think>"))
]


@pytest.fixture(scope="module")
def server() -> Iterator[Process]:
    with serving() as process:
        yield process


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Of the policy."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_file=str(BUNDLED["polar-nano"] / "tokenizer.json"), pad_token="<|pad|>")


@pytest.fixture(scope="module")
def policy(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that verl can load the policy's tokenizer from."""
    directory = tmp_path_factory.mktemp("policy")
    tokenizer.save_pretrained(directory)
    shutil.copy(BUNDLED["polar-nano"] / "config.json", directory)
    return directory


@pytest.fixture(scope="module")
def expected() -> list[float]:
    """What the model of this process says: the best over the references, without thinking."""
    model = RewardModel.load("polar-nano", device="cpu")
    rewards = [
        model.score(
            [
                Comparison((Message("user", prompt),), reference, output.removeprefix("<think>hm</think>"))
                for reference in references
            ]
        )
        for prompt, references, output in ROWS
    ]
    return [max(each) for each in rewards]


def compose(name: str, *overrides: str) -> Any:
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(RECIPES), version_base=None):
        return compose(name, [*GIVEN, *overrides])


def config_for(address: str, *overrides: str) -> Any:
    """The recipe's config with the reward of a server."""
    kwargs = "reward.custom_reward_function.reward_kwargs"
    return compose("math", f"{kwargs}.address='{address}'", f"{kwargs}.deadline=20", *overrides)


def data_of(tokenizer: Any, rows: list[Any] = ROWS) -> Any:
    """The rows as verl has them after the rollout: responses are padded on the right."""
    import torch
    from verl import DataProto

    responses = [tokenizer.encode(output, add_special_tokens=False) for _, _, output in rows]
    width = max(map(len, responses))
    pad = tokenizer.pad_token_id
    lengths = torch.tensor([len(ids) for ids in responses])
    mask = (torch.arange(width)[None] < lengths[:, None]).long()
    return DataProto.from_dict(
        tensors={
            "prompts": torch.ones(len(rows), 4, dtype=torch.long),
            "responses": torch.tensor([ids + [pad] * (width - len(ids)) for ids in responses]),
            "attention_mask": torch.cat([torch.ones(len(rows), 4, dtype=torch.long), mask], 1),
        },
        non_tensors={
            "data_source": ["sums"] * len(rows),
            "reward_model": [{"style": "polar", "ground_truth": references[0]} for _, references, _ in rows],
            "extra_info": [
                {
                    "prompt": np.array([{"role": "user", "content": prompt}], dtype=object),
                    "references": np.array(references, dtype=object),
                    "index": number,
                }
                for number, (prompt, references, _) in enumerate(rows)
            ],
        },
    )


def run_naive(config: Any, tokenizer: Any, rows: list[Any] = ROWS) -> list[Any]:
    """What verl's naive reward manager makes of every row, all at a time, as its workers do."""
    from verl.experimental.reward_loop.reward_manager.naive import NaiveRewardManager
    from verl.trainer.ppo.reward import load_reward_manager

    async def run() -> list[Any]:
        manager = load_reward_manager(config, tokenizer)
        assert type(manager) is NaiveRewardManager
        assert manager.is_async_reward_score
        data = data_of(tokenizer, rows)
        calls = (manager.run_single(data[i : i + 1]) for i in range(len(data)))
        return await asyncio.gather(*calls, return_exceptions=True)

    return asyncio.run(run())


def test_the_naive_reward_manager_gives_the_rewards_of_the_local_model(
    server: Process, tokenizer: Any, expected: list[float]
) -> None:
    found = run_naive(config_for(server.url), tokenizer)
    assert [one["reward_score"] for one in found] == pytest.approx(expected, abs=1e-4)
    assert {tuple(one["reward_extra_info"]) for one in found} == {("score", "failed", "no_answer")}


def test_a_failure_is_an_exception_or_the_floor_with_the_same_keys(tokenizer: Any) -> None:
    kwargs = "reward.custom_reward_function.reward_kwargs"
    nobody = config_for("127.0.0.1:9", f"{kwargs}.model=polar-nano", f"{kwargs}.deadline=0.5")
    for error in run_naive(nobody, tokenizer, ROWS[:3]):
        assert isinstance(error, RewardError)
        assert "sums:" in str(error)
    nobody.reward.custom_reward_function.reward_kwargs.floor = -20
    found = run_naive(nobody, tokenizer, ROWS[:3])
    assert (
        found == [{"reward_score": -20.0, "reward_extra_info": {"score": -20.0, "failed": 1.0, "no_answer": 0.0}}] * 3
    )


def test_rewards_through_workers_on_ray(server: Process, tokenizer: Any, policy: Path, expected: list[float]) -> None:
    """The whole reward loop of the trainer: the actors, the fan-out, and the tensor of rewards per token."""
    import ray
    from verl.experimental.reward_loop import RewardLoopManager

    config = config_for(server.url, f"actor_rollout_ref.model.path={policy}", "reward.num_workers=2")
    # "local": never a cluster that somebody else has started on this machine.
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        data = data_of(tokenizer)
        found = RewardLoopManager(config).compute_rm_score(data)
    finally:
        ray.shutdown()
    lengths = data.batch["attention_mask"][:, 4:].sum(1)
    last = found.batch["rm_scores"][range(len(ROWS)), lengths - 1]
    assert last.tolist() == pytest.approx(expected, abs=1e-4)
    assert found.batch["rm_scores"].count_nonzero() == len(ROWS)
    assert found.meta_info["reward_extra_keys"] == ["score", "failed", "no_answer"]
    assert found.non_tensor_batch["failed"].tolist() == [0.0] * len(ROWS)


def test_the_batch_reward_manager_of_older_versions(server: Process, tokenizer: Any, expected: list[float]) -> None:
    """Its class is still there in 0.9, though the trainers do not use it any more."""
    from verl.workers.reward_manager.batch import BatchRewardManager

    from polar.rft.verl import compute_score_batch

    manager = BatchRewardManager(tokenizer, 0, compute_score_batch, address=server.url)
    data = data_of(tokenizer)
    found = manager(data, return_dict=True)
    lengths = data.batch["attention_mask"][:, 4:].sum(1)
    assert found["reward_tensor"][range(len(ROWS)), lengths - 1].tolist() == pytest.approx(expected, abs=1e-4)
    assert set(found["reward_extra_info"]) == {"score", "failed", "no_answer"}


def test_verl_reads_the_file_of_rft_data(server: Process, tokenizer: Any, tmp_path: Path) -> None:
    """From public rows to rewards: our file, verl's data set and collation, its reward manager."""
    import torch
    from verl import DataProto
    from verl.utils.dataset.rl_dataset import RLHFDataset, collate_fn

    rows = [
        {"problem": "How much is 1+1?", "solution": "It is $\\boxed{2}$."},
        {"prompt": [{"role": "user", "content": "2+2?"}], "references": ["It is 4.", "four"]},
        {"chosen": "\n\nHuman: 3+3?\n\nAssistant: 6"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    file = tmp_path / "train.parquet"
    assert main(["rft-data", str(tmp_path / "rows.jsonl"), "--output", str(file)]) == 0
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
    config = config_for(server.url, f"data.train_files={file}", "data.filter_overlong_prompts_workers=null")
    dataset = RLHFDataset(str(file), tokenizer, config.data)
    batch = collate_fn([dataset[number] for number in range(len(rows))])
    output = "It is 4."
    ids = tokenizer.encode(output, add_special_tokens=False)
    tensors = {"responses": torch.tensor([ids] * 3), "attention_mask": torch.ones(3, len(ids), dtype=torch.long)}
    others = {name: batch[name] for name in ("data_source", "reward_model", "extra_info")}
    data = DataProto.from_dict(tensors=tensors, non_tensors=others)

    from verl.trainer.ppo.reward import load_reward_manager

    async def run() -> list[Any]:
        manager = load_reward_manager(config, tokenizer)
        return await asyncio.gather(*(manager.run_single(data[i : i + 1]) for i in range(3)))

    model = RewardModel.load("polar-nano", device="cpu")
    prompts = [f"How much is 1+1? {BOXED}", "2+2?", "3+3?"]
    references = [["It is $\\boxed{2}$."], ["It is 4.", "four"], ["6"]]
    expected = [
        max(model.score([Comparison(prompt, reference, output) for reference in several]))
        for prompt, several in zip(prompts, references, strict=True)
    ]
    assert [one["reward_score"] for one in asyncio.run(run())] == pytest.approx(expected, abs=1e-4)


# The recipes


def leaves(config: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if isinstance(config, dict) and config:
        for name, value in config.items():
            yield from leaves(value, (*path, str(name)))
    else:
        yield path


def known(config: Any, path: tuple[str, ...]) -> bool:
    for name in path:
        if not isinstance(config, dict) or name not in config:
            return False
        config = config[name]
    return True


LEGACY = ("reward_model", "custom_reward_function", "sandbox_fusion")
"""Sections that verl's config has but its trainers do not read any more."""
SUPERSEDED = {("critic", "optim", "warmup_style"), ("actor_rollout_ref", "actor", "optim", "warmup_style")}
OURS = ("reward", "custom_reward_function", "reward_kwargs")


@pytest.mark.parametrize("file", sorted(RECIPES.rglob("*.yaml")), ids=lambda file: file.stem)
def test_every_key_of_a_recipe_is_one_that_verl_reads(file: Path) -> None:
    import yaml
    from hydra import compose, initialize_config_module
    from omegaconf import OmegaConf

    with initialize_config_module("verl.trainer.config", version_base=None):
        verls = OmegaConf.to_container(compose("ppo_trainer"), resolve=False)
    recipe = {
        name: value for name, value in yaml.safe_load(file.read_text()).items() if name not in ("hydra", "defaults")
    }
    assert recipe
    for path in leaves(recipe):
        assert path[0] not in LEGACY, f"{path} is not read any more"
        assert path not in SUPERSEDED, f"{path} has another name now"
        assert known(verls, path) or path[:3] == OURS, f"verl knows no {'.'.join(path)}"


def test_the_check_of_keys_would_see_those_of_older_versions() -> None:
    from hydra import compose, initialize_config_module
    from omegaconf import OmegaConf

    with initialize_config_module("verl.trainer.config", version_base=None):
        verls = OmegaConf.to_container(compose("ppo_trainer"), resolve=False)
    assert not known(verls, ("critic", "model", "fsdp_config", "param_offload"))
    assert known(verls, ("reward_model", "reward_manager"))  # known and not read: why LEGACY is there
    assert known(verls, ("critic", "optim", "lr_scheduler_type"))


@pytest.mark.parametrize("by", ["ppo", "grpo"])
@pytest.mark.parametrize("name", ["hh-rlhf", "general", "math"])
def test_a_recipe_is_a_config_that_verl_accepts(name: str, by: str, policy: Path) -> None:
    from omegaconf import OmegaConf
    from verl.trainer.ppo.reward import get_custom_reward_fn
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import omega_conf_to_dataclass, validate_config

    config = compose(name, f"by={by}", f"actor_rollout_ref.model.path={policy}")
    OmegaConf.resolve(config)
    assert not need_reference_policy(config)  # no KL term anywhere
    assert need_critic(config) == (by == "ppo")
    validate_config(config, use_reference_policy=False, use_critic=by == "ppo")
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    assert (actor.clip_ratio, actor.optim.lr, actor.optim.lr_warmup_steps_ratio) == (0.2, 1e-6, 0.03)
    assert (actor.use_kl_loss, config.algorithm.use_kl_in_reward) == (False, False)
    assert actor.ppo_mini_batch_size == config.data.train_batch_size
    omega_conf_to_dataclass(config.algorithm)
    assert config.data.train_batch_size * config.actor_rollout_ref.rollout.n == (
        512 if (name, by) == ("hh-rlhf", "ppo") else 1024
    )
    if by == "ppo":
        assert (config.algorithm.adv_estimator, config.algorithm.gamma, config.algorithm.lam) == ("gae", 1.0, 1.0)
        optim = config.critic.optim
        assert (optim.lr, optim.lr_scheduler_type, optim.min_lr_ratio) == (1e-5, "cosine", 0.1)
    function = get_custom_reward_fn(config)
    assert function is not None
    assert function.args[0].__module__ == "polar.rft.verl"
