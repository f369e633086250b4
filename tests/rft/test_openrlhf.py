"""The function that OpenRLHF loads from a file and calls in a thread, one sample at a time."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import polar.rft.openrlhf
from polar import Comparison, InputError, Message, RewardError, Template
from polar.data.record_rows import label_of
from tests.client.fakes import Fake, reward
from tests.client.test_faults import free_port

PROMPT = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
THINKING = f"{PROMPT}<think>\n"


@pytest.fixture
def reward_func(fake: Fake, served: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Loaded as OpenRLHF does, from the path of the file."""
    monkeypatch.setenv("POLAR_REWARD_ADDRESS", fake.address)
    monkeypatch.setenv("POLAR_REWARD_MODEL", str(served))
    spec = importlib.util.spec_from_file_location("reward_func", polar.rft.openrlhf.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.reward_func


@pytest.fixture
def truth(template: Template) -> Callable[..., Any]:
    def value(output: str, reference: Any = "It is 4.", prompt: Any = PROMPT) -> Any:
        ids = template.encode(Comparison(prompt, reference, output)).sequences()[0]
        return pytest.approx(reward(ids))  # float32

    return value


def test_the_response_is_what_follows_the_prompt_without_its_end(reward_func: Any, truth: Any) -> None:
    outputs = ["It is 4.<|im_end|>\n", "5<pad>", "", "<think>hm</think>4<|eot_id|>"]
    found = reward_func([PROMPT + output for output in outputs], [PROMPT] * 4, ["It is 4."] * 4)
    assert found["rewards"].tolist() == [truth("It is 4."), truth("5"), truth(""), truth("4")]
    assert found["rewards"].dtype == torch.float32
    assert torch.equal(found["scores"], found["rewards"])
    assert {name: value.tolist() for name, value in found["extra_logs"].items()} == {
        "failed": [0, 0, 0, 0],
        "no_answer": [0, 0, 1, 0],
    }


def test_thinking_that_the_template_opens(reward_func: Any, truth: Any) -> None:
    outputs = ["hm</think>4<|im_end|>", "hm, or"]
    found = reward_func([THINKING + output for output in outputs], [THINKING] * 2, ["It is 4."] * 2)
    assert found["rewards"].tolist() == [truth("4", prompt=THINKING), truth("", prompt=THINKING)]


def test_a_label_with_the_prompt_as_it_is(reward_func: Any, truth: Any) -> None:
    label = label_of([{"role": "user", "content": "2+2?"}], ["It is 4."])
    found = reward_func([f"{PROMPT}5"], [PROMPT], [label])
    assert found["rewards"].tolist() == [truth("5", prompt=(Message("user", "2+2?"),))]


def test_labels_with_several_references(reward_func: Any, truth: Any) -> None:
    references = ["It is 4.", "四", "4 5 6"]
    best = max((truth("4", reference).expected for reference in references), default=0)
    for label in (references, label_of(PROMPT, references)):
        assert reward_func([f"{PROMPT}4"], [PROMPT], [label])["rewards"].tolist() == [pytest.approx(best)]


def test_a_label_in_json_that_is_no_label_of_ours_is_a_reference(reward_func: Any, truth: Any) -> None:
    label = '{"prompt": "a"}'
    assert reward_func([f"{PROMPT}5"], [PROMPT], [label])["rewards"].tolist() == [truth("5", label)]


@pytest.mark.parametrize(
    ("query", "label", "message"),
    [
        ("another", "4", "OpenRLHF:0: expected a query that begins with its prompt"),
        (f"{PROMPT}5", "", "OpenRLHF:0: expected a reference"),
        (f"{PROMPT}5", None, "OpenRLHF:0: expected a reference in one of references, found none"),
    ],
)
def test_what_cannot_be_scored_is_an_error(reward_func: Any, query: str, label: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        reward_func([query], [PROMPT], [label])


def test_no_labels_at_all_are_an_error(reward_func: Any) -> None:
    with pytest.raises(InputError, match=r"OpenRLHF: expected labels, found none: .*--data\.label_key"):
        reward_func([f"{PROMPT}5"], [PROMPT], None)


def test_a_failure_is_an_exception_or_the_floor(reward_func: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLAR_REWARD_ADDRESS", f"127.0.0.1:{free_port()}")
    monkeypatch.setenv("POLAR_REWARD_DEADLINE", "0.3")
    with pytest.raises(RewardError, match="OpenRLHF:0: given up at the deadline"):
        reward_func([f"{PROMPT}5"], [PROMPT], ["4"])
    monkeypatch.setenv("POLAR_REWARD_FLOOR", "-20")
    found = reward_func([f"{PROMPT}5"], [PROMPT], ["4"])
    assert (found["rewards"].tolist(), found["extra_logs"]["failed"].tolist()) == ([-20], [1])


def test_threads_share_requests(reward_func: Any, truth: Any, fake: Fake) -> None:
    def call(number: int) -> float:
        return reward_func([f"{PROMPT}answer {number}"], [PROMPT], ["It is 4."])["rewards"].item()

    with ThreadPoolExecutor(32) as pool:
        found = list(pool.map(call, range(320)))
    assert found == [truth(f"answer {number}") for number in range(320)]
    assert len(fake.batches) < 80
