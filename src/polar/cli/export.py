"""`polar export`: our checkpoints in the layouts of XTuner and LMDeploy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from polar.model import export as exporting
from polar.model.export import Engine


def export(checkpoint: str, output: str, /, *, engine: Annotated[Engine, Parameter(name="--for")]) -> None:
    """Write a reward model in the layout of XTuner or LMDeploy, with the same rewards.

    A Llama becomes InternLM2ForRewardModel, the layout of the official POLAR models. For LMDeploy a Qwen2 becomes
    Qwen2ForRewardModel. vLLM, SGLang and TRL need no export: they load our checkpoints as they are.

    Examples:
        polar export ./rm ./rm-lmdeploy --for lmdeploy

        polar export POLAR-7B-llama POLAR-7B-xtuner --for xtuner

    Args:
        checkpoint: A directory, a Hugging Face hub name, or polar-nano.
        output: The directory to write; it must be new or empty.
        engine: Who is to load it, xtuner or lmdeploy.
    """
    architecture = exporting.export(checkpoint, output, engine)
    size = sum(file.stat().st_size for file in Path(output).iterdir())
    print(f"{output}: wrote {architecture} and its tokenizer, {size / 1e6:,.1f} MB, from {checkpoint}")
    if engine == "xtuner":
        print(
            "XTuner loads this layout through its own code: copy configuration_internlm2.py and modeling_internlm2.py "
            f"from xtuner/tools/model_converters/modeling_internlm2_reward (v0.2.0) to {output}"
        )
