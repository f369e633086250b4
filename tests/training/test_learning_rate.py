import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar.training.config import peak_share

SCHEDULES = ["cosine", "linear", "wsd", "constant"]


def shares(steps: int, schedule: str, warmup: float = 0.03, decay: float = 0.2) -> list[float]:
    return [peak_share(step, steps, schedule=schedule, warmup=warmup, decay=decay) for step in range(steps)]  # type: ignore[arg-type]


@given(
    st.integers(1, 300),
    st.sampled_from(SCHEDULES),
    st.floats(0, 1, exclude_max=True),
    st.floats(0, 1, exclude_min=True),
)
def test_no_step_is_wasted_and_the_peak_is_reached(steps: int, schedule: str, warmup: float, decay: float) -> None:
    found = shares(steps, schedule, warmup, decay)
    assert min(found) > 0
    assert max(found) == pytest.approx(1.0)
    top = found.index(max(found))
    assert found[:top] == sorted(found[:top])
    assert found[top:] == sorted(found[top:], reverse=True)


def test_schedules_by_hand() -> None:
    assert shares(10, "linear", warmup=0.2) == pytest.approx([1 / 3, 2 / 3, *(1 - n / 8 for n in range(8))])
    assert shares(10, "wsd", warmup=0.2, decay=0.4) == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])
    assert shares(3, "constant", warmup=0.1) == pytest.approx([0.5, 1, 1])
    cosine = shares(101, "cosine", warmup=0.0)
    assert cosine[50] == pytest.approx(0.55, abs=0.02)
    assert cosine[-1] == pytest.approx(0.1, abs=0.001)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_run_of_one_step_has_the_peak(schedule: str) -> None:
    assert shares(1, schedule) == [1.0]


def test_the_warm_up_of_the_original_configurations_is_mended() -> None:
    """XTuner's started at 4e-11 instead of a tenth of 2e-5, and for 34 to 66 steps it never ended."""
    for steps in range(2, 70):
        found = shares(steps, "cosine", warmup=0.03)
        assert found[0] >= 0.25
        assert max(found[:4]) == 1.0
