import copy
import random
import sys
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import Qwen2Config, Qwen2ForSequenceClassification

from polar import InputError, RewardModel
from polar.core.template import EncodedGroup
from polar.model import attention, tree
from polar.model.attention import TREE_ATTENTION, block_mask, segment_table, tree_attention, varlen_arguments
from polar.model.backbone import prepare
from polar.model.reward_model import _rows
from polar.model.tree import rewards, row_length, tree_batch


def group(prefix: int, *branches: int, seed: int = 0) -> EncodedGroup:
    """Random tokens of the given lengths."""
    generator = random.Random(f"{prefix} {branches} {seed}")

    def tokens(count: int) -> list[int]:
        return [generator.randrange(1, 300) for _ in range(count)]

    return EncodedGroup(tokens(prefix), [tokens(length) for length in branches], [])


ROWS = {
    "one sequence": [group(7, 5)],
    "branches of one token": [group(9, 1, 1, 1)],
    "very different lengths": [group(40, 1, 300, 2, 37)],
    "64 branches": [group(20, *(1 + number % 7 for number in range(64)))],
    "several groups": [group(11, 4, 9), group(30, 6), group(3, 1, 50, 8), group(25, 12), group(1, 2, 2)],
    "no shared prefix": [group(0, 8, 3, 12), group(5, 4, 4)],
}


def separately(model: torch.nn.Module, groups: list[EncodedGroup]) -> torch.Tensor:
    """Rewards by the eager attention of transformers, one sequence at a time."""
    return torch.cat([model(torch.tensor([ids])).logits[0] for one in groups for ids in one.sequences()])


def eager(model: torch.nn.Module) -> torch.nn.Module:
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("eager")
    return plain


def gradients(model: torch.nn.Module, values: torch.Tensor) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(values.square().sum(), parameters), strict=True))


@pytest.mark.parametrize("groups", ROWS.values(), ids=ROWS)
def test_rewards_and_gradients_equal_those_of_separate_sequences(
    reward_model: RewardModel, groups: list[EncodedGroup]
) -> None:
    plain = eager(reward_model.model)
    ours, expected = rewards(reward_model.model, tree_batch(groups)), separately(plain, groups)
    assert ours.tolist() == pytest.approx(expected.tolist(), abs=1e-4)
    ours_gradients, expected_gradients = gradients(reward_model.model, ours), gradients(plain, expected)
    for name, gradient in expected_gradients.items():
        assert (ours_gradients[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, name


def flash_attn_varlen_func(
    query_THD: torch.Tensor, key_KGD: torch.Tensor, value_KGD: torch.Tensor, **more: Any
) -> torch.Tensor:
    """What the package documents: sequences one after the other, causal with the last query at the last key."""
    assert set(more) == {
        *("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "dropout_p", "softmax_scale", "causal")
    }
    outputs = []
    bounds = zip(pairwise(more["cu_seqlens_q"].tolist()), pairwise(more["cu_seqlens_k"].tolist()), strict=True)
    for (begin, end), (first, last) in bounds:
        queries, keys = end - begin, last - first
        assert queries <= more["max_seqlen_q"]
        assert keys <= more["max_seqlen_k"]
        sees = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        parts = [
            part.transpose(0, 1)[None] for part in (query_THD[begin:end], key_KGD[first:last], value_KGD[first:last])
        ]
        output = scaled_dot_product_attention(*parts, sees, scale=more["softmax_scale"], enable_gqa=True)
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("groups", ROWS.values(), ids=ROWS)
def test_flash_attention_gives_the_same_rewards_and_gradients(
    reward_model: RewardModel, groups: list[EncodedGroup], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package needs a GPU; its documented behaviour stands in for it, so this is about what it is given."""
    package = ModuleType("flash_attn")
    package.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    expected = rewards(reward_model.model, tree_batch(groups))
    monkeypatch.setattr(tree, "has_flash_attention", lambda *_: True)
    found = rewards(reward_model.model, tree_batch(groups))
    assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-4)
    expected_gradients = gradients(reward_model.model, expected)
    for name, gradient in gradients(reward_model.model, found).items():
        assert (expected_gradients[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, name


def test_gradient_checkpointing_gives_the_same_gradients(reward_model: RewardModel) -> None:
    """The layers run again in the backward pass, when nothing but their arguments is left of the forward pass."""
    batch = tree_batch(ROWS["several groups"])
    expected = gradients(reward_model.model, rewards(reward_model.model, batch))
    saving = copy.deepcopy(reward_model.model).train()
    saving.gradient_checkpointing_enable({"use_reentrant": False})
    for name, gradient in gradients(saving, rewards(saving, batch)).items():
        assert torch.allclose(gradient, expected[name], rtol=1e-5, atol=1e-6), name


def test_bfloat16_is_as_close_as_separate_sequences_are(llama: RewardModel) -> None:
    groups = ROWS["several groups"]
    half = copy.deepcopy(llama.model).to(torch.bfloat16)
    with torch.inference_mode():
        exact = separately(llama.model, groups)
        ours, plain = rewards(half, tree_batch(groups)) - exact, separately(half, groups) - exact
    assert ours.norm() < 2 * plain.norm()


def test_a_branch_depends_on_nothing_but_its_prefix_and_itself(llama: RewardModel) -> None:
    with torch.inference_mode():
        before = rewards(llama.model, tree_batch([group(9, 6, 20, 6), group(12, 5, 5)]))
        other = group(9, 6, 20, 6)
        other.branches[1][:] = group(0, 20, seed=1).branches[0]
        after = rewards(llama.model, tree_batch([other, group(12, 5, 5)]))
    changed = (before - after).abs() > 1e-5
    assert changed.tolist() == [False, True, False, False, False]


def test_the_model_still_takes_padding_masks(llama: RewardModel) -> None:
    """Scoring leaves the tree implementation in the model, which is plain `sdpa` for everybody else."""
    with torch.inference_mode():
        rewards(llama.model, tree_batch(ROWS["several groups"]))
        assert llama.model.config._attn_implementation == TREE_ATTENTION
        ids = group(9, 4).sequences()[0]
        padded, mask = torch.tensor([[0, 0, 0, *ids]]), torch.tensor([[0] * 3 + [1] * len(ids)])
        hidden = llama.model.model(padded, attention_mask=mask).last_hidden_state[:, -1]
        assert torch.allclose(llama.model.score(hidden), rewards(llama.model, tree_batch([group(9, 4)])), atol=1e-4)


@st.composite
def segments(draw: st.DrawFn) -> list[tuple[int, int, int, int]]:
    """The table of a row of groups, some of them with one branch or without a prefix."""
    lengths = st.integers(1, 9)
    groups = draw(st.lists(st.tuples(st.integers(0, 9), st.lists(lengths, min_size=1, max_size=5)), min_size=1))
    batch = tree_batch([group(prefix, *branches) for prefix, branches in groups[:4]])
    return [tuple(line) for line in batch.table_11S4[0, 0].tolist()]


def random_heads(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return tuple(torch.randn(1, heads, tokens, 8, generator=generator) for heads in (6, 2, 2))


@settings(deadline=None, max_examples=40)
@given(segments=segments(), block=st.integers(1, 6))
def test_attention_equals_a_dense_mask(segments: list[tuple[int, int, int, int]], block: int) -> None:
    """Both forms, FlexAttention (not compiled) and segment by segment with any block size, for any layout."""
    tokens = segments[-1][-1]
    mask = torch.zeros(tokens, tokens, dtype=torch.bool)
    for first, last, start, end in segments:
        mask[start:end, first:last] = True
        mask[start:end, start:end] = torch.ones(end - start, end - start, dtype=torch.bool).tril()
    query, key, value = random_heads(tokens)
    expected = scaled_dot_product_attention(query, key, value, mask, scale=0.7, enable_gqa=True)
    table = segment_table(segments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "QUERY_BLOCK", block)
        ours, _ = tree_attention(torch.nn.Identity(), query, key, value, table, scaling=0.7)
    assert torch.allclose(ours.transpose(1, 2), expected, atol=1e-5)
    flexible = block_mask(table, torch.device("cpu"))
    flexible = flex_attention(query, key, value, block_mask=flexible, scale=0.7, enable_gqa=True)
    assert torch.allclose(flexible, expected, atol=1e-5)


@settings(deadline=None, max_examples=40)
@given(segments=segments(), block=st.integers(1, 6))
def test_products_with_gradients_equal_a_dense_mask(segments: list[tuple[int, int, int, int]], block: int) -> None:
    tokens = segments[-1][-1]
    mask = torch.zeros(tokens, tokens, dtype=torch.bool)
    for first, last, start, end in segments:
        mask[start:end, first:last] = True
        mask[start:end, start:end] = torch.ones(end - start, end - start, dtype=torch.bool).tril()
    parts = [part.requires_grad_() for part in random_heads(tokens)]
    expected = scaled_dot_product_attention(*parts, mask, scale=0.7, enable_gqa=True).transpose(1, 2)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "QUERY_BLOCK", block)
        ours, _ = tree_attention(torch.nn.Identity(), *parts, segment_table(segments), scaling=0.7)
        assert type(ours.grad_fn).__name__ == "RowAttentionBackward"
        gradients = torch.autograd.grad((ours * weight).sum(), parts)
    assert torch.allclose(ours, expected, atol=1e-5)
    for gradient, other in zip(gradients, torch.autograd.grad((expected * weight).sum(), parts), strict=True):
        assert torch.allclose(gradient, other, atol=1e-4)


def test_attention_weights_that_would_take_much_memory_are_not_kept(
    llama: RewardModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = tree_batch(ROWS["several groups"])
    expected = rewards(llama.model, batch)
    monkeypatch.setattr(attention, "MAX_WEIGHTS", 1)
    monkeypatch.setattr(attention.RowAttention, "apply", None)
    assert rewards(llama.model, batch).tolist() == pytest.approx(expected.tolist(), abs=1e-5)


def test_no_mask_spans_the_row(llama: RewardModel, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def spy(query: torch.Tensor, key: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        mask = kwargs["attn_mask"]
        sizes.append(0 if mask is None else mask.numel())
        return scaled_dot_product_attention(query, key, *args, **kwargs)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", spy)
    with torch.inference_mode():
        rewards(llama.model, tree_batch([group(100, 600, 500), group(50, 400, 400)]))
    assert 0 < max(sizes) <= attention.QUERY_BLOCK * 700


def sliding(window: int) -> Qwen2ForSequenceClassification:
    config = Qwen2Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_window_layers=1,
        use_sliding_window=True,
        sliding_window=window,
        pad_token_id=0,
        num_labels=1,
        initializer_range=0.3,
    )
    model = Qwen2ForSequenceClassification(config).eval()
    prepare(model)
    return model


def test_a_sliding_window_is_refused_only_where_it_would_matter() -> None:
    groups = [group(10, 6, 2), group(5, 1, 1)]
    fits = sliding(16)
    with torch.inference_mode():
        expected = separately(eager(fits), groups)
        assert rewards(fits, tree_batch(groups)).tolist() == pytest.approx(expected.tolist(), abs=1e-4)
        with pytest.raises(InputError, match="16 tokens, but the model's attention slides over 15"):
            rewards(sliding(15), tree_batch(groups))


@pytest.mark.parametrize("more", ["softcap", "s_aux", "position_bias"])
@pytest.mark.parametrize("form", ["table", "flash-attn", "onednn", "single sequence"])
def test_attention_with_more_than_scaled_products_is_refused(more: str, form: str) -> None:
    query, key, value = random_heads(5)
    table = segment_table([(0, 0, 0, 2), (0, 2, 2, 5)])
    forms: dict[str, dict[str, Any]] = {
        "flash-attn": varlen_arguments(table, torch.device("cpu")),
        "onednn": {"onednn": True},
    }
    mask = None if form == "single sequence" else table
    with pytest.raises(InputError, match=more):
        tree_attention(torch.nn.Identity(), query, key, value, mask, **{more: SimpleNamespace()}, **forms.get(form, {}))


@pytest.mark.parametrize("budget", [1, 10, 40, 1000])
def test_rows_keep_the_order_and_the_budget(budget: int) -> None:
    groups = [group(5, 3, 4, 5, 6), group(8, 2), group(4), group(2, *[1] * 30)]
    rows = list(_rows(groups, budget))
    pieces = [piece for row in rows for piece in row]
    for index, whole in enumerate(groups):
        assert [branch for number, piece in pieces if number == index for branch in piece.branches] == whole.branches
    for row in rows:
        prefix, branches = row[0][1].prefix, row[0][1].branches
        fits = sum(row_length(piece) for _, piece in row) <= budget
        alone = len(row) == 1 and (len(branches) == 1 or row_length(row[0][1]) <= budget + len(prefix))
        assert fits or alone
