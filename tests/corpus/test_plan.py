from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar.core.errors import InputError
from polar.core.records import Message, prompt_id
from polar.corpus.plan import Batch, Plan, Prompt
from polar.corpus.pool import Pool
from tests.corpus.sampling import pool, prompts

DESIGNS = st.sampled_from([Plan(pool()), Plan(pool(), seed=5), Plan(pool("abc"), "grid", samples=3)])


@given(DESIGNS, st.integers(1, 30))
def test_every_sample_has_one_place(plan: Plan, count: int) -> None:
    batches = plan.shard(7, prompts(count))
    items = [item for batch in batches for item in batch.items]
    assert sorted(item.row for item in items) == list(range(count * plan.samples_per_prompt("sft")))
    assert [batch.number for batch in batches] == list(range(len(batches)))
    assert {batch.shard for batch in batches} == {7}
    assert all(1 <= len(batch.items) <= batch.policy.engine.batch_size for batch in batches)
    cells = Counter((item.prompt.id, batch.policy.name, item.sample) for batch in batches for item in batch.items)
    assert set(cells.values()) == {1}


def seeds(batches: list[Batch]) -> dict[tuple[str, str, int], int]:
    return {(item.prompt.id, batch.policy.name, item.sample): item.seed for batch in batches for item in batch.items}


def test_seeds_differ_and_depend_on_nothing_but_the_sample() -> None:
    plan, some = Plan(pool()), prompts(300)
    everything = seeds(plan.shard(0, some))
    assert len(set(everything.values())) == len(everything)
    assert all(0 <= seed < 2**31 for seed in everything.values())
    assert everything.items() >= seeds(plan.shard(3, some[100:150])).items()


def test_draws_are_uniform_over_the_pool_for_both_places() -> None:
    batches = Plan(pool()).shard(0, prompts(4000))
    first = Counter(batch.policy.name for batch in batches for item in batch.items if item.sample == 1)
    every = Counter(batch.policy.name for batch in batches for item in batch.items if item.sample == 0)
    for name in "abcd":
        assert abs(first[name] - 1000) < 110  # four standard deviations
        assert abs(every[name] - first[name] - 1000) < 110


def test_base_policies_continue_and_chat_policies_answer() -> None:
    engine = {"type": "vllm", "model": "m"}
    mixed = Pool.model_validate(
        {
            "policies": [
                {"name": "base", "kind": "base", "engine": engine},
                {"name": "chat", "kind": "chat", "engine": engine},
                {"name": "strict", "kind": "chat", "engine": engine, "system": "Be brief."},
            ]
        }
    )
    conversation = (Message("user", "Hi"), Message("assistant", "Hello."), Message("user", "Bye"))
    some = [
        Prompt(prompt_id("Once"), "Once", "pretrain"),
        Prompt(prompt_id("Hi"), "Hi", "sft"),
        Prompt(prompt_id(conversation), conversation, "sft"),
    ]
    asked = {
        batch.policy.name: [item.request(batch.policy).prompt for item in batch.items]
        for batch in Plan(mixed, "grid", samples=1).shard(0, some)
    }
    system = Message("system", "Be brief.")
    assert asked == {
        "base": ["Once"],
        "chat": [(Message("user", "Hi"),), conversation],
        "strict": [(system, Message("user", "Hi")), (system, *conversation)],
    }


def test_a_pool_that_is_too_small_is_refused() -> None:
    Plan(pool("ab")).check({"sft"})
    Plan(pool("a"), "grid").check({"sft"})
    with pytest.raises(InputError, match="has 1 chat policies.*the paper design needs 2"):
        Plan(pool("a")).check({"sft"})
    with pytest.raises(InputError, match="has 0 base policies.*wrapper pretrain"):
        Plan(pool("ab")).check({"sft", "pretrain"})
