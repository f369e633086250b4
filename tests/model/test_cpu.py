"""Both kernels for CPUs give the same rewards, and the faster one is chosen."""

import logging
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear, scaled_dot_product_attention

from polar import Group, InputError, RewardModel
from polar.core.template import EncodedGroup
from polar.model import cpu
from polar.model.cpu import (
    QUERIES,
    STEP,
    choose_kernel,
    few_lengths,
    multiplies_bfloat16,
    onednn_attention,
    use_kernel,
)
from polar.model.tree import rewards, tree_batch

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")

# oneDNN multiplies bfloat16 from AVX-512 on, and is only asked for there.
DTYPES = [torch.float32, *([torch.bfloat16] if multiplies_bfloat16() else [])]
GROUP = Group("What is the capital of China?", "It is Beijing.", ("Beijing", "Not Shanghai."))


def group(prefix: int, *branches: int) -> EncodedGroup:
    generator = random.Random(f"{prefix} {branches}")
    tokens = [[generator.randrange(1, 300) for _ in range(length)] for length in (prefix, *branches)]
    return EncodedGroup(tokens[0], tokens[1:], [])


def dense_mask(segments: list[list[int]], tokens: int) -> torch.Tensor:
    """Who sees whom, written down token by token; padding sees itself."""
    sees = torch.eye(tokens, dtype=torch.bool)
    for first, last, start, end in segments:
        for query in range(start, end):
            sees[query, first:last] = True
            sees[query, start : query + 1] = True
    return sees


@needs_onednn
@given(
    trees=st.lists(
        st.tuples(st.integers(0, 70), st.lists(st.integers(1, 2 * QUERIES + 9), min_size=1, max_size=3)),
        min_size=1,
        max_size=3,
    ),
    heads=st.sampled_from([(6, 2), (3, 3), (4, 1)]),
    padding=st.integers(0, 3),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=40, deadline=None)
def test_attention_by_onednn_is_masked_attention(
    trees: list[tuple[int, list[int]]], heads: tuple[int, int], padding: int, dtype: torch.dtype
) -> None:
    batch = tree_batch([group(prefix, *branches) for prefix, branches in trees])
    segments = batch.table_11S4[0, 0].tolist()
    real, tokens = batch.ids_1T.shape[1], batch.ids_1T.shape[1] + padding
    torch.manual_seed(tokens)
    query = torch.randn(1, tokens, heads[0], 16, dtype=dtype).transpose(1, 2)
    key, value = torch.randn(2, 1, tokens, heads[1], 16, dtype=dtype).transpose(2, 3)
    with torch.inference_mode():
        expected = scaled_dot_product_attention(
            *(part.double() for part in (query, key, value)),
            attn_mask=dense_mask(segments, tokens),
            scale=0.4,
            enable_gqa=True,
        )
        found = onednn_attention(query, key, value, segments, 0.4)
    assert found.dtype is dtype
    assert found.shape == (1, tokens, heads[0], 16)
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    assert torch.allclose(found.transpose(1, 2)[:, :, :real].double(), expected[:, :, :real], atol=tolerance)


@needs_onednn
@pytest.mark.parametrize(
    "groups",
    [
        [group(7, 5)],
        [group(40, 1, 300, 2, 37)],
        [group(11, 4, 9), group(30, 6), group(3, 1, 50, 8), group(1, 2, 2)],
        [group(0, 8, 3, 12), group(5, 4, 4)],
    ],
    ids=["one sequence", "very different lengths", "several groups", "no shared prefix"],
)
def test_rewards_are_those_of_separate_sequences(reward_model: RewardModel, groups: list[EncodedGroup]) -> None:
    batch = tree_batch(groups, onednn=True)
    assert batch.ids_1T.shape == batch.positions_1T.shape == (1, few_lengths(batch.ids_1T.shape[1]))
    with torch.inference_mode(), use_kernel("onednn", torch.float32):
        found = rewards(reward_model.model, batch)
        expected = [reward_model.model(torch.tensor([ids])).logits.item() for one in groups for ids in one.sequences()]
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


@needs_onednn
@pytest.mark.parametrize("read", [False, True])
def test_values_may_be_narrower_than_keys_and_a_few_results_enough(read: bool) -> None:
    batch = tree_batch([group(7, 5, 40), group(0, 9)])
    tokens = batch.ids_1T.shape[1]
    table = batch.table_11S4[0, 0].tolist()
    query, key, value = (torch.randn(1, count, tokens, width) for count, width in ((4, 16), (2, 16), (2, 8)))
    with torch.inference_mode():
        found = onednn_attention(query, key, value, table, 0.25, {tokens - 1} if read else None).transpose(1, 2)
        expected = scaled_dot_product_attention(query, key, value, dense_mask(table, tokens), enable_gqa=True)
    places = slice(tokens - 1 if read else 0, tokens)
    assert torch.allclose(found[:, :, places], expected[:, :, places], atol=1e-5)


def test_pieces_have_few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = set()

    def product(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        shapes.add((values.shape[0], *weight.shape))
        return values @ weight.T

    monkeypatch.setattr(cpu, "product", product)
    generator = random.Random(0)
    for _ in range(50):
        prefix, branch = generator.randrange(500), generator.randrange(1, 500)
        query, key = torch.zeros(1, 2, prefix + branch, 8), torch.zeros(1, 1, prefix + branch, 8)
        onednn_attention(query, key, key, [[0, 0, 0, prefix], [0, prefix, prefix, prefix + branch]], 1.0)
    assert {queries for queries, *_ in shapes} <= {2 * queries for queries in range(STEP, QUERIES + 1, STEP)}
    assert all(size % STEP == 0 or size == 8 for _, *sizes in shapes for size in sizes)


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
def test_products_are_the_same_in_float32(bias: bool) -> None:
    layer = torch.nn.Linear(96, 33, bias=bias)
    values = torch.randn(2, 50, 96)
    with torch.inference_mode():
        expected = layer(values)
        with use_kernel("onednn", torch.float32):
            assert torch.allclose(layer(values), expected, atol=1e-5)
            double = linear(values.double(), layer.weight.double())
    assert double.dtype is torch.float64


@needs_onednn
def test_a_weight_with_gaps_in_memory_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Given the view itself, oneDNN takes a loop that is a thousand times as slow."""
    seen: list[torch.Tensor] = []

    def product(values: torch.Tensor, weight: torch.Tensor, *_: Any) -> torch.Tensor:
        seen.append(weight)
        return values @ weight.T

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", product)
    values, weight = torch.randn(5, 8), torch.randn(7, 2, 8)[:, 1]
    with torch.inference_mode(), use_kernel("onednn", torch.float32):
        linear(values, weight)
    assert [one.is_contiguous() for one in seen] == [True]


@settings(deadline=None)
@given(st.integers(1, 40_000))
def test_rows_have_few_lengths_and_little_padding(tokens: int) -> None:
    length = few_lengths(tokens)
    assert tokens <= length < tokens + max(32, tokens / 8)
    assert few_lengths(length) == length
    assert len({few_lengths(other) for other in range(tokens, 2 * tokens)}) <= 33


@pytest.fixture
def fresh_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try both kernels anew, whatever earlier tests found."""
    monkeypatch.delenv("POLAR_CPU_KERNEL", raising=False)
    cpu._faster_kernel.cache_clear()


@needs_onednn
@pytest.mark.parametrize(("slower", "chosen"), [("torch", "onednn"), ("onednn", "torch")])
@pytest.mark.usefixtures("fresh_trial")
def test_the_faster_kernel_is_chosen_once(
    slower: str, chosen: str, llama: RewardModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By a clock that a product of the slower one takes on by a second, also when threads are the first to ask."""
    now, products, state = 0.0, {"torch": linear, "onednn": cpu.product}, torch.get_rng_state()

    def timed(kernel: str) -> Any:
        def multiply(*args: Any) -> torch.Tensor:
            nonlocal now
            now += kernel == slower
            return products[kernel](*args)

        return multiply

    monkeypatch.setattr(cpu.time, "thread_time", lambda: now)
    monkeypatch.setattr(cpu, "linear", timed("torch"))
    monkeypatch.setattr(cpu, "product", timed("onednn"))
    monkeypatch.setattr(cpu, "MIN_SPEEDUP", 0.5 if slower == "torch" else 2)
    with caplog.at_level(logging.DEBUG, logger="polar"), ThreadPoolExecutor(4) as pool:
        assert set(pool.map(choose_kernel, [llama.model] * 4)) == {chosen}
    assert [record.message.split(":")[1].split()[0] for record in caplog.records] == [chosen]
    assert torch.equal(state, torch.get_rng_state())


@needs_onednn
@pytest.mark.usefixtures("fresh_trial")
def test_the_environment_chooses_and_rewards_are_the_same(llama: RewardModel, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for kernel in ("torch", "onednn"):
        monkeypatch.setenv("POLAR_CPU_KERNEL", kernel)
        assert choose_kernel(llama.model) == kernel
        found[kernel] = llama.score_groups([GROUP])[0]
        assert llama.score_groups([GROUP])[0] == found[kernel]
    assert found["onednn"] == pytest.approx(found["torch"], abs=1e-5)
    monkeypatch.setenv("POLAR_CPU_KERNEL", "mkl")
    with pytest.raises(InputError, match=r"POLAR_CPU_KERNEL=mkl: expected torch or onednn"):
        llama.score_groups([GROUP])


@pytest.mark.usefixtures("fresh_trial")
def test_a_torch_without_onednn_scores_the_same(
    llama: RewardModel, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor with the functions that torch does not document, which another version may not have."""
    monkeypatch.setenv("POLAR_CPU_KERNEL", "torch")
    expected = llama.score_groups([GROUP])[0]
    monkeypatch.delenv("POLAR_CPU_KERNEL")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())
    assert RewardModel.load(checkpoint).score_groups([GROUP])[0] == pytest.approx(expected, abs=1e-5)
    half = RewardModel.load(checkpoint, dtype="bfloat16").score_groups([GROUP])[0]
    assert half == pytest.approx(expected, abs=0.5)
    monkeypatch.setenv("POLAR_CPU_KERNEL", "onednn")
    with pytest.raises(InputError, match="expected torch on this machine"):
        llama.score_groups([GROUP])


@pytest.mark.parametrize(
    ("device", "dtype"), [("cpu", torch.float16), ("cuda", torch.bfloat16), ("mps", torch.float32)]
)
@pytest.mark.usefixtures("fresh_trial")
def test_other_types_and_devices_are_left_alone(device: str, dtype: torch.dtype) -> None:
    assert choose_kernel(SimpleNamespace(device=torch.device(device), dtype=dtype, takes_rows=True)) == "torch"
