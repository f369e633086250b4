import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polar import Group, Message, RewardModel
from polar.core.errors import InputError
from polar.core.records import Aggregate, aggregated
from polar.serving.checkpoint import Calibration, load_checkpoint
from tests.serving.serving import CPU, nano, post, service

TOLERANCE = 1e-5
BODY = {"prompt": "2+2?", "reference": "It is 4.", "candidates": ["4", "It is 4.", "five", "It is 5."]}


def model() -> RewardModel:
    found = nano().model
    assert found is not None
    return found


def rewards(**more: object) -> list[float]:
    answer = post("/v1/rewards", BODY | more)
    assert answer.status_code == 200, answer.text
    return answer.json()["rewards"]


def test_rewards_are_those_of_the_model_and_truncation_is_told() -> None:
    long = "word " * 600
    body = {"prompt": long, "reference": "short", "candidates": ["a", long], "id": "mine", "model": "polar-nano"}
    answer = post("/v1/rewards", body).json()
    group = Group(long, "short", ("a", long))
    encoded = model().template.encode_group(group)
    assert answer["rewards"] == pytest.approx(model().score_groups([group])[0], abs=TOLERANCE)
    assert (answer["id"], answer["model"], answer["output"]) == ("mine", "polar-nano", "raw")
    for index, candidate in enumerate(answer["candidates"]):
        cut = encoded.truncations[index]
        assert candidate["index"] == index
        assert candidate["reward"] == answer["rewards"][index]
        (detail,) = candidate["references"]
        assert detail["truncation"] == {"prompt": cut.prompt, "reference": cut.reference, "candidate": cut.output}
        assert detail["tokens"] == len(encoded.sequences()[index])
    assert answer["candidates"][1]["references"][0]["truncation"]["candidate"] > 300
    assert answer["usage"]["total_tokens"] == sum(map(len, encoded.sequences()))


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.text(max_size=30), min_size=1, max_size=4), st.text(max_size=20), st.sampled_from(["sft", "pretrain"])
)
def test_any_text_is_scored_as_by_the_model(candidates: list[str], prompt: str, wrapper: str) -> None:
    body = {"prompt": prompt, "reference": "<|score|>", "candidates": candidates, "wrapper": wrapper}
    answer = post("/v1/rewards", body).json()
    (expected,) = model().score_groups([Group(prompt, "<|score|>", tuple(candidates), wrapper=wrapper)])  # type: ignore[arg-type]
    assert answer["rewards"] == pytest.approx(expected, abs=TOLERANCE)


def test_messages_are_joined_as_in_training_and_a_string_is_never_read_as_json() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "?"}]},
    ]
    spelt = '[{"role": "user", "content": "x"}]'
    answer = post("/v1/rewards", {"prompt": messages, "reference": [messages[0]], "candidates": [spelt]}).json()
    records = (Message("system", "Be brief."), Message("user", "?"))
    (expected,) = model().score_groups([Group(records, records[:1], (spelt,))])
    assert answer["rewards"] == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("aggregate", ["max", "mean", "softmax"])
@pytest.mark.parametrize("output", ["raw", "probability"])
def test_several_references_are_aggregated_per_candidate(aggregate: Aggregate, output: str) -> None:
    references = ["It is 4.", "Four, of course."]
    single = [rewards(reference=reference, output=output) for reference in references]
    joint = rewards(reference=None, references=references, output=output, aggregate=aggregate)
    assert joint == pytest.approx(aggregated(single, aggregate), abs=TOLERANCE)


def test_a_probability_is_that_of_being_preferred_to_the_reference() -> None:
    raw, probabilities = rewards(), rewards(output="probability")
    reference = raw[BODY["candidates"].index("It is 4.")]
    assert probabilities == pytest.approx([1 / (1 + math.exp(reference - reward)) for reward in raw], abs=TOLERANCE)
    assert probabilities[1] == pytest.approx(0.5, abs=TOLERANCE)


def test_z_scores_need_a_calibration() -> None:
    refused = post("/v1/rewards", BODY | {"output": "zscore"})
    assert refused.status_code == 422
    assert "calibration" in refused.json()["error"]["message"]
    calibrated = service(replace(nano(), calibration=Calibration(mean=-2, std=4)))
    answer = post("/v1/rewards", BODY | {"output": "zscore"}, calibrated).json()
    assert answer["rewards"] == pytest.approx([(reward + 2) / 4 for reward in rewards()], abs=TOLERANCE)


@pytest.mark.parametrize("value", [{"mean": 1}, {"mean": 1, "std": 0}, {"mean": float("nan"), "std": 1}, [1, 2], "x"])
def test_a_calibration_that_is_none_is_refused_when_it_is_loaded(value: object, tmp_path) -> None:
    model().save(tmp_path / "checkpoint")
    model().template.save(tmp_path / "checkpoint", calibration=value)
    with pytest.raises(InputError, match="calibration: expected"):
        load_checkpoint(str(tmp_path / "checkpoint"), CPU)


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"candidates": []}, "candidates", "a list of texts, found an empty list"),
        ({"candidates": "4"}, "candidates", 'found the string "4"'),
        ({"candidates": ["4", None]}, "candidates[1]", "a string or a list of messages, found null"),
        ({"candidates": ["4", [{"role": "user"}]]}, "candidates[1][0]", "a message with role and content"),
        ({"candidates": ["4", "\ud800"]}, "candidates[1]", "a lone surrogate at character 1"),
        (
            {"candidates": ["4"] * 8192, "output": "probability", "reference": None, "references": ["a", "b"]},
            "candidates",
            "8192 or fewer",
        ),
        ({"prompt": 7}, "prompt", "found the number 7"),
        ({"prompt": None}, "prompt", "found null"),
        ({"reference": None}, "reference", "found neither"),
        ({"references": ["a"]}, "reference", "found both"),
        ({"reference": None, "references": ["a", 1]}, "references[1]", "found the number 1"),
        ({"refrences": ["a"]}, "refrences", "Extra inputs are not permitted"),
        ({"aggregate": "min"}, "aggregate", "'max', 'mean' or 'softmax'"),
        ({"output": "sigmoid"}, "output", "'raw', 'probability' or 'zscore'"),
        ({"id": "x" * 257}, "id", "at most 256"),
        ({"id": "\ud800"}, "id", "unicode"),
    ],
)
def test_a_malformed_request_is_refused_in_one_line_that_names_the_item(
    change: dict[str, object], param: str, words: str
) -> None:
    answer = post("/v1/rewards", BODY | change)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"]) == (422, "UnprocessableEntityError", param)
    assert words in error["message"]
    assert "\n" not in error["message"]
