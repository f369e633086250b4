"""The wire formats of other servers, as their clients see them.

The expected JSON is what the real engines answered (vLLM 0.32, SGLang 0.5.23) or what their sources say (LMDeploy
0.18, OpenRLHF 0.11); ids and times differ.
"""

import base64
import json
import struct
from pathlib import Path
from typing import Any

import pytest

from polar import Comparison, RewardModel
from polar.core.template import seed_text
from polar.data.record_rows import label_of
from polar.model.internlm2 import convert
from polar.serving.checkpoint import load_checkpoint
from polar.serving.service import Service
from tests.serving.serving import CPU, flat, nano, post, service

FIXTURES = Path(__file__).parents[1] / "fixtures" / "golden"
TOLERANCE = 1e-5

PROMPT, REFERENCE, OUTPUTS = "What is the capital of China?", "Beijing.", ("Beijing.", "Shanghai.", "It is Beijing.")
TEXTS = flat(PROMPT, REFERENCE, *OUTPUTS)
BOS, SPLIT, SCORE = 1, 2, 3


def ids() -> list[list[int]]:
    encodings = nano().template.tokenizer.encode_batch(TEXTS, add_special_tokens=False)
    return [[BOS, *encoding.ids] for encoding in encodings]


@pytest.fixture(scope="module")
def expected() -> list[float]:
    seed = RewardModel.load("polar-nano", device="cpu", compat="seed")
    return seed.score([Comparison(PROMPT, REFERENCE, output) for output in OUTPUTS])


def original_client(server_type: str, address: str, texts: list[str], of: Service) -> Any:
    """What the original POLAR client sends and reads; `address` is what the user configures after the port."""
    if server_type == "sglang":
        answer = post(f"{address}/classify", {"model": "polar-nano", "text": texts}, of).json()
        return [item["embedding"][0] for item in answer]
    answer = post(f"{address}/pooling", {"input": texts}, of).json()
    if server_type == "vllm":
        return [item["data"][-1][0] for item in answer["data"]]
    return [item["data"] for item in answer["data"]]


ORIGINAL = [("sglang", ""), ("vllm", "/token_classify"), ("lmdeploy", "/lmdeploy")]


@pytest.mark.parametrize(("server_type", "address"), ORIGINAL)
def test_the_original_client_gets_right_rewards(server_type: str, address: str, expected: list[float]) -> None:
    assert original_client(server_type, address, TEXTS, service()) == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize(("server_type", "address"), ORIGINAL)
def test_the_original_client_gets_the_original_rewards_of_an_official_checkpoint(
    server_type: str, address: str, tmp_path: Path
) -> None:
    convert(FIXTURES / "model1", tmp_path / "converted")
    items = [
        item for item in json.loads((FIXTURES / "golden.json").read_text("utf-8"))["items"] if item["n_tokens"] < 1000
    ]
    of = service(load_checkpoint(str(tmp_path / "converted"), CPU))
    rewards = original_client(server_type, address, [item["encoded"] for item in items], of)
    assert rewards == pytest.approx([item["reward"] for item in items], abs=2e-5)
    assert len(items) > 15


def test_vllm_classify(expected: list[float]) -> None:
    for inputs in (TEXTS, ids()):
        answer = post("/classify", {"model": "polar-nano", "input": inputs, "use_activation": False}).json()
        tokens = sum(map(len, ids()))
        assert answer.pop("id").startswith("classify-")
        assert isinstance(answer.pop("created"), int)
        data = answer.pop("data")
        assert answer == {
            "object": "list",
            "model": "polar-nano",
            "usage": {
                "prompt_tokens": tokens,
                "total_tokens": tokens,
                "completion_tokens": 0,
                "prompt_tokens_details": None,
                "completion_tokens_details": None,
            },
        }
        assert [item.pop("probs")[0] for item in data] == pytest.approx(expected, abs=TOLERANCE)
        assert data == [{"index": index, "label": "LABEL_0", "num_classes": 1} for index in range(3)]


@pytest.mark.parametrize("single", [TEXTS[0], ids()[0]], ids=["text", "ids"])
def test_a_single_input_gives_a_list_in_vllm_and_one_object_in_sglang(
    single: str | list[int], expected: list[float]
) -> None:
    field = "text" if isinstance(single, str) else "input_ids"
    assert len(post("/classify", {"input": single}).json()["data"]) == 1
    assert post("/classify", {field: single}).json()["embedding"] == pytest.approx(expected[:1], abs=TOLERANCE)


@pytest.mark.parametrize(
    ("path", "prefix", "shape"),
    [
        ("/pooling", "pooling-", lambda reward: [reward]),
        ("/token_classify/pooling", "pooling-", lambda reward: [[reward]]),
        ("/lmdeploy/pooling", "pool-", lambda reward: reward),
    ],
)
def test_pooling_in_its_three_shapes(path: str, prefix: str, shape: Any, expected: list[float]) -> None:
    answer = post(path, {"model": None, "input": TEXTS}).json()
    assert answer["id"].startswith(prefix)
    assert answer["object"] == "list"
    assert answer["data"] == [
        {"index": index, "object": "pooling", "data": shape(pytest.approx(reward, abs=TOLERANCE))}
        for index, reward in enumerate(expected)
    ]


def test_pooling_in_base64(expected: list[float]) -> None:
    answer = post("/pooling", {"input": TEXTS, "encoding_format": "base64", "task": "classify"}).json()
    values = [struct.unpack("<f", base64.b64decode(item["data"]))[0] for item in answer["data"]]
    assert values == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("path", ["/classify", "/encode"])
def test_sglang(path: str, expected: list[float]) -> None:
    for request in ({"text": TEXTS, "model": "whatever"}, {"input_ids": ids()}):
        answer = post(path, request).json()
        assert [item["embedding"] for item in answer] == [[pytest.approx(reward, abs=TOLERANCE)] for reward in expected]
        assert [item["meta_info"]["prompt_tokens"] for item in answer] == list(map(len, ids()))
        assert set(answer[0]["meta_info"]) == {
            "id",
            "finish_reason",
            "prompt_tokens",
            "weight_version",
            "num_retractions",
            "e2e_latency",
            "response_sent_to_client_ts",
        }


def test_openrlhf_sends_prompt_and_response_as_one_text_and_the_reference_as_label() -> None:
    prompt = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    query = [f"{prompt}It is 4.<|im_end|>\n", f"{prompt}5<pad>"]  # a special token of this checkpoint's tokenizer
    request = {"query": query, "prompts": [prompt] * 2, "labels": ["4", "4"]}
    answer = post("/get_reward", request).json()
    model = nano().model
    assert model is not None
    expected = model.score([Comparison(prompt, "4", "It is 4."), Comparison(prompt, "4", "5")])
    assert answer["rewards"] == pytest.approx(expected, abs=TOLERANCE)
    assert answer["scores"] == answer["rewards"]
    assert answer["extra_logs"] == {"truncated": [0.0, 0.0]}


def test_openrlhf_sends_nothing_to_some_of_its_servers() -> None:
    answer = post("/get_reward", {"query": [], "prompts": [], "labels": []})
    assert (answer.status_code, answer.json()) == (200, {"rewards": [], "scores": [], "extra_logs": {}})


def test_texts_get_the_bos_of_training_once_and_ids_are_taken_as_they_are() -> None:
    def reward(value: object) -> float:
        return post("/classify", {"input": value}).json()["data"][0]["probs"][0]

    with_bos, without = ids()[0], ids()[0][1:]
    assert reward(TEXTS[0]) == reward("<s>" + TEXTS[0]) == reward(with_bos)
    assert reward(without) != reward(with_bos)


def test_special_tokens_in_flat_texts_are_special() -> None:
    text = seed_text(nano().template.tokenizer, nano().template.settings, PROMPT, REFERENCE, OUTPUTS[0])[0]
    assert text == TEXTS[0]
    assert ids()[0].count(SPLIT) == 1
    assert ids()[0][-1] == SCORE


LONG = flat(PROMPT, REFERENCE, "word " * 2000)[0]


NO_REFERENCE = {"query": ["ab", "ac"], "prompts": ["a", "a"], "labels": ["b", " \n"]}
OF_THE_FUNCTION = {"query": ["ab"], "prompts": ["a"], "labels": [label_of("a", ["b"])]}


@pytest.mark.parametrize(
    ("path", "request_", "status", "param", "words"),
    [
        ("/classify", {"input": [TEXTS[0], LONG]}, 400, "input[1]", "maximum context length is 1024 tokens"),
        ("/pooling", {"input": [TEXTS[0]], "truncate_prompt_tokens": 5}, 400, "input[0]", "length is 5 tokens"),
        ("/classify", {"text": ["", TEXTS[0]]}, 400, "text[0]", "not an input of this model"),
        ("/classify", {"input": ["What is it?" + "<|score|>"]}, 400, "input[0]", "<|reward|> (id 2)"),
        ("/classify", {"input": [TEXTS[0].removesuffix("<|score|>")]}, 400, "input[0]", "at the end <|score|> (id 3)"),
        ("/encode", {"input_ids": [[1, 2, 8192, 3]]}, 400, "input_ids[0]", "from 0 to 8191"),
        ("/encode", {"input_ids": [[1, 2, -1, 3]]}, 400, "input_ids[0]", "from 0 to 8191"),
        ("/classify", {"model": "gpt-4", "input": TEXTS}, 404, "model", "this server has `polar-nano`"),
        ("/pooling", {"input": TEXTS, "task": "embed"}, 422, "task", "'classify'"),
        ("/pooling", {"input": []}, 422, "input", "found an empty list"),
        ("/pooling", {"input": [TEXTS[0], [1, 2]]}, 422, "input[1]", "expected a string"),
        ("/pooling", {"input": [[1, 2], [True]]}, 422, "input[1]", "integers, found true"),
        ("/pooling", {"input": [1.5]}, 422, "input[0]", "expected a list of token ids"),
        ("/pooling", {"input": ["a"] * 8193}, 422, "input", "8192 or fewer"),
        ("/pooling", {"input": ["\ud800"]}, 422, "input[0]", "lone surrogate"),
        ("/classify", {"input": None}, 422, "input", "found null"),
        ("/classify", {}, 422, "text", "either text or input_ids"),
        ("/classify", {"text": "a", "input_ids": [1]}, 422, "text", "found both"),
        ("/get_reward", {"query": ["ab"], "prompts": ["b"], "labels": ["c"]}, 422, "query[0]", "begin with prompts[0]"),
        ("/get_reward", {"query": ["ab"], "prompts": ["a"], "labels": []}, 422, "labels", "as many as in query (1)"),
        ("/get_reward", {"query": ["ab"], "prompts": ["a"], "labels": [None]}, 422, "labels[0]", "found null"),
        ("/get_reward", NO_REFERENCE, 422, "labels[1]", "expected a reference, found only white space"),
        ("/get_reward", OF_THE_FUNCTION, 422, "labels[0]", "which only the function polar.rft.openrlhf reads"),
    ],
)
def test_what_cannot_be_scored_is_refused_by_name(
    path: str, request_: dict[str, Any], status: int, param: str, words: str
) -> None:
    answer = post(path, request_)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, status, param)
    assert words in error["message"]
    assert error["message"].startswith(param) or status == 404
    assert "\n" not in error["message"]
