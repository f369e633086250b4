"""Tiny models and tokenizers: random weights, real architectures, built in a second."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForSequenceClassification,
    Qwen3Config,
    Qwen3ForSequenceClassification,
)

from polar import RewardModel, Template, TemplateSettings
from polar.training.init_model import BOS, PAD, SCORE, SPLIT, train_tokenizer

for command in ("SCORE", "RANK", "EVAL", "PARITY", "SERVE"):  # where the model does not matter, the smallest is taken
    os.environ[f"POLAR_{command}_MODEL"] = "polar-nano"

torch.set_num_threads(1)  # tiny matrices: threads only wait for each other

SENTENCES = [
    "The reward model reads the reference and the candidate, then it gives a score.",
    "What is the capital of China? It is Beijing.\n\nNot Shanghai.",
    "奖励模型读取参考答案和候选答案，然后给出一个分数。",
    "def add(a, b):\n    return a + b\n",
    "😀 emoji and 中文 mixed with English; numbers 1 2 3 4 5 6 7 8 9 0.",
]

ARCHITECTURES = {
    "llama": (LlamaConfig, LlamaForSequenceClassification),
    "qwen2": (Qwen2Config, Qwen2ForSequenceClassification),
    "qwen3": (Qwen3Config, Qwen3ForSequenceClassification),
}


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """The commands set up the logger of the package; tests that run them in this process must not leave that behind."""
    logger = logging.getLogger("polar")
    handlers, level, propagate = logger.handlers, logger.level, logger.propagate
    yield
    logger.handlers, logger.propagate = handlers, propagate
    logger.setLevel(level)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer(SENTENCES, vocab_size=512)


@pytest.fixture(scope="session")
def settings(tokenizer: Tokenizer) -> TemplateSettings:
    return TemplateSettings(
        split_token_id=tokenizer.token_to_id(SPLIT),
        score_token_id=tokenizer.token_to_id(SCORE),
        bos_token_id=tokenizer.token_to_id(BOS),
        max_length=512,
        max_response_length=128,
    )


@pytest.fixture(scope="session")
def template(tokenizer: Tokenizer, settings: TemplateSettings) -> Template:
    return Template(tokenizer, settings)


def build_model(architecture: str, template: Template, seed: int = 0) -> RewardModel:
    """A random reward model of 2 layers whose rewards spread over several units."""
    config_class, model_class = ARCHITECTURES[architecture]
    torch.manual_seed(seed)
    config = config_class(
        vocab_size=template.tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=1024,
        pad_token_id=template.tokenizer.token_to_id(PAD),
        bos_token_id=template.tokenizer.token_to_id(BOS),
        eos_token_id=None,
        num_labels=1,
        initializer_range=0.3,
        attn_implementation="sdpa",
    )
    model = model_class(config).eval()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=template.tokenizer, bos_token=BOS, pad_token=PAD)
    return RewardModel(model, wrapped, template)


@pytest.fixture(scope="session", params=list(ARCHITECTURES))
def reward_model(request: pytest.FixtureRequest, template: Template) -> RewardModel:
    """The same tests on every supported backbone."""
    return build_model(request.param, template)


@pytest.fixture(scope="session")
def llama(template: Template) -> RewardModel:
    return build_model("llama", template)


@pytest.fixture(scope="session")
def saved_llama(llama: RewardModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved reward model, which no test may change."""
    directory = tmp_path_factory.mktemp("saved") / "checkpoint"
    llama.save(directory)
    return directory


@pytest.fixture
def checkpoint(saved_llama: Path, tmp_path: Path) -> Path:
    """A saved reward model of the test's own."""
    return shutil.copytree(saved_llama, tmp_path / "checkpoint")
