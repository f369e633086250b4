"""The probes of a checkpoint: three inputs with their float32 rewards.

By them clients recognise a server whose rewards differ from the checkpoint's (`polar.client.probe`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor
from torch.nn.functional import embedding, linear
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from polar.core.checkpoint import CHECKPOINT_FILE, Probe, find_shards, read_checkpoint_file
from polar.core.errors import reason
from polar.core.files import write_json
from polar.core.records import Comparison
from polar.core.template import EncodedGroup, Template
from polar.model.backbone import prepare
from polar.model.tree import rewards, tree_batch

log = logging.getLogger(__name__)

COMPARISONS = (
    Comparison(
        "What is the capital of France, and on which river does it lie?",
        "The capital of France is Paris. It lies on the Seine.",
        "I would rather go for a walk in the park today.",
    ),
    Comparison(
        "水在标准大气压下多少摄氏度沸腾？",
        "在标准大气压下，水在 100 摄氏度时沸腾。",
        "在标准大气压下，水在 100 摄氏度时沸腾。",
    ),
    Comparison("2 + 2 =", "4", "2 + 2 = 5"),
)
"""An answer to something else and a copy of the reference, so that the rewards of a trained model lie far apart. The
third one is there because two of them may be moved by the same amount by chance."""


def write_probes(directory: Path) -> None:
    """Put probes into the `polar.json` of a checkpoint that is complete otherwise.

    They are made of its files, and so of what servers will load: a forward pass over a few hundred tokens, on the CPU.
    Its arithmetic is float32 whatever the dtype of the weights, and little more than one layer is in memory. A model
    that cannot be run this way gets no probes, and a warning.

    Raises:
        InputError: there is no checkpoint, or it cannot be written.
        OSError: it cannot be read.
    """
    content = read_checkpoint_file(directory)
    template = Template.load(directory)
    try:
        content["probes"] = _probes(_load(directory), template)
    except (RuntimeError, TypeError, ValueError, KeyError) as error:  # the checkpoint matters more
        log.warning("%s: the checkpoint gets no probes: %s", directory.name, reason(error))
        content["probes"] = []
    write_json(directory / CHECKPOINT_FILE, content)


def _probes(model: PreTrainedModel, template: Template) -> list[dict[str, Any]]:
    inputs = [template.encode(comparison).sequences()[0] for comparison in COMPARISONS]
    bos = template.settings.bos_token_id
    if bos is None:
        bos = model.config.bos_token_id
    variants = [[ids, ids[:-1], *([] if bos is None else [[bos, *ids]])] for ids in inputs]
    values = iter(_rewards(model, [ids for group in variants for ids in group]))
    probes = []
    for ids, group in zip(inputs, variants, strict=True):
        reward, without_score_token, *with_bos = [next(values) for _ in group]
        probe = Probe(ids, _text(template, ids), reward, without_score_token, with_bos[0] if with_bos else None)
        if not all(map(math.isfinite, (reward, without_score_token, *with_bos))):
            raise ValueError(f"a reward is {reward}")
        probes.append(asdict(probe))
    return probes


def _load(directory: Path) -> PreTrainedModel:
    """The model with its weights as maps of their files, so that they take no memory."""
    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager")
    weights: dict[str, Tensor] = {}
    for shard in find_shards(directory):
        with safe_open(shard, framework="pt") as file:
            weights |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    weights.pop("score.bias", None)  # zero, and only there for SGLang (`RewardModel.save`)
    model.load_state_dict(weights, assign=True)
    prepare(model)
    return model.eval()  # type: ignore[no-any-return]


@torch.inference_mode()
def _rewards(model: PreTrainedModel, sequences: list[list[int]]) -> list[float]:
    with _Float32():
        values: list[float] = rewards(model, tree_batch([EncodedGroup([], [ids], []) for ids in sequences])).tolist()
    return values


class _Float32(TorchFunctionMode):
    """Embeddings and linear layers compute in float32, whatever their weights; the rest follows from their results."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is embedding:
            return function(*args, **kwargs).float()
        if function is linear:
            args = tuple(value.float() if isinstance(value, Tensor) else value for value in args)
        return function(*args, **kwargs)


def _text(template: Template, ids: list[int]) -> str:
    """The text that a server's tokenizer turns into these ids."""
    tokenizer, settings = template.tokenizer, template.settings
    text: str = tokenizer.decode(ids if settings.bos_token_id is None else ids[1:], skip_special_tokens=False)
    if tokenizer.encode(text).ids != ids:
        log.warning(
            "the tokenizer does not turn the text of an input into its ids (it may add other special tokens than in "
            "training): servers must be sent token ids, as the clients of this package do"
        )
    return text
