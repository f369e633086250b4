"""Attention by blocks, against dense masked attention and against separate sequences."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from polar import RewardModel
from polar.core.template import EncodedGroup
from polar.model.attention import segment_table
from polar.model.blocks import QUERIES, STEP, Blocks, block_attention, row_blocks
from polar.model.products import few_lengths, multiplies_bfloat16
from polar.model.tree import rewards, tree_batch

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")

# oneDNN multiplies bfloat16 from AVX-512 on, and products by blocks are only asked for there.
DTYPES = [torch.float32, *([torch.bfloat16] if multiplies_bfloat16() else [])]


def group(prefix: int, *branches: int) -> EncodedGroup:
    generator = random.Random(f"{prefix} {branches}")
    tokens = [[generator.randrange(1, 300) for _ in range(length)] for length in (prefix, *branches)]
    return EncodedGroup(tokens[0], tokens[1:], [])


def dense_mask(segments: list[tuple[int, int, int, int]], tokens: int) -> torch.Tensor:
    """Who sees whom, written down token by token; padding sees itself."""
    sees = torch.eye(tokens, dtype=torch.bool)
    for first, last, start, end in segments:
        for query in range(start, end):
            sees[query, first:last] = True
            sees[query, start : query + 1] = True
    return sees


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
def test_blocks_compute_masked_attention(
    trees: list[tuple[int, list[int]]], heads: tuple[int, int], padding: int, dtype: torch.dtype
) -> None:
    batch = tree_batch([group(prefix, *branches) for prefix, branches in trees])
    segments = [tuple(line) for line in batch.table_11S4[0, 0].tolist()]
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
        row = row_blocks(segment_table(segments), tokens, *heads)
        found = block_attention(query, key, value, row, 0.4)
    assert found.dtype is dtype
    assert found.shape == (1, tokens, heads[0], 16)
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    assert torch.allclose(found.transpose(1, 2)[:, :, :real].double(), expected[:, :, :real], atol=tolerance)


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
    batch = tree_batch(groups, in_blocks=True)
    assert batch.ids_1T.shape == batch.positions_1T.shape == (1, few_lengths(batch.ids_1T.shape[1]))
    with torch.inference_mode():
        found = rewards(reward_model.model, batch)
        expected = [reward_model.model(torch.tensor([ids])).logits.item() for one in groups for ids in one.sequences()]
    assert found.tolist() == pytest.approx(expected, abs=1e-4)


def test_layers_may_have_different_heads_and_values_of_another_width() -> None:
    batch = tree_batch([group(7, 5, 40), group(0, 9)])
    tokens = batch.ids_1T.shape[1]
    mask = dense_mask([tuple(line) for line in batch.table_11S4[0, 0].tolist()], tokens)
    blocks = Blocks(batch.table_11S4, tokens, last_only_at={tokens - 1})
    for heads, key_heads, last in [(4, 2, False), (4, 1, False), (6, 6, False), (4, 2, True)]:
        query, key = torch.randn(1, heads, tokens, 16), torch.randn(1, key_heads, tokens, 16)
        value = torch.randn(1, key_heads, tokens, 8)
        with torch.inference_mode():
            found = block_attention(query, key, value, blocks.of(heads, key_heads, last=last), None).transpose(1, 2)
            expected = scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)
        read = slice(tokens - 1 if last else 0, tokens)
        assert torch.allclose(found[:, :, read], expected[:, :, read], atol=1e-5)


def test_blocks_have_few_shapes() -> None:
    generator = random.Random(0)
    shapes = set()
    for _ in range(200):
        prefix, branch = generator.randrange(500), generator.randrange(1, 500)
        table = segment_table([(0, 0, 0, prefix), (0, prefix, prefix, prefix + branch)])
        shapes |= {(block.queries, block.keys) for block in row_blocks(table, 1000, 2, 1).blocks}
    assert {queries for queries, _ in shapes} <= set(range(STEP, QUERIES + 1, STEP))
    assert all(keys % STEP == 0 for _, keys in shapes)
