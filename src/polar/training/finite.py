"""A loss that is not finite ends the run, with the names of its records, before it can reach the weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from polar.core.errors import InputError
from polar.training.distributed import fail_together


class FiniteLosses(TrainerCallback):
    """Looks at the losses of all micro-batches of an optimizer step at once: until then nothing waits for the device.

    The gradients of all processes are one then, so all of them come here, and stop, together.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._losses: list[Tensor] = []
        self._names: list[Sequence[str]] = []

    def add(self, loss: Tensor, names: Sequence[str]) -> None:
        """Keep the loss of a micro-batch and the names of its examples."""
        self._losses.append(loss.detach())
        self._names.append(names)

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Look at what was kept.

        Raises:
            InputError: a loss is not finite, on whichever process.
        """
        losses, names = torch.stack(self._losses), self._names
        self._losses, self._names = [], []
        with fail_together():
            for number in torch.nonzero(~torch.isfinite(losses)).flatten().tolist()[:1]:
                raise self._not_finite(losses[number].item(), names[number])

    def _not_finite(self, loss: float, names: Sequence[str]) -> InputError:
        # Of a sharded model this process looks at its own part: the others are not here.
        own = (weight.to_local() if isinstance(weight, DTensor) else weight for weight in self._model.parameters())
        broken = not all(bool(torch.isfinite(weight).all()) for weight in own)
        cause = (
            "the weights were not finite before it, so an earlier step was too large: use a lower learning_rate"
            if broken
            else "the weights are finite: look at these records, or use a lower learning_rate"
        )
        return InputError(f"the loss is {loss} in the batch of records {', '.join(names)}; {cause}")
