"""Over-optimisation: the reward goes on rising while the truth falls (Gao et al. 2022, arXiv 2210.10760)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Measurement:
    """A policy on held-out prompts, one output for each."""

    step: int
    reward: float
    """Mean reward."""
    reward_spread: float
    """Its standard deviation over the outputs."""
    accuracy: float | None
    """Share of the outputs that the verifier accepts; None without one."""
    reward_right: float | None
    """Mean reward of the outputs that the verifier accepts; None if there is none."""
    reward_wrong: float | None
    """Mean reward of the others."""
    length: float
    """Mean tokens of an output, its end token included."""
    prompts: int

    @property
    def quality(self) -> float:
        """What the best policy is chosen by: the accuracy, or the reward if there is no verifier."""
        return self.reward if self.accuracy is None else self.accuracy

    def as_row(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        accuracy = "" if self.accuracy is None else f", accuracy {self.accuracy:.1%}"
        return f"step {self.step}: reward {self.reward:.3f}{accuracy}, {self.length:.1f} tokens"


def has_parted(measurements: Sequence[Measurement], window: int, tolerance: float) -> bool:
    """Whether reward and truth have parted: over the last `window` measurements reward has risen and accuracy fallen.

    The means of the older and of the newer half of the window are compared, since a single measurement is noisy.

    Args:
        measurements: In the order of the run, with accuracies.
        window: How many of the last measurements count; an even number. Fewer have never parted.
        tolerance: A fall of the accuracy up to this counts as none; between 0 and 1.
    """
    if len(measurements) < window:
        return False
    half = window // 2
    older, newer = measurements[-window:-half], measurements[-half:]
    rise = sum(one.reward for one in newer) - sum(one.reward for one in older)
    fall = sum(one.accuracy or 0.0 for one in older) - sum(one.accuracy or 0.0 for one in newer)
    return rise > 0 and fall > tolerance * half
