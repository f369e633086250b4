import asyncio
import random
import threading
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from polar import EncodedGroup, RewardModel
from polar.serving.batcher import Batcher
from polar.serving.checkpoint import Checkpoint
from polar.serving.errors import NoRewardError
from polar.serving.metrics import Metrics
from tests.serving.serving import nano

TOLERANCE = 1e-5


class Engine:
    """A model that computes only while it is allowed to, and notes what it is given."""

    def __init__(self, bad: int | None = None) -> None:
        self.batches: list[list[EncodedGroup]] = []
        self.free = threading.Event()
        self.free.set()
        self.bad = bad

    def score_encoded(self, groups: Sequence[EncodedGroup], *, batch_tokens: int) -> list[list[float]]:
        self.free.wait(30)
        self.batches.append(list(groups))
        if any(self.bad in ids for group in groups for ids in group.sequences()):
            raise FloatingPointError("the reward of candidate 0 of group 0 is nan")
        return [[float(ids[-1]) for ids in group.sequences()] for group in groups]

    def seen(self) -> list[list[int]]:
        """The last tokens of each batch, in order."""
        return [sorted(ids[-1] for group in batch for ids in group.sequences()) for batch in self.batches]


def checkpoint(engine: Engine) -> Checkpoint:
    return replace(nano(), model=engine)  # type: ignore[arg-type]


def one(*ids: int) -> list[EncodedGroup]:
    return [EncodedGroup([], [list(ids)], [])]


def random_groups(seed: int, groups: int, branches: int) -> list[EncodedGroup]:
    generator = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [generator.randrange(10, 8000) for _ in range(count)]

    return [EncodedGroup([1, *tokens(60), 2, *tokens(20)], [[*tokens(20), 3] for _ in range(branches)], []) for _ in range(groups)]  # noqa: E501  # fmt: skip


def separately(model: RewardModel, groups: Sequence[EncodedGroup]) -> list[list[float]]:
    return [[model.score_encoded([EncodedGroup([], [ids], [])])[0][0] for ids in group.sequences()] for group in groups]


@pytest.mark.parametrize("batch_tokens", [100, 500, 4096])
@pytest.mark.parametrize("told", [True, False], ids=["structured", "flat"])
def test_rewards_equal_those_of_separate_texts_however_they_are_batched(batch_tokens: int, told: bool) -> None:
    model = nano().model
    assert model is not None
    groups = random_groups(0, groups=3, branches=4)
    asked = groups if told else [EncodedGroup([], [ids for group in groups for ids in group.sequences()][::-1], [])]

    async def run() -> list[list[list[float]]]:
        batcher = Batcher(batch_tokens, Metrics())
        return await asyncio.gather(*(batcher.score(nano(), asked) for _ in range(3)))

    expected = separately(model, asked)
    for rewards in asyncio.run(run()):
        for own, values in zip(rewards, expected, strict=True):
            assert own == pytest.approx(values, abs=TOLERANCE)


def test_concurrent_requests_of_one_text_each_share_their_prefix() -> None:
    (group,) = random_groups(1, groups=1, branches=8)
    metrics = Metrics()

    async def run() -> None:
        batcher = Batcher(4096, metrics)
        await asyncio.gather(*(batcher.score(nano(), one(*ids)) for ids in group.sequences()))

    asyncio.run(run())
    lone = sum(map(len, group.sequences()))
    tree = len(group.prefix) + sum(map(len, group.branches))
    assert metrics.value("polar_input_tokens_total") == lone
    # A request that arrives first and alone is computed at once; all others share.
    assert metrics.value("polar_forwarded_tokens_total") <= tree + len(group.prefix)


def test_what_arrives_while_a_batch_runs_is_in_the_next_one_in_order_of_arrival() -> None:
    engine = Engine()

    async def run() -> None:
        batcher = Batcher(12, Metrics())
        engine.free.clear()
        tasks = []
        for number in range(7):
            tasks.append(asyncio.create_task(batcher.score(checkpoint(engine), one(0, 10 * number, number, number))))
            await asyncio.sleep(0.01)
        engine.free.set()
        await asyncio.gather(*tasks)

    asyncio.run(run())
    # Every task has a checkpoint of its own, so only the model counts.
    assert engine.seen() == [[0], [1, 2, 3], [4, 5, 6]]


def test_a_large_request_is_spread_over_batches_and_joined_in_order() -> None:
    engine = Engine()
    inputs = [[number // 10, number, number] for number in range(100)]

    async def run() -> list[list[float]]:
        return await Batcher(30, Metrics()).score(checkpoint(engine), [EncodedGroup([], inputs, [])])

    assert asyncio.run(run()) == [[float(number) for number in range(100)]]
    assert all(len(batch) <= 10 for batch in engine.seen())
    assert len(engine.batches) >= 10


def test_a_group_stays_whole_when_it_fits_into_a_batch() -> None:
    engine = Engine()
    prefix = list(range(50, 90))
    groups = [EncodedGroup([number, *prefix], [[7, number]] * 5, []) for number in range(4)]

    async def run() -> None:
        await Batcher(80, Metrics()).score(checkpoint(engine), groups)

    asyncio.run(run())
    assert [len(batch) for batch in engine.batches] == [1, 1, 1, 1]


def test_a_request_whose_client_is_gone_leaves_the_queue() -> None:
    engine = Engine()

    async def run() -> list[list[float]]:
        batcher = Batcher(4, Metrics())
        engine.free.clear()
        tasks = []
        for number in range(4):
            tasks.append(asyncio.create_task(batcher.score(checkpoint(engine), one(0, 0, 0, number))))
            await asyncio.sleep(0.01)
        tasks[2].cancel()
        await asyncio.sleep(0.01)
        engine.free.set()
        with pytest.raises(asyncio.CancelledError):
            await tasks[2]
        return await tasks[3]

    assert asyncio.run(run()) == [[3.0]]
    assert engine.seen() == [[0], [1], [3]]


def test_one_bad_input_fails_alone_and_is_named() -> None:
    engine = Engine(bad=99)
    good = [[1, number, number] for number in range(9)]

    async def run() -> list[object]:
        batcher = Batcher(1000, Metrics())
        engine.free.clear()
        first = asyncio.create_task(batcher.score(checkpoint(engine), one(5, 5, 5)))
        await asyncio.sleep(0.01)
        mixed = asyncio.create_task(batcher.score(checkpoint(engine), [EncodedGroup([], [*good, [1, 99, 4]], [])]))
        others = [asyncio.create_task(batcher.score(checkpoint(engine), one(2, number, number))) for number in range(9)]
        await asyncio.sleep(0.05)
        engine.free.set()
        await first
        return await asyncio.gather(mixed, *others, return_exceptions=True)

    failed, *others = asyncio.run(run())
    assert others == [[[float(number)]] for number in range(9)]
    assert isinstance(failed, NoRewardError)
    assert failed.number == 9


def test_no_memory_for_a_whole_batch_is_no_failure() -> None:
    class Small(Engine):
        def score_encoded(self, groups: Sequence[EncodedGroup], *, batch_tokens: int) -> list[list[float]]:
            if sum(len(group.branches) for group in groups) > 2:
                raise torch.OutOfMemoryError("out of memory")
            return super().score_encoded(groups, batch_tokens=batch_tokens)

    inputs = [[9, number] for number in range(8)]

    async def run() -> list[list[float]]:
        return await Batcher(1000, Metrics()).score(checkpoint(Small()), [EncodedGroup([], inputs, [])])

    assert asyncio.run(run()) == [[float(number) for number in range(8)]]


def test_a_batch_never_mixes_checkpoints() -> None:
    old, new = Engine(), Engine()

    async def run() -> None:
        batcher = Batcher(1000, Metrics())
        old.free.clear()
        engines = [old, old, new, new, old]
        tasks = []
        for number, engine in enumerate(engines):
            tasks.append(asyncio.create_task(batcher.score(checkpoint(engine), one(0, number))))
            await asyncio.sleep(0.01)
        old.free.set()
        await asyncio.gather(*tasks)

    asyncio.run(run())
    assert old.seen() == [[0], [1], [4]]
    assert new.seen() == [[2, 3]]


def test_nothing_to_score_is_answered_with_nothing() -> None:
    async def run() -> list[list[float]]:
        return await Batcher(10, Metrics()).score(nano(), [EncodedGroup([1], [], [])])

    assert asyncio.run(run()) == [[]]
