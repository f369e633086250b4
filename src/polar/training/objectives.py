"""Losses: ranking objectives, and the lexical auxiliary that teaches a network from scratch to compare texts.

Shape legend: N candidates of a batch, P pairs, C comparisons, B rows, T tokens, H hidden size.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from polar.core.errors import InputError
from polar.core.template import EncodedGroup
from polar.training.config import Ranked


@dataclass(frozen=True, slots=True)
class Objective:
    """Bradley-Terry (paper eq. 7 and 8) over the comparisons of a batch; the defaults are POLAR's own.

    A comparison has one winner. With "all_pairs" it has one loser, with "plackett_luce" the losers are all candidates
    that the winner beats, so that a list of K answers gives K - 1 comparisons: each answer is chosen among those not
    better than it (Luce 1959, Plackett 1975). The two agree on lists of two.
    """

    ranked: Ranked = "all_pairs"
    """Comparisons of a list of more than two candidates."""
    centering: float = 0.0
    """Weight of the squared sum of the rewards of a pair, which keeps rewards near 0 (arXiv 2312.09244, eq. 2, as in
    TRL)."""

    def __post_init__(self) -> None:
        if self.ranked not in get_args(Ranked):
            raise InputError(f"ranked must be one of {', '.join(get_args(Ranked))}; found {self.ranked!r}")
        if not 0 <= self.centering < float("inf"):
            raise InputError(f"centering must be 0 or more, found {self.centering}")

    def __call__(self, rewards_N: Tensor, better_P: Tensor, worse_P: Tensor, margin_N: Tensor | None = None) -> Tensor:
        """Return the sum of the loss over all comparisons, and of the weighted centering over all pairs.

        Divide it by the number of comparisons of the whole optimizer step, and every pair weighs the same, whatever
        micro-batch or machine it came to. (XTuner takes the mean per pack, where a pair in a short pack weighs more.)

        Args:
            rewards_N: Rewards of all candidates of the batch.
            better_P: Index of the better candidate of each pair.
            worse_P: Index of the worse one.
            margin_N: By how much a candidate must win its comparisons (default: 0, as in the paper).
        """
        winners_C = self.winners(better_P)
        if self.ranked == "all_pairs":
            losers_C = rewards_N[worse_P]
        else:
            losers_NN = rewards_N.new_full((len(rewards_N), len(rewards_N)), -torch.inf)
            losers_NN[better_P, worse_P] = rewards_N[worse_P]
            losers_C = losers_NN[winners_C].logsumexp(1)
        margins_C = rewards_N[winners_C] - losers_C
        if margin_N is not None:
            margins_C = margins_C - margin_N[winners_C]
        total = nn.functional.softplus(-margins_C).sum()
        if self.centering:
            total = total + self.centering * ((rewards_N[better_P] + rewards_N[worse_P]) ** 2).sum()
        return total

    def winners(self, better_P: Tensor) -> Tensor:
        """Return the winner of every comparison that pairs make."""
        return better_P if self.ranked == "all_pairs" else torch.unique(better_P)


class LexicalAuxiliaryLoss(nn.Module):
    """Two linear probes with known targets for every candidate token; dropped after training.

    A network from scratch gets one bit per pair from Bradley-Terry and stays at chance for a long time: it must first
    learn to find the reference's words in the candidate. These probes give that signal at every candidate token:

    - *overlap*, read in the middle of the network: does this token occur in the reference?
    - *closeness*, read at its end: precision and F1 with the reference up to this token, and the log length ratio.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.overlap = nn.Linear(hidden_size, 1)
        self.closeness = nn.Linear(hidden_size, 3)

    def forward(
        self, middle_BTH: Tensor, last_BTH: Tensor, overlap_BT: Tensor, closeness_BT3: Tensor, select_BT: Tensor
    ) -> Tensor:
        """Return cross entropy of the overlap plus squared error of the closeness, over the selected tokens."""
        dtype = self.overlap.weight.dtype  # float32, or what sharded weights are gathered in
        middle, last = middle_BTH[select_BT].to(dtype), last_BTH[select_BT].to(dtype)
        overlap = nn.functional.binary_cross_entropy_with_logits(
            self.overlap(middle).squeeze(-1).float(), overlap_BT[select_BT]
        )
        return overlap + nn.functional.mse_loss(self.closeness(last).float(), closeness_BT3[select_BT])


def lexical_targets(group: EncodedGroup) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Return the targets of the probes by branch: overlap (t,) and closeness (t, 3), t tokens with the score token.

    The closeness values are scaled to about unit variance. The score token repeats the values of the last text token.
    """
    reference, targets = group.reference, []
    known = Counter(reference)
    for branch in group.branches:
        text = branch[:-1]
        left, hits = known.copy(), np.zeros(len(text), np.float32)
        for position, token in enumerate(text):
            if left[token] > 0:
                left[token] -= 1
                hits[position] = 1.0
        overlap = np.array([token in known for token in text], np.float32)
        count = np.arange(1, len(text) + 1)
        closeness = np.stack(
            [
                3.0 * np.cumsum(overlap) / count - 1.5,
                8.0 * np.cumsum(hits) / (count + len(reference)) - 1.5,
                np.log((count + 5.0) / (len(reference) + 5.0)),
            ],
            axis=1,
        ).astype(np.float32)
        targets.append((_repeat_last(overlap), _repeat_last(closeness)))
    return targets


def _repeat_last(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the values of the text tokens, the last one repeated for the score token (zeros for an empty text)."""
    last = values[-1:] if len(values) else np.zeros((1, *values.shape[1:]), np.float32)
    return np.concatenate([values, last])
