"""`polar convert` and `polar export`: checkpoints from other layouts to our own, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from polar.core.checkpoint import local_directory
from polar.core.files import require_new
from polar.model.reward_model import RewardModel


def convert(source: str, target: str) -> None:
    """Convert an official POLAR checkpoint, or an adapter, to a plain Hugging Face checkpoint.

    An official checkpoint is written as a `LlamaForSequenceClassification` with a fast tokenizer: the same rewards
    without remote code. polar, transformers and serving engines load it natively. An InternLM2 base model converts
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
    from polar.model import internlm2
    from polar.model.adapters import ADAPTER_CONFIG, is_adapter

    if is_adapter(local_directory(source, [ADAPTER_CONFIG])):
        architecture = _merge(source, Path(target))
    else:
        internlm2.convert(source, target)
        architecture = "LlamaForSequenceClassification"
    size = sum(file.stat().st_size for file in Path(target).iterdir())
    print(f"{target}: wrote {architecture} and its tokenizer, {size / 1e6:,.1f} MB, from {source}")


def export(
    checkpoint: str, output: str, /, *, engine: Annotated[Literal["xtuner", "lmdeploy"], Parameter(name="--for")]
) -> None:
    """Write a reward model in the layout of XTuner or LMDeploy, with the same rewards.

    A Llama becomes InternLM2ForRewardModel, the layout of the official POLAR models. For LMDeploy a Qwen2 becomes
    Qwen2ForRewardModel. vLLM, SGLang and TRL need no export: they load our checkpoints as they are.

    Examples:
        polar export ./rm ./rm-lmdeploy --for lmdeploy

        polar export POLAR-7B-llama POLAR-7B-xtuner --for xtuner

    Args:
        checkpoint: A directory, a Hugging Face hub name, or the name of a bundled model.
        output: The directory to write; it must be new or empty.
        engine: The engine that will load it, xtuner or lmdeploy.
    """
    from polar.model import export as exporting

    architecture = exporting.export(checkpoint, output, engine)
    size = sum(file.stat().st_size for file in Path(output).iterdir())
    print(f"{output}: wrote {architecture} and its tokenizer, {size / 1e6:,.1f} MB, from {checkpoint}")
    if engine == "xtuner":
        print(
            "XTuner loads this layout through its own code: copy configuration_internlm2.py and modeling_internlm2.py "
            f"from xtuner/tools/model_converters/modeling_internlm2_reward (v0.2.0) to {output}"
        )


def _merge(source: str, target: Path) -> str:
    require_new(target)
    whole = RewardModel.load(source, device="cpu", dtype="float32")
    whole.save(target)
    return type(whole.model).__name__
