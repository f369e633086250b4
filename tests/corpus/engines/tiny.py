"""Tiny language models with random weights, a tokenizer and a chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from polar.training.init_model import BOS, PAD, SCORE

ARCHITECTURES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'tool' %}{{ raise_exception('No tools here.') }}{% endif %}"
    "[{{ message.role }}] {{ message.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)
CONTEXT = 64


def save_policy(
    directory: Path, tokenizer: Tokenizer, architecture: str = "llama", seed: int = 0, hidden: int = 32, **config: Any
) -> Path:
    """A random language model of 2 layers whose end token is not rare, saved with its tokenizer."""
    config_class, model_class = ARCHITECTURES[architecture]
    torch.manual_seed(seed)
    settings = {
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": hidden // 4,
        "max_position_embeddings": CONTEXT,
        "pad_token_id": tokenizer.token_to_id(PAD),
        "bos_token_id": tokenizer.token_to_id(BOS),
        "eos_token_id": tokenizer.token_to_id(SCORE),
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
    }
    model_class(config_class(**(settings | config))).save_pretrained(directory)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, pad_token=PAD, eos_token=SCORE)
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(directory)
    return directory
