"""A reward model and its loss as one module, which is what data-parallel wrappers want to see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from polar.model.tree import TreeBatch, hidden_states, rewards
from polar.training.objectives import LexicalProbes, Objective


class Discriminator(nn.Module):
    """A reward model together with its loss, so that any data-parallel wrapper sees one forward call."""

    accepts_loss_kwargs = True
    """Trainer then gives `num_items_in_batch`: the labels of the whole optimizer step, over all its micro-batches and
    machines. It neither divides the loss by the number of micro-batches then, nor lets machines count as equal."""

    def __init__(self, model: Any, lexical_weight: float = 0.0, objective: Objective | None = None) -> None:
        super().__init__()
        self.model = model
        self._no_split_modules = model._no_split_modules  # what FSDP shards: the layers
        self.objective = objective or Objective()
        self.probes = LexicalProbes(model.config.hidden_size) if lexical_weight > 0 else None
        self.lexical_weight = lexical_weight
        if not all(weight.requires_grad for weight in model.parameters()):  # adapters are trained
            self.register_state_dict_post_hook(_leave_out_frozen)  # type: ignore[no-untyped-call]
            self.register_load_state_dict_post_hook(_need_no_frozen)  # type: ignore[no-untyped-call]

    def forward(
        self,
        batch: TreeBatch,
        better_P: Tensor,
        worse_P: Tensor,
        margin_N: Tensor,
        labels: Tensor,
        names: Sequence[str],
        overlap_BT: Tensor | None = None,
        closeness_BT3: Tensor | None = None,
        select_BT: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """This batch's share of the mean loss over all comparisons of the optimizer step, and the margins of its pairs.

        The names of the examples are not needed: they belong to the batch, for messages (`polar.training.finite`).
        """
        output = hidden_states(self.model, batch, output_hidden_states=self.probes is not None)
        rewards_N = rewards(self.model, batch, output.last_hidden_state)
        loss = self.objective(rewards_N, better_P, worse_P, margin_N)
        if self.probes is not None and overlap_BT is not None and closeness_BT3 is not None and select_BT is not None:
            middle_BTH = output.hidden_states[len(output.hidden_states) // 2]
            auxiliary = self.probes(middle_BTH, output.last_hidden_state, overlap_BT, closeness_BT3, select_BT)
            loss = loss + len(labels) * self.lexical_weight * auxiliary
        loss = loss / (len(labels) if num_items_in_batch is None else num_items_in_batch)
        return {"loss": loss, "margins": rewards_N[better_P] - rewards_N[worse_P]}


def _saved(module: nn.Module) -> set[str]:
    """Names of what a checkpoint of the run holds: frozen weights are those of the base model, on disk already."""
    trained = {name for name, weight in module.named_parameters() if weight.requires_grad}
    return trained | {name for name, _ in module.named_buffers()}


def _leave_out_frozen(module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    for name in state.keys() - {prefix + name for name in _saved(module)}:
        del state[name]


def _need_no_frozen(module: nn.Module, keys: Any) -> None:
    keys.missing_keys[:] = [name for name in keys.missing_keys if name in _saved(module)]
