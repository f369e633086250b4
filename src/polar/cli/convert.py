"""`polar convert`: official POLAR checkpoints, and adapters, to plain Hugging Face checkpoints."""

from __future__ import annotations

from pathlib import Path

from polar.core.checkpoint import local_directory
from polar.core.files import require_new
from polar.model import internlm2
from polar.model.adapters import ADAPTER_CONFIG, is_adapter
from polar.model.reward_model import RewardModel


def convert(source: str, target: str) -> None:
    """Convert an official POLAR checkpoint, or an adapter, to a plain Hugging Face checkpoint.

    An official checkpoint becomes a `LlamaForSequenceClassification` with a fast tokenizer and the same rewards, which
    needs no remote code. polar, transformers and serving engines load it natively. An InternLM2 base model converts
    too, with a score head of zeros to be trained.

    An adapter (`polar finetune --lora.rank 16`) is merged into its base model, in float32.

    Examples:
        polar convert internlm/POLAR-7B POLAR-7B-llama

        polar convert ./POLAR-1_8B-Base ./base

        polar convert ./adapter ./rm

    Args:
        source: A directory, or a Hugging Face hub name to download.
        target: The directory to write; it must be new or empty.
    """
    if is_adapter(local_directory(source, [ADAPTER_CONFIG])):
        architecture = _merge(source, Path(target))
    else:
        internlm2.convert(source, target)
        architecture = "LlamaForSequenceClassification"
    size = sum(file.stat().st_size for file in Path(target).iterdir())
    print(f"{target}: wrote {architecture} and its tokenizer, {size / 1e6:,.1f} MB, from {source}")


def _merge(source: str, target: Path) -> str:
    require_new(target)
    whole = RewardModel.load(source, device="cpu", dtype="float32")
    whole.save(target)
    return type(whole.model).__name__
