"""LoRA: a frozen model gets low-rank adapters to train; its score head is trained in full."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict

from polar.core.errors import InputError, reason
from polar.model.reward_model import RewardModel
from polar.training.config import LoraSettings

log = logging.getLogger(__name__)


def add_adapters(start: RewardModel, settings: LoraSettings, base: str, new_tokens: Sequence[int] = ()) -> None:
    """Freeze a model and give it adapters; what is trained is held in float32, whatever the type of the frozen weights.

    Args:
        start: The model; it is changed, and `RewardModel.save` then saves only what is trained.
        settings: Size and place of the adapters.
        base: Directory or hub name of the frozen weights, which whoever loads the adapter needs too.
        new_tokens: Tokens that the base does not know: their embeddings are trained and saved in full.

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
