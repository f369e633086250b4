"""Choice between rows of trees and separate sequences, by trying both on the model itself when it is built.

Rows of trees (`polar.model.tree`) are right if nothing but attention joins tokens, and if all of that attention goes
through ours. A recurrent state or a convolution would run on from one branch into the next; soft caps, sinks and
position biases are not known to our attention. No list of names can tell that of the models to come, so a small row is
computed and compared with what transformers' own eager attention gives for its sequences, one at a time.

The comparison alone would miss a faint leak in 16 bits. So the embeddings of one branch are NaN, and whatever another
branch takes over from it, however little, is NaN too.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from polar.core.errors import InputError, reason
from polar.core.template import EncodedGroup
from polar.model.attention import TREE_ATTENTION
from polar.model.tree import add_hooks, row_states, separate_states, tree_batch

log = logging.getLogger(__name__)

PREFIX, SPOILED, BRANCH, OTHER = 3, 3, 2, 4
"""Tokens of a prefix, of its two branches, the first of which is spoiled, and of a sequence behind them."""

_FAULTS = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError)


@torch.no_grad()
def prepare(model: Any) -> None:
    """Choose how the model is computed and prepare it for that, before any thread uses it.

    It costs a few passes over as many weights as the model has, for a dozen tokens. A second call does nothing.

    Args:
        model: Any `*ForSequenceClassification` model of transformers. It gets the attribute `takes_rows`: whether
            groups are computed as rows of trees, or as separate sequences.

    Raises:
        InputError: The rewards of this kind of model cannot be computed exactly.
    """
    if hasattr(model, "takes_rows"):
        return
    kind, training = type(model).__name__, model.training
    if not isinstance(getattr(model, "score", None), torch.nn.Linear):
        raise InputError(
            f"{kind}: has no linear layer `score` on top of its backbone (encoders and encoder-decoders have none); "
            "expected a causal language model's *ForSequenceClassification"
        )
    model.eval()
    try:
        expected_2H = _one_at_a_time(model)
        ways = ((TREE_ATTENTION, True), (TREE_ATTENTION, False), ("eager", False))
        found = next(((way, rows) for way, rows in ways if _agrees(expected_2H, model, way, takes_rows=rows)), None)
    except _FAULTS as error:
        raise InputError(f"{kind}: does not run on token ids alone ({reason(error)}); use another backbone") from error
    finally:
        model.train(training)
    if found is None:
        raise InputError(
            f"{kind}: a reward depends on what is computed beside it, so it is not exact; use another backbone"
        )
    model.takes_rows = found[1]
    if model.takes_rows:
        add_hooks(model)
    else:
        log.warning(
            "%s has more than plain attention (a recurrent state, soft caps or the like): every candidate is computed "
            "together with a copy of its prompt, which is exact, but slower than sharing it",
            kind,
        )


def _ids(model: Any) -> list[Tensor]:
    """Prefix, spoiled branch, branch and another sequence, of tokens that are spread over the vocabulary."""
    parts = [PREFIX, SPOILED, BRANCH, OTHER]
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = [(number + 1) * vocabulary // (sum(parts) + 2) for number in range(sum(parts))]
    return list(torch.split(torch.tensor(ids, device=model.device), parts))


def _one_at_a_time(model: Any) -> Tensor:
    """Last hidden states of the branch and of the other sequence as transformers defines them, shape (2, H)."""
    prefix, _, branch, other = _ids(model)
    model.set_attn_implementation("eager")
    backbone = getattr(model, model.base_model_prefix)
    outputs = [backbone(input_ids=ids[None], use_cache=False) for ids in (torch.cat([prefix, branch]), other)]
    return torch.stack([output.last_hidden_state[0, -1] for output in outputs])


def _agrees(expected_2H: Tensor, model: Any, implementation: str, *, takes_rows: bool) -> bool:
    """Return whether they are the same beside a spoiled branch; among separate sequences it is only another one."""
    prefix, *branches, other = (ids.tolist() for ids in _ids(model))
    batch = tree_batch([EncodedGroup(prefix, branches, []), EncodedGroup([], [other], [])]).to(model.device)
    model.set_attn_implementation(implementation)
    try:
        if takes_rows:
            with _spoiled_embeddings(model, slice(PREFIX, PREFIX + SPOILED)):
                output = row_states(model, batch, attention_mask=batch.table_11S4)
        else:
            output = separate_states(model, batch)
    except _FAULTS as error:
        log.debug("%s with %s: %s", type(model).__name__, implementation, error)
        return False
    found_2H = output.last_hidden_state[0, batch.scores_N[1:]].float()
    tolerance = 0.01 if expected_2H.dtype is torch.float32 else 0.2
    return bool(((found_2H - expected_2H).norm(dim=1) <= tolerance * expected_2H.float().norm(dim=1)).all())


@contextmanager
def _spoiled_embeddings(model: Any, places: slice) -> Iterator[None]:
    def spoil(part: torch.nn.Module, arguments: Any, output_1TH: Tensor) -> Tensor:
        output_1TH = output_1TH.clone()
        output_1TH[:, places] = float("nan")
        return output_1TH

    hook = model.get_input_embeddings().register_forward_hook(spoil)
    try:
        yield
    finally:
        hook.remove()
