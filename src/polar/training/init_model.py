"""Reward models to start from: a language model with a new head, a network from scratch, and adapters (LoRA)."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from polar.core.checkpoint import checkpoint_directory
from polar.core.errors import InputError, reason
from polar.core.template import Template, TemplateSettings
from polar.model.reward_model import RewardModel
from polar.model.weights import load_weights
from polar.training.config import LoraSettings, ScratchConfig

log = logging.getLogger(__name__)

PAD, BOS, SPLIT, SCORE = "<pad>", "<s>", "<|reward|>", "<|score|>"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Return a byte-level BPE tokenizer with our four special tokens, trained on texts; it puts `<s>` first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, SPLIT, SCORE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def fitting_lengths(
    asked: tuple[int | None, int | None], usual: tuple[int, int], positions: int | None
) -> tuple[int, int]:
    """Return the longest input and response in tokens: as asked, else the usual, else as far as there is room.

    Args:
        asked: max_length and max_response_length as the user set them.
        usual: Both, where they are not set and fit.
        positions: How long an input of the model can be, as far as that is limited.

    Raises:
        InputError: the model is not made for inputs as long as asked.
    """
    max_length, max_response_length = asked
    if max_length is not None and positions is not None and max_length > positions:
        raise InputError(f"max_length is {max_length}, but the model has {positions} positions; set at most that many")
    if max_length is None:
        max_length = usual[0] if positions is None else min(usual[0], positions)
    if max_response_length is None:
        fits = 2 * usual[1] + 3 <= max_length  # reference and candidate, with the special tokens
        max_response_length = usual[1] if fits else max(1, max_length // 4)
    if (max_length, max_response_length) != (asked[0] or usual[0], asked[1] or usual[1]):
        log.info(
            "max_length %d, max_response_length %d: the usual %d and %d have no room; set them to change that",
            *(max_length, max_response_length, *usual),
        )
    return max_length, max_response_length


def from_scratch(
    tokenizer: Tokenizer, config: ScratchConfig, *, max_length: int | None, max_response_length: int | None, seed: int
) -> RewardModel:
    """Return a small Llama reward model with weights that let attention find equal tokens (`_match_equal_tokens`).

    Its lengths are those of `fitting_lengths`.
    """
    if config.hidden_size % config.num_heads or (config.hidden_size // config.num_heads) % 4:
        raise InputError(
            f"scratch: hidden_size {config.hidden_size} must be num_heads ({config.num_heads}) times a multiple of 4"
        )
    pad, bos, split, score = (_token_id(tokenizer, token) for token in (PAD, BOS, SPLIT, SCORE))
    torch.manual_seed(seed)
    model = LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_heads,
            max_position_embeddings=config.max_positions,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            pad_token_id=pad,
            bos_token_id=bos,
            eos_token_id=score,  # trainers that append an end token (TRL) then append the right one
            tie_word_embeddings=False,
            num_labels=1,  # type: ignore[call-arg]  # taken by the base class
        )
    )
    _match_equal_tokens(model)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=SCORE, pad_token=PAD, padding_side="right"
    )
    lengths = fitting_lengths((max_length, max_response_length), (config.max_positions, 1024), config.max_positions)
    settings = TemplateSettings(split, score, bos, *lengths)
    return RewardModel(model, wrapped, Template(tokenizer, settings))


@torch.no_grad()
def _match_equal_tokens(model: Any) -> None:
    """Start query and key projections equal, so that a token attends to its equals elsewhere in the input.

    After "Mimetic initialization of self-attention layers" (Trockman and Kolter 2023, arXiv 2305.09828), with one
    thing added: only the slowly rotating half of each head's dimensions is used, because the fast ones would make the
    match depend on the distance. The first half of the heads of a layer match sharply, the others softly.
    """
    config = model.config
    hidden, heads = config.hidden_size, config.num_attention_heads
    head_dim = hidden // heads
    model.model.embed_tokens.weight.normal_(0.0, 4.0 / math.sqrt(hidden))
    # Rotary pairs are (i, i + head_dim / 2) and turn more slowly as i grows.
    slow = torch.arange(head_dim // 4, head_dim // 2)
    rows_of_head = torch.cat([slow, slow + head_dim // 2])
    for layer in model.model.layers:
        attention = layer.self_attn
        query, key = attention.q_proj.weight, attention.k_proj.weight
        for head in range(heads):
            rows = rows_of_head + head * head_dim
            projection = torch.randn(len(rows), hidden) / math.sqrt(hidden)
            # A gain of g gives equal tokens a logit of g^2 * rows / sqrt(head_dim): 8 for the sharp heads.
            gain = math.sqrt(8.0 * math.sqrt(head_dim) / len(rows)) if head < heads // 2 else 0.3
            query[rows] = projection * gain + 0.3 * query[rows]
            key[rows] = projection * gain + 0.3 * key[rows]
        for linear in (attention.v_proj, attention.o_proj):
            nn.init.normal_(linear.weight, 0.0, 0.5 / math.sqrt(hidden))
    model.score.weight.normal_(0.0, 0.02)


def from_language_model(
    directory: str | Path,
    *,
    max_length: int | None,
    max_response_length: int | None,
    dtype: torch.dtype = torch.float32,
    in_4bit: bool = False,
) -> RewardModel:
    """Return a reward model on a causal language model: its backbone, a head of zeros, two more special tokens.

    The head starts at zero as in XTuner 0.2 (`reward.py`); the new tokens' embeddings start at the mean of the others.
    Its lengths are those of `fitting_lengths`.

    Raises:
        InputError: the directory or hub name holds no causal language model with a fast tokenizer.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"{directory}: no usable language model ({reason(error)})") from error
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(f"{directory}: the tokenizer is not a fast one (tokenizer.json is needed)")
    device = torch.device("cuda" if in_4bit and torch.cuda.is_available() else "cpu")
    model: Any = load_weights(checkpoint_directory(directory), dtype, device, in_4bit=in_4bit, new_head=True)
    model.score.weight.data.zero_()
    tokenizer.add_special_tokens({"additional_special_tokens": [SPLIT, SCORE]})
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise InputError(f"{directory}: the tokenizer has neither a pad nor an eos token")
    model.config.pad_token_id = tokenizer.pad_token_id
    starts_with_bos = tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    fast = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    positions = getattr(model.config, "max_position_embeddings", None)
    settings = TemplateSettings(
        _token_id(fast, SPLIT),
        _token_id(fast, SCORE),
        tokenizer.bos_token_id if starts_with_bos else None,
        *fitting_lengths((max_length, max_response_length), (16384, 4096), positions),
    )
    return RewardModel(model, tokenizer, Template(fast, settings))


def add_adapters(start: RewardModel, settings: LoraSettings, base: str, new_tokens: Sequence[int] = ()) -> None:
    """Freeze a model and give it adapters; trained weights are float32, whatever the type of the frozen ones.

    Args:
        start: The model; it is changed, and `RewardModel.save` then saves only the trained weights.
        settings: Size and place of the adapters.
        base: Directory or hub name of the frozen weights, which loading the adapter needs too.
        new_tokens: Tokens unknown to the base: their embeddings are trained and saved in full.

    Raises:
        InputError: the model has no such layers.
    """
    from peft import LoraConfig

    model = start.model
    layers = [f".{name}" for name, _ in model.named_modules()]
    everywhere = "all-linear" in settings.targets
    for target in () if everywhere else settings.targets:
        if not any(layer.endswith(f".{target}") for layer in layers):
            raise InputError(f"lora.targets: {base} has no layer {target}; name layers like q_proj, or take all-linear")
    config = LoraConfig(
        task_type="SEQ_CLS",
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # any number
        lora_dropout=settings.dropout,
        target_modules="all-linear" if everywhere else settings.targets,
        modules_to_save=["score"],
        trainable_token_indices=list(new_tokens) or None,
    )
    try:
        model.add_adapter(config)
    except (ValueError, TypeError) as error:
        raise InputError(f"lora.targets {', '.join(settings.targets)}: {reason(error)}") from error
    config.base_model_name_or_path = base
    config.target_modules = sorted(config.target_modules or ())  # a set: its order would differ from run to run
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    start.provenance = {**start.provenance, "lora": asdict(settings)}
    trained, total = model.num_parameters(only_trainable=True), model.num_parameters()
    log.info("training %s of %s weights (%.2f %%)", f"{trained:,}", f"{total:,}", 100 * trained / total)


def _token_id(tokenizer: Tokenizer, token: str) -> int:
    token_id = tokenizer.token_to_id(token)
    if token_id is None:
        raise InputError(f"the tokenizer has no token {token}")
    return token_id
