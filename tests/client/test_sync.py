"""`RewardModelClient`: the interface of the original client, from any thread and inside running loops."""

import asyncio
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from polar import Comparison, Group, InputError, RewardError, RewardModelClient, Template
from polar.client.transport import Limits
from polar.model.internlm2 import convert
from tests.client.fakes import Fake, Ids, Reply, reward
from tests.client.test_client import GROUPS, rewards_of

FIXTURES = Path(__file__).parents[1] / "fixtures" / "golden"
ITEMS = {item["id"]: item for item in json.loads((FIXTURES / "golden.json").read_text("utf-8"))["items"]}
DATA = [
    {"prompt": "What is the capital of China?", "reference": "Beijing.", "output": "Shanghai."},
    {
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 2 3"}],
        "reference": [{"role": "assistant", "content": "4"}],
        "output": "5",
        "wrapper": "pretrain",
    },
]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("converted") / "model1"
    convert(FIXTURES / "model1", target)
    return target


@pytest.mark.parametrize("name", list(ITEMS))
def test_encode_gives_the_texts_of_the_original_client(name: str, converted: Path) -> None:
    item = ITEMS[name]
    names = ("max_length", "max_response_length", "response_cut_side")
    with RewardModelClient(converted, *(item[name] for name in names)) as client:
        data = {key: item[key] for key in ("prompt", "reference", "output", "wrapper")}
        assert client.encode(data) == item["encoded"]
        assert client.encode([data, data]) == [item["encoded"]] * 2


@pytest.mark.parametrize("name", list(ITEMS))
def test_texts_and_seed_calls_send_the_ids_of_the_original_training(name: str, converted: Path) -> None:
    item = ITEMS[name]
    names = ("max_length", "max_response_length", "response_cut_side")
    data = {key: item[key] for key in ("prompt", "reference", "output", "wrapper")}
    with (
        Fake("sglang") as fake,
        RewardModelClient(
            converted, *(item[name] for name in names), "sglang", fake.address, compat="seed", probe=False
        ) as client,
    ):
        assert client.sglang_request_reward(item["encoded"]) == client(data) == [reward(item["input_ids"])]
    assert fake.batches[1:] == [[item["input_ids"]]] * 2


@pytest.mark.parametrize("kind", ["sglang", "vllm", "lmdeploy"])
def test_the_request_methods_and_calls_give_the_rewards(kind: Any, served: Path, template: Template) -> None:
    comparisons = [
        Comparison("What is the capital of China?", "Beijing.", "Shanghai."),
        Comparison("Be brief.\n1 2 3", "4", "5", wrapper="pretrain"),
    ]
    expected = [reward(template.encode(comparison).sequences()[0]) for comparison in comparisons]
    with Fake(kind) as fake, RewardModelClient(served, server_type=kind, server_address=fake.address) as client:
        request = getattr(client, f"{kind}_request_reward")
        assert client(DATA) == request(client.encode(DATA)) == expected
        assert client(DATA[0]) == request(client.encode(DATA[0])) == expected[:1]


def test_a_request_method_asks_its_own_engine(served: Path) -> None:
    with (
        Fake("lmdeploy", says_so=False) as fake,
        RewardModelClient(served, server_type="sglang", server_address=fake.address) as client,
    ):
        assert len(client.lmdeploy_request_reward(client.encode(DATA))) == 2
    assert set(fake.paths) == {"/pooling"}


def test_groups_comparisons_and_ids(served: Path, template: Template) -> None:
    seen: list[int] = []
    with Fake("vllm") as fake, RewardModelClient(served, server_address=fake.address) as client:
        client.connect()
        assert client.score_groups(GROUPS, progress=seen.append) == rewards_of(template, GROUPS)
        assert client.score([Comparison("a", "b", "c")]) == rewards_of(template, [Group("a", "b", ("c",))])[0]
        assert client.score_ids([[1, 5, 3]]) == [reward([1, 5, 3])]
    assert sum(seen) == 13


def test_a_failure_is_an_exception_that_keeps_the_good_ones(served: Path) -> None:
    def refuse(number: int, path: str, sequences: list[Ids]) -> Reply | None:
        return Reply(400, "too long") if number and max(map(len, sequences)) > 60 else None

    data = [*DATA, {"prompt": "a b " * 60, "reference": "c", "output": "d"}]
    with (
        Fake("vllm", refuse) as fake,
        RewardModelClient(served, server_address=fake.address) as client,
        pytest.raises(RewardError, match="1 of 3 rewards failed: input 2: .*too long") as caught,
    ):
        client(data)
    assert [value is None for value in caught.value.rewards] == [False, False, True]


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        (
            {"prompt": "a", "reference": "b"},
            'item:0: field "output": expected a string or a list of messages, found no',
        ),
        ({"prompt": "a", "reference": None, "output": "c"}, 'field "reference": expected .*, found null'),
        ({"prompt": "a", "reference": "b", "output": 3}, "found the number 3"),
        ({"prompt": "a", "reference": "b", "output": "half \ud83d"}, "lone surrogate"),
        ({"prompt": "a", "reference": "b", "output": "c", "wrapper": "rlhf"}, '"sft" or "pretrain"'),
        ({"prompt": [{"role": "user"}], "reference": "b", "output": "c"}, "a message with role and content"),
    ],
)
def test_a_bad_item_is_one_clear_line(item: dict[str, Any], reason: str, served: Path) -> None:
    with RewardModelClient(served) as client:
        for method in (client, client.encode):
            with pytest.raises(InputError, match=reason) as error:
                method([item])
            assert "\n" not in str(error.value)
    with pytest.raises(InputError, match='must be "right" or "left"'):
        RewardModelClient(served, response_cut_side="middle")  # type: ignore[arg-type]


def test_it_works_inside_a_running_loop(served: Path) -> None:
    """As in Jupyter."""

    async def cell() -> list[float]:
        with Fake("vllm") as fake, RewardModelClient(served, server_address=fake.address) as client:
            return client.score_ids([[1, 5, 3], [1, 6, 3]])

    assert asyncio.run(cell()) == [reward([1, 5, 3]), reward([1, 6, 3])]


def test_threads_share_one_client(served: Path) -> None:
    limits = Limits(concurrency=3)
    with (
        Fake("vllm") as fake,
        RewardModelClient(served, server_address=fake.address, limits=limits) as client,
        ThreadPoolExecutor(16) as pool,
    ):
        found = list(pool.map(lambda n: client.score_ids([[1, n, 3]]), range(5, 69)))
    assert found == [[reward([1, n, 3])] for n in range(5, 69)]
    assert fake.most_active <= 3
    assert fake.batches.count(fake.batches[0]) <= 4  # proven once, and again when connections were opened


def test_it_closes_cleanly_and_says_so_afterwards(served: Path) -> None:
    before = threading.active_count()
    with Fake("vllm") as fake:
        client = RewardModelClient(served, server_address=fake.address)
        client.score_ids([[1, 5, 3]])
        client.close()
        client.close()
        with pytest.raises(RuntimeError, match="the client is closed"):
            client.score_ids([[1, 5, 3]])
        forgotten = RewardModelClient(served, server_address=fake.address)
        forgotten.score_ids([[1, 5, 3]])
        del forgotten
    assert not [thread for thread in threading.enumerate() if thread.name == "polar-client"]
    assert threading.active_count() <= before + 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process")
def test_a_forked_process_is_told_to_make_its_own(served: Path) -> None:
    with RewardModelClient(served) as client:
        child = os.fork()
        if not child:
            try:
                client.score_ids([[1, 5, 3]])
            except RuntimeError:
                os._exit(7)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
