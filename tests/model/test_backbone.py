"""Which way a backbone is computed is found out from itself, and rewards are those of its sequences one at a time."""

import copy
import random
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from polar import InputError, RewardModel, Template
from polar.core.template import EncodedGroup
from polar.model.backbone import prepare
from polar.model.reward_model import _rows
from polar.model.tree import _take, hidden_states, rewards, tree_batch
from tests.conftest import build_model

SMALL = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 3,
    "num_labels": 1,
    "initializer_range": 0.3,
}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}

IN_ROWS: dict[str, dict[str, Any]] = {
    "gpt_neox": {},
    "stablelm": {},
    "nemotron": {},
    "persimmon": {"num_key_value_heads": 4},
    "biogpt": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt_bigcode": {},  # all heads of the queries share one of the keys, which its configuration does not say
    "mixtral": {"num_local_experts": 4, "sliding_window": None},
    "qwen2_moe": {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 24},
    # Keys and values of different widths.
    "deepseek_v3": {
        **EXPERTS,
        **{"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4},
        **{"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 8},
    },
}
SEPARATE: dict[str, dict[str, Any]] = {
    "qwen3_5_text": {**LINEAR, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"]},
    "jamba": {
        **{"num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 2, "attn_layer_offset": 1},
        **{"mamba_d_state": 8, "use_mamba_kernels": False},
    },
    "minimax": {
        **{"num_local_experts": 2, "block_size": 16},
        "layer_types": ["full_attention", "linear_attention"],
    },
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 1.0, "sliding_window": 16},
    "gpt_oss": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16},
    "bloom": {},  # position biases in an attention of its own
}


def group(prefix: int, *branches: int) -> EncodedGroup:
    generator = random.Random(f"{prefix} {branches}")
    tokens = [[generator.randrange(4, 500) for _ in range(length)] for length in (prefix, *branches)]
    return EncodedGroup(tokens[0], tokens[1:], [])


GROUPS = [group(20, 3, 9, 5), group(0, 8), group(12, 6, 6), group(7, 5)]


def build(kind: str, **settings: Any) -> Any:
    """A random model whose rewards spread over several units."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SMALL, **settings})
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager").eval()
    model.score.weight.data.normal_()
    return model


def one_at_a_time(model: Any) -> torch.Tensor:
    return torch.cat([model(torch.tensor([ids])).logits[0] for one in GROUPS for ids in one.sequences()])


@pytest.mark.parametrize(("kind", "rows"), [*((kind, True) for kind in IN_ROWS), *((kind, False) for kind in SEPARATE)])
def test_rewards_and_gradients_are_those_of_one_sequence_at_a_time(kind: str, rows: bool) -> None:
    model = build(kind, **(IN_ROWS | SEPARATE)[kind])
    expected = one_at_a_time(model)
    weights = list(model.parameters())
    asked = torch.autograd.grad(expected.square().sum(), weights, allow_unused=True)
    prepare(model)
    assert model.takes_rows is rows
    found = rewards(model, tree_batch(GROUPS))
    assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-4)
    assert expected.std() > 0.5
    given = torch.autograd.grad(found.square().sum(), weights, allow_unused=True)
    largest = max(gradient.norm() for gradient in asked if gradient is not None)
    for gradient, other in zip(given, asked, strict=True):
        assert (gradient is None) == (other is None)
        assert other is None or (gradient - other).norm() <= 1e-3 * other.norm() + 1e-6 * largest


@pytest.mark.parametrize("kind", IN_ROWS)
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_the_rewards_are_the_same_on_every_cpu(kind: str) -> None:
    """For oneDNN rows are padded, and attention is asked to use it, which some architectures do not pass on."""
    model = build(kind, **IN_ROWS[kind])
    with torch.inference_mode():
        expected = one_at_a_time(model)
        prepare(model)
        found = rewards(model, tree_batch(GROUPS, onednn=True))
    assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-4)


@pytest.mark.parametrize("kind", ["qwen3_5_text", "gemma2"])
def test_states_of_separate_sequences_stand_where_those_of_the_row_do(kind: str) -> None:
    model = build(kind, **SEPARATE[kind])
    batch = tree_batch(GROUPS)
    with torch.no_grad():
        first = GROUPS[0].sequences()[2]
        expected = model.base_model(torch.tensor([first]), output_hidden_states=True)
        prepare(model)
        found = hidden_states(model, batch, output_hidden_states=True)
    places = [*range(20), *range(32, 37)]  # the prefix and the third branch of the first group
    assert len(found.hidden_states) == len(expected.hidden_states) == 3
    for ours, theirs in zip(
        (*found.hidden_states, found.last_hidden_state),
        (*expected.hidden_states, expected.last_hidden_state),
        strict=True,
    ):
        assert ours.shape == (1, batch.ids_1T.shape[1], 32)
        assert torch.allclose(ours[0, places], theirs[0], atol=1e-4)


class Faint(torch.nn.Module):
    """A feed-forward part that takes a millionth from somewhere else."""

    def __init__(self, part: torch.nn.Module, where: str) -> None:
        super().__init__()
        self.part, self.where = part, where

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        elsewhere = states.cumsum(1) if self.where == "before" else states.sum((0, 1), keepdim=True) * 1e6
        return self.part(states) + 1e-6 * elsewhere


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_state_carries_on_is_noticed_however_little_it_is(dtype: torch.dtype) -> None:
    model = build("llama").to(dtype)
    model.model.layers[1].mlp = Faint(model.model.layers[1].mlp, "before")
    prepare(model)
    assert not model.takes_rows


def test_a_model_whose_rewards_depend_on_the_batch_is_refused() -> None:
    model = build("llama")
    model.model.layers[1].mlp = Faint(model.model.layers[1].mlp, "everywhere")
    with pytest.raises(InputError, match="depends on what is computed beside it"):
        prepare(model)


def test_an_encoder_is_refused() -> None:
    config = AutoConfig.for_model("bert", **SMALL)
    with pytest.raises(InputError, match="BertForSequenceClassification: has no linear layer `score`"):
        prepare(AutoModelForSequenceClassification.from_config(config))


def test_finding_out_leaves_the_model_as_it_was(llama: RewardModel) -> None:
    model = copy.deepcopy(llama.model).train()
    del model.takes_rows
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    prepare(model)
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert not any(weight.is_inference() for weight in (*model.parameters(), *model.buffers()))


def test_hooks_are_there_once_when_a_model_is_built(template: Template) -> None:
    built = build_model("llama", template)
    again = RewardModel(built.model, built.tokenizer, template)
    layer = again.model.model.layers[-1]
    for part in (layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp):
        assert list(part._forward_pre_hooks.values()).count(_take) == 1


def test_separate_sequences_keep_to_the_budget_with_their_padding() -> None:
    groups = [group(50, 2, 2, 2), group(0, 100), group(0, 3), group(0, 3)]
    rows = list(_rows(groups, 210, shared=False))
    lengths = [[len(piece.prefix) + len(piece.branches[0]) for _, piece in row] for row in rows]
    assert lengths == [[52, 52, 52], [100, 3], [3]]
    assert [index for row in rows for index, _ in row] == [0, 0, 0, 1, 2, 3]
    assert [len(row) for row in _rows(groups, 1, shared=False)] == [1] * 6


def test_scoring_in_separate_sequences_is_independent_of_neighbours(template: Template) -> None:
    model = build("qwen3_5_text", **SEPARATE["qwen3_5_text"])
    plain = copy.deepcopy(model)
    scored = RewardModel(model, build_model("llama", template).tokenizer, template)
    alone = [scored.score_encoded([one])[0] for one in GROUPS]
    for budget in (None, 60, 1):
        for found, expected in zip(scored.score_encoded(GROUPS, batch_tokens=budget), alone, strict=True):
            assert found == pytest.approx(expected, abs=1e-4)
    with torch.no_grad():
        assert [value for one in alone for value in one] == pytest.approx(one_at_a_time(plain).tolist(), abs=1e-4)


def test_positions_that_depend_on_the_longest_input_are_refused() -> None:
    parameters = {
        **{"rope_type": "longrope", "rope_theta": 10000.0, "factor": 16.0, "original_max_position_embeddings": 24},
        **{"short_factor": [1.0] * 4, "long_factor": [4.0] * 4},
    }
    model = build("phi3", sliding_window=None, original_max_position_embeddings=24, rope_parameters=parameters)
    prepare(model)
    with torch.inference_mode():
        expected = model(torch.tensor(group(14, 10).sequences())).logits[0].tolist()
        assert rewards(model, tree_batch([group(14, 10)])).tolist() == pytest.approx(expected, abs=1e-4)
        with pytest.raises(InputError, match="an input has 25 tokens, but from 24 on"):
            rewards(model, tree_batch([group(14, 10), group(20, 5)]))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}),
        ("qwen2_moe", {**IN_ROWS["qwen2_moe"], "use_sliding_window": False}),
    ],
)
def test_a_window_that_no_layer_uses_is_no_limit(kind: str, settings: dict[str, Any]) -> None:
    model = build(kind, **settings)
    assert model.config.sliding_window is not None
    assert set(model.config.layer_types) == {"full_attention"}
    prepare(model)
    with torch.inference_mode():
        assert rewards(model, tree_batch(GROUPS)).tolist() == pytest.approx(one_at_a_time(model).tolist(), abs=1e-4)
