import json

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from polar import Comparison, Group, InputError, Message, Template, TemplateSettings
from polar.core.checkpoint import CHECKPOINT_FILE
from polar.training.init_model import SCORE, SPLIT

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
wrappers = st.sampled_from(["sft", "pretrain"])


def test_layout_is_the_papers(template: Template) -> None:
    encoded = template.encode(Comparison("What is the capital of China?", "Beijing.", "Shanghai."))
    (ids,) = encoded.sequences()
    decoded = template.tokenizer.decode(ids, skip_special_tokens=False)
    prompt = "What is the capital of China?\n"
    assert decoded == f"<s>{prompt}Beijing.{SPLIT}{prompt}Shanghai.{SCORE}"


def test_pretrain_joins_without_a_newline(template: Template) -> None:
    (ids,) = template.encode(Comparison("The reward", " model", " reads", wrapper="pretrain")).sequences()
    assert template.tokenizer.decode(ids, skip_special_tokens=True) == "The reward modelThe reward reads"


def test_messages_are_joined_by_newlines_without_roles(template: Template) -> None:
    messages = (Message("system", "Be brief."), Message("user", "Hello"))
    assert template.encode(Comparison(messages, "a", "b")) == template.encode(Comparison("Be brief.\nHello", "a", "b"))


@given(prompt=texts, reference=texts, candidates=st.lists(texts, min_size=1, max_size=4), wrapper=wrappers)
@hypothesis_settings(max_examples=150, deadline=None)
def test_text_survives_and_separators_are_ours(
    template: Template, prompt: str, reference: str, candidates: list[str], wrapper: str
) -> None:
    roomy = template.with_lengths(max_length=8192, max_response_length=2048)
    encoded = roomy.encode_group(Group(prompt, reference, tuple(candidates), wrapper=wrapper))
    newline = "\n" if wrapper == "sft" else ""
    for candidate, ids, truncation in zip(candidates, encoded.sequences(), encoded.truncations, strict=True):
        assert not truncation
        assert ids.count(roomy.settings.split_token_id) == 1
        assert ids.count(roomy.settings.score_token_id) == 1
        assert ids[-1] == roomy.settings.score_token_id
        split = ids.index(roomy.settings.split_token_id)
        assert roomy.tokenizer.decode(ids[1:split]) == prompt + newline + reference
        assert roomy.tokenizer.decode(ids[split + 1 : -1]) == prompt + newline + candidate


@given(
    prompt=texts,
    reference=texts,
    candidates=st.lists(texts, min_size=1, max_size=4),
    response=st.integers(1, 30),
    extra=st.integers(0, 40),
)
@hypothesis_settings(max_examples=200, deadline=None)
def test_budget_holds_and_every_cut_is_counted(
    template: Template, prompt: str, reference: str, candidates: list[str], response: int, extra: int
) -> None:
    tight = template.with_lengths(max_length=2 * response + 3 + extra, max_response_length=response)
    full = template.with_lengths(max_length=8192, max_response_length=2048)
    group = Group(prompt, reference, tuple(candidates))
    cut, whole = tight.encode_group(group), full.encode_group(group)
    assert all(len(ids) <= tight.settings.max_length for ids in cut.sequences())
    for truncation, short, long in zip(cut.truncations, cut.sequences(), whole.sequences(), strict=True):
        assert len(long) - len(short) == 2 * truncation.prompt + truncation.reference + truncation.output
        assert (truncation.prompt, truncation.reference) == (cut.truncations[0].prompt, cut.truncations[0].reference)
    # Responses keep their beginning, the prompt keeps its end.
    assert whole.reference[: len(cut.reference)] == cut.reference
    tail = cut.prefix[cut.prefix.index(tight.settings.split_token_id) + 1 :]
    assert whole.prefix[len(whole.prefix) - len(tail) :] == tail


@pytest.mark.parametrize("evil", [SPLIT, SCORE, "<s>", "<pad>", f"a{SPLIT}b{SCORE}"])
def test_text_that_spells_a_special_token_stays_text(template: Template, evil: str) -> None:
    (ids,) = template.encode(Comparison(evil, evil, evil)).sequences()
    assert ids.count(template.settings.split_token_id) == 1
    assert ids.count(template.settings.score_token_id) == 1
    assert ids.count(template.settings.bos_token_id) == 1
    assert template.tokenizer.decode(ids[1:-1], skip_special_tokens=True) == f"{evil}\n{evil}{evil}\n{evil}"


def test_lone_surrogate_is_refused(template: Template) -> None:
    with pytest.raises(InputError, match=r"lone surrogate .* at character 2"):
        template.encode(Comparison("ok", "ok", "hi\ud83d"))


def test_budget_without_room_for_responses_is_refused(template: Template) -> None:
    with pytest.raises(InputError, match="max_length 100 leaves no room"):
        template.with_lengths(max_length=100, max_response_length=64)


def test_tokens_outside_the_tokenizer_are_refused(template: Template) -> None:
    with pytest.raises(InputError, match="score_token_id 99999 is not in the tokenizer"):
        Template(template.tokenizer, TemplateSettings(split_token_id=2, score_token_id=99999))


def test_round_trip_through_a_directory(template: Template, tmp_path) -> None:
    template.save(tmp_path, provenance={"start": "test"})
    loaded = Template.load(tmp_path)
    assert loaded.settings == template.settings
    comparison = Comparison("What is 1 + 1?", "2", "3")
    assert loaded.encode(comparison) == template.encode(comparison)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not json", "not readable as JSON"),
        ("[]", "expected a JSON object, found list"),
        ("{}", 'no "template" object'),
        ('{"template": {"split_token_id": 1}}', "needs integers for"),
        ('{"template": {"split_token_id": "x", "score_token_id": 3}}', "needs integers for"),
        ('{"template": {"split_token_id": 2, "score_token_id": 3, "shape": 1}}', "unknown template keys"),
    ],
)
def test_broken_checkpoint_file_is_one_clear_line(template: Template, tmp_path, content: str, message: str) -> None:
    template.save(tmp_path)
    (tmp_path / CHECKPOINT_FILE).write_text(content)
    with pytest.raises(InputError, match=message) as error:
        Template.load(tmp_path)
    assert "\n" not in str(error.value)


def test_seed_compat_keeps_the_seeds_quirk(template: Template) -> None:
    """With a budget of 0 the original client keeps the WHOLE prompt; ours keeps none of it."""
    tight = template.with_lengths(max_length=4 + 2 * 8, max_response_length=8)
    comparison = Comparison("reward " * 30, "candidate " * 20, "reference " * 20)
    seed = Template(tight.tokenizer, tight.settings, compat="seed")
    (ours,), (theirs,) = tight.encode(comparison).sequences(), seed.encode(comparison).sequences()
    assert len(ours) <= tight.settings.max_length < len(theirs)
    assert json.dumps(theirs)  # plain integers
