"""`TransformersSampler` on tiny policies of three architectures and sizes."""

import asyncio
import json
import shutil
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast

from polar.core.errors import InputError
from polar.core.records import Message
from polar.corpus.engines import Completion, Failure, Request, Result
from polar.corpus.engines.local import Row, TransformersSampler, check, continuation, gumbel, to_row
from polar.corpus.pool import Policy, TransformersEngine
from polar.training.init_model import SCORE
from tests.corpus.engines.tiny import CONTEXT, save_policy

SIZES = {"llama": 32, "qwen2": 48, "qwen3": 64}
PROMPTS = ["The reward model reads", "What", "def add(a, b):\n    return", "Two  spaces, a tab\t and \n", "中文 😀 "]


def policy(model: Path | str, kind: str = "base", engine: str = "transformers", **decoding: Any) -> Policy:
    settings = {"type": engine, "model": str(model)} | ({"device": "cpu"} if engine == "transformers" else {})
    decoding = {"max_tokens": 12} | decoding
    return Policy.model_validate({"name": "near", "kind": kind, "engine": settings, "decoding": decoding})


def sampler(model: Path | str, kind: str = "base", **decoding: Any) -> TransformersSampler:
    near = policy(model, kind, **decoding)
    assert isinstance(near.engine, TransformersEngine)
    return TransformersSampler(near, near.engine)


def draw(engine: TransformersSampler, requests: list[Request]) -> list[Result]:
    return asyncio.run(engine.sample(requests))


def numbered(prompts: list[str], first: int = 0) -> list[Request]:
    return [Request(prompt, seed) for seed, prompt in enumerate(prompts, first)]


@pytest.fixture(scope="module", params=list(SIZES))
def checkpoint(request: pytest.FixtureRequest, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_policy(tmp_path_factory.mktemp("policy"), tokenizer, request.param, hidden=SIZES[request.param])


@pytest.fixture(scope="module")
def llama(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_policy(tmp_path_factory.mktemp("llama"), tokenizer)


def changed(checkpoint: Path, target: Path, file: str = "generation_config.json", **fields: Any) -> Path:
    """A copy with other settings in one of its JSON files; None removes a field."""
    shutil.copytree(checkpoint, target)
    content = json.loads((target / file).read_text()) | fields
    (target / file).write_text(json.dumps({name: value for name, value in content.items() if value is not None}))
    return target


# Reproducibility


@pytest.mark.parametrize("decoding", [{"temperature": 0}, {}, {"temperature": 0.7, "top_k": None, "top_p": 1.0}])
def test_a_sample_does_not_depend_on_its_batch(checkpoint: Path, decoding: dict[str, Any]) -> None:
    engine = sampler(checkpoint, **decoding)
    requests = numbered(PROMPTS * 2)
    together = draw(engine, requests)
    assert [draw(engine, [request])[0] for request in requests] == together
    assert draw(engine, requests[::-1])[::-1] == together
    if decoding != {"temperature": 0}:
        assert together[:5] != together[5:]  # other seeds, other samples


def test_a_batch_gives_the_same_samples_whatever_ran_before(checkpoint: Path) -> None:
    first, second = sampler(checkpoint), sampler(checkpoint)
    draw(second, numbered(PROMPTS, first=70))
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    assert draw(first, numbered(PROMPTS)) == draw(second, numbered(PROMPTS))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_greedy_samples_are_those_of_plain_generate(llama: Path) -> None:
    engine = sampler(llama, temperature=0)
    (result,) = draw(engine, [Request("What is", 0)])
    ids = engine.tokenizer("What is", return_tensors="pt")["input_ids"]
    plain = engine.model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert isinstance(result, Completion)
    assert result.output == engine.tokenizer.decode(plain, skip_special_tokens=True)
    assert result.output_tokens == len(plain)


def test_samples_follow_the_distribution_of_the_policy(llama: Path) -> None:
    """First tokens against the filtered softmax (temperature, then top_k, then top_p); 4000 draws, 5 sigma."""
    engine = sampler(llama, max_tokens=1, temperature=1.5, top_k=12, top_p=0.8)
    draws = 4000
    results = draw(engine, [Request("What", seed) for seed in range(draws)])
    ids = engine.tokenizer("What", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = engine.model(ids).logits[0, -1].double() / 1.5
    best = logits.topk(12)
    softmax = best.values.softmax(0)
    kept = int((softmax.cumsum(0) - softmax < 0.8).sum())
    assert 1 < kept < 12
    expected: Counter[str] = Counter()  # two tokens may be the same text: half a character each
    for token, probability in zip(best.indices[:kept].tolist(), softmax[:kept] / softmax[:kept].sum(), strict=True):
        expected[continuation(engine.tokenizer, ids[0].tolist(), [token])] += float(probability)
    found = Counter(result.output for result in results if isinstance(result, Completion))
    assert found.keys() <= expected.keys()
    for text, probability in expected.items():
        assert abs(found[text] - draws * probability) < 5 * (draws * probability * (1 - probability)) ** 0.5


def test_the_noise_is_standard_gumbel_and_differs_by_seed_and_position() -> None:
    like = torch.zeros(20_000)
    noise = gumbel(7, 3, like)
    assert torch.equal(noise, gumbel(7, 3, like))
    assert abs(noise.mean() - np.euler_gamma) < 0.05
    assert abs(noise.var() - np.pi**2 / 6) < 0.1
    for other in (gumbel(8, 3, like), gumbel(7, 4, like), gumbel(3, 7, like)):
        assert abs(np.corrcoef(noise, other)[0, 1]) < 0.05


# Texts


def test_prompt_and_output_are_the_document(checkpoint: Path) -> None:
    engine = sampler(checkpoint, temperature=1.5)
    for request, result in zip(numbered(PROMPTS * 3), draw(engine, numbered(PROMPTS * 3)), strict=True):
        assert isinstance(result, Completion)
        assert result.prompt_tokens == len(engine.tokenizer(request.prompt)["input_ids"])
        row = draw_ids(engine, request)
        whole = engine.tokenizer.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert str(request.prompt) + result.output == whole


def draw_ids(engine: TransformersSampler, request: Request) -> list[int]:
    row = to_row(engine.tokenizer, request, engine.decoding, engine.context)
    assert isinstance(row, Row)
    engine._generate([row])
    return row.prompt + row.output


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Spaces as a prefix that decoding strips at the start, and bytes for what has no token, as in Llama 2."""
    pieces = ["<unk>", "▁Hello", "▁world", "▁", "Hello", "\n", "<0xE4>", "<0xBD>", "<0xA0>", "s"]
    tokenizer = Tokenizer(
        models.BPE({piece: n for n, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.mark.parametrize(
    ("prompt", "output", "text"),
    [
        ([1], [2], " world"),
        ([1, 3], [2], " world"),
        ([1], [9], "s"),
        ([1, 5], [2, 5], " world\n"),
        ([1], [3, 3], "  "),
        ([1, 6, 7, 8], [2], " world"),
        ([1, 6, 7, 8], [6, 7, 8], "你"),
        ([1, 6, 7, 8], [6, 7], "��"),  # half a character after a whole one
        ([1], [], ""),
    ],
)
def test_no_space_is_lost_where_a_tokenizer_strips_it(prompt: list[int], output: list[int], text: str) -> None:
    assert continuation(sentencepiece_like(), prompt, output) == text


def test_a_chat_policy_answers_through_its_template(llama: Path) -> None:
    engine = sampler(llama, "chat", temperature=0)
    messages = (Message("system", "Be brief."), Message("user", "What is it?"))
    (result,) = draw(engine, [Request(messages, 0)])
    text = "[system] Be brief.\n[user] What is it?\n[assistant] "
    ids = engine.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    plain = engine.model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert isinstance(result, Completion)
    assert result.prompt_tokens == ids.shape[1]
    assert result.output == engine.tokenizer.decode(plain, skip_special_tokens=True)


def test_messages_that_the_template_refuses_fail_alone(llama: Path) -> None:
    prompts = [(Message("user", "Hi"),), (Message("tool", "42"),)]
    fine, refused = draw(sampler(llama, "chat"), [Request(prompt, 1) for prompt in prompts])
    assert isinstance(fine, Completion)
    assert refused == Failure("the chat template refuses the messages: No tools here.")


# Ends and limits


def test_an_output_ends_at_any_of_the_end_tokens_without_showing_them(
    llama: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    score = tokenizer.token_to_id(SCORE)
    ends = [score, *range(100, tokenizer.get_vocab_size())]
    engine = sampler(changed(llama, tmp_path / "policy", eos_token_id=ends), temperature=1.5, max_tokens=20)
    results = draw(engine, numbered(PROMPTS * 4))
    reasons = Counter(result.finish_reason for result in results if isinstance(result, Completion))
    assert reasons["stop"] > 10
    for request, result in zip(numbered(PROMPTS * 4), results, strict=True):
        assert isinstance(result, Completion)
        ids = draw_ids(engine, request)[result.prompt_tokens :]
        assert len(ids) == result.output_tokens
        assert not set(ids[:-1]) & set(ends)
        assert (ids[-1] in ends) == (result.finish_reason == "stop")
        assert SCORE not in result.output


@pytest.mark.parametrize("missing", ["generation_config.json", "tokenizer_config.json"])
def test_the_end_token_may_be_known_to_the_tokenizer_or_the_checkpoint_alone(
    missing: str, llama: Path, tmp_path: Path
) -> None:
    field = {"eos_token_id": None} if missing == "generation_config.json" else {"eos_token": None}
    engine = sampler(changed(llama, tmp_path / "policy", missing, **field))
    assert engine._ends == [engine.tokenizer.convert_tokens_to_ids(SCORE)]


def test_a_policy_without_any_end_or_padding_token_runs_to_max_tokens(llama: Path, tmp_path: Path) -> None:
    bare = changed(llama, tmp_path / "a", eos_token_id=None, pad_token_id=None)
    bare = changed(bare, tmp_path / "b", "config.json", eos_token_id=None, pad_token_id=None)
    bare = changed(bare, tmp_path / "c", "tokenizer_config.json", eos_token=None, pad_token=None)
    engine = sampler(bare, temperature=0)
    assert engine._ends == []
    together = draw(engine, numbered(PROMPTS))
    assert together == [draw(engine, [request])[0] for request in numbered(PROMPTS)]
    assert {(result.finish_reason, result.output_tokens) for result in together if isinstance(result, Completion)} == {
        ("length", 12)
    }


def test_other_settings_of_the_checkpoint_do_not_count(llama: Path, tmp_path: Path) -> None:
    surprises = {"repetition_penalty": 3.0, "top_k": 1, "temperature": 0.01, "do_sample": True, "max_length": 5}
    odd = changed(llama, tmp_path / "policy", **surprises, suppress_tokens=list(range(50, 300)), min_length=40)
    assert draw(sampler(odd), numbered(PROMPTS)) == draw(sampler(llama), numbered(PROMPTS))


def test_prompts_without_room_in_the_context_fail_alone(llama: Path) -> None:
    engine = sampler(llama, max_tokens=30)
    tokens = " 1 2 3 4 5 6 7 8 9" * 20
    text = {
        length: engine.tokenizer.decode(engine.tokenizer(tokens)["input_ids"][1:length]) for length in (30, 63, 64, 90)
    }
    lengths = [len(engine.tokenizer(text[length])["input_ids"]) for length in text]
    assert lengths == [30, CONTEXT - 1, CONTEXT, 90]
    requests = numbered([text[30], text[63], text[64], "What", text[90]])
    results = draw(engine, requests)
    room = "leaves no room for an output in the context of 64 tokens"
    assert results[2] == Failure(f"the prompt of 64 tokens {room}")
    assert results[4] == Failure(f"the prompt of 90 tokens {room}")
    assert isinstance(results[1], Completion)
    assert results[1].output_tokens == 1
    assert [draw(engine, [request])[0] for request in requests] == results


def test_rows_that_reach_the_context_leave_the_others_alone(llama: Path) -> None:
    """Longer outputs than the context allows: each row ends at its own limit, in a batch as alone."""
    engine = sampler(llama, max_tokens=4096)
    requests = numbered(PROMPTS)
    results = draw(engine, requests)
    assert [draw(engine, [request])[0] for request in requests] == results
    totals = [
        (result.prompt_tokens or 0) + (result.output_tokens or 0)
        for result in results
        if isinstance(result, Completion) and result.finish_reason == "length"
    ]
    assert totals
    assert set(totals) == {CONTEXT}


def test_running_out_of_memory_fails_the_batch_with_advice(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = sampler(llama)

    def full(**_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    requests = [*numbered(["What", "The"]), Request("x" * 1000, 9)]
    monkeypatch.setattr(engine.model, "generate", full)
    results = draw(engine, requests)
    assert results[:2] == [Failure("out of memory with 2 samples at once; lower batch_size")] * 2
    assert isinstance(results[2], Failure)
    monkeypatch.undo()
    assert isinstance(draw(engine, requests)[0], Completion)


def test_cancelling_stops_generation(llama: Path) -> None:
    engine = sampler(llama, max_tokens=40)
    forward, released, steps = engine.model.forward, threading.Event(), 0

    async def run() -> None:
        started, loop = asyncio.Event(), asyncio.get_running_loop()

        def wait(*args: Any, **kwargs: Any) -> Any:
            nonlocal steps
            steps += 1
            loop.call_soon_threadsafe(started.set)
            released.wait(60)
            return forward(*args, **kwargs)

        engine.model.forward = wait
        task = asyncio.create_task(engine.sample([Request("What", 1)]))
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        released.set()

    asyncio.run(run())  # waits for the thread
    assert steps == 1


# Loading


def test_closing_frees_the_model(llama: Path) -> None:
    engine = sampler(llama)
    asyncio.run(engine.close())
    assert engine.model is None


@pytest.mark.parametrize("open_it", [check, lambda near: sampler(near.engine.model, near.kind)], ids=["check", "open"])
@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda path: (path / "config.json").unlink(), "base", "cannot be loaded"),
        (lambda path: (path / "config.json").write_text('{"model_type": "nonsense"}'), "base", "cannot be loaded"),
        (lambda path: (path / "tokenizer.json").unlink(), "base", "cannot be loaded"),
        (lambda path: (path / "model.safetensors").unlink(), "base", "safetensors"),
        (lambda path: (path / "chat_template.jinja").unlink(), "chat", "no chat template; take an instruct model"),
        (shutil.rmtree, "base", "cannot be loaded"),
    ],
    ids=["no config", "unknown model", "no tokenizer", "no safetensors", "no template", "no directory"],
)
def test_a_model_that_cannot_be_used_is_told_in_one_line(
    change: Callable[[Path], object],
    kind: str,
    message: str,
    open_it: Callable[[Policy], object],
    llama: Path,
    tmp_path: Path,
) -> None:
    copy = tmp_path / "policy"
    shutil.copytree(llama, copy)
    change(copy)
    with pytest.raises(InputError) as error:
        open_it(policy(copy, kind))
    assert str(error.value).startswith("policy 'near': ")
    assert message in str(error.value)
    assert str(copy) in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_a_checkpoint_without_language_head_is_refused(llama: Path, tmp_path: Path) -> None:
    model = LlamaForSequenceClassification.from_pretrained(llama, num_labels=1)
    shutil.copytree(llama, tmp_path / "policy")
    (tmp_path / "policy" / "model.safetensors").unlink()
    model.save_pretrained(tmp_path / "policy")
    with pytest.raises(InputError, match="would be random numbers: lm_head.weight"):
        sampler(tmp_path / "policy")


@pytest.mark.parametrize("kind", ["base", "chat"])
def test_a_sound_policy_passes_the_check(kind: str, llama: Path) -> None:
    check(policy(llama, kind))


def test_a_vllm_policy_without_vllm_is_told_how_to_install_it(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polar.corpus.engines.local.find_spec", lambda name: None)
    with pytest.raises(InputError, match="^policy 'near': vLLM is not installed; pip install vllm"):
        check(policy(llama, engine="vllm"))
