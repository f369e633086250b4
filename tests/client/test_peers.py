"""The client against a real vLLM: parity with float32, the probe, and a sigmoid that it must refuse.

vLLM runs in the interpreter that POLAR_VLLM_PYTHON names, so that it needs no place in this environment.
"""

import asyncio
import json
import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForSequenceClassification

from polar import AsyncRewardModelClient, Comparison, RewardModel, RewardModelClient
from polar.cli.main import main
from polar.cli.serve import _groups
from polar.core.errors import EngineError, RewardError
from tests.corpus.engines.test_peers import running

PYTHON = os.environ.get("POLAR_VLLM_PYTHON", sys.executable if find_spec("vllm") else "")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not PYTHON, reason="vLLM is not installed here, and POLAR_VLLM_PYTHON names no other Python"),
]

GROUPS = list(_groups((), ()))


def serve(directory: Path, log: Path, dtype: str) -> Any:
    settings = ["--dtype", dtype, "--max-model-len", "1024", "--runner", "pooling", "--enforce-eager"]
    program = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(directory), *settings]
    return running(log, *program, python=PYTHON)


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model in float32, and without the word in its config that makes vLLM answer raw scores."""
    directory = tmp_path_factory.mktemp("served") / "nano"
    RewardModel.load("polar-nano", device="cpu", dtype="float32").save(directory)
    config = json.loads((directory / "config.json").read_text())
    del config["problem_type"]
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def server(request: pytest.FixtureRequest, bundled: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with serve(bundled, tmp_path_factory.mktemp("vllm") / "log", request.param) as url:
        yield request.param, url.removesuffix("/v1")


def test_vllm_gives_the_rewards_of_the_local_model(server: Any, bundled: Path) -> None:
    dtype, url = server
    expected = RewardModel.load(bundled, device="cpu", dtype="float32").score_groups(GROUPS)
    flat = [value for values in expected for value in values]
    for server_type in ("auto", "vllm", "vllm-pooling"):
        with RewardModelClient(bundled, server_type=server_type, server_address=url) as client:
            client.connect()  # the probe
            found = [value for values in client.score_groups(GROUPS) for value in values]
        assert found == pytest.approx(flat, abs=1e-3 if dtype == "float32" else 0.2)


def test_single_calls_give_the_same_rewards(server: Any, bundled: Path) -> None:
    _, url = server
    comparisons = [Comparison(one.prompt, one.reference, output) for one in GROUPS[:2] for output in one.candidates]

    async def run() -> tuple[list[float], list[float]]:
        async with AsyncRewardModelClient(bundled, server_address=url) as client:
            singles = await asyncio.gather(*(client.score_one(comparison) for comparison in comparisons))
            return list(singles), await client.score(comparisons)

    singles, together = asyncio.run(run())
    assert singles == pytest.approx(together, abs=0.1)


def test_a_sigmoid_is_refused(server: Any, bundled: Path) -> None:
    """LMDeploy's form of request does not say `use_activation: false`, so this vLLM answers sigmoids."""
    _, url = server
    with (
        RewardModelClient(bundled, server_type="lmdeploy", server_address=url) as client,
        pytest.raises(EngineError, match="it answers the sigmoid of the reward"),
    ):
        client.connect()


def test_an_overlong_input_fails_alone(server: Any, bundled: Path) -> None:
    _, url = server
    good = [[1, 5, 6, 2, 5, 7, 3], [1, 8, 2, 9, 3]]
    with RewardModelClient(bundled, server_address=url) as client:
        with pytest.raises(RewardError, match="maximum context length") as caught:
            client.score_ids([good[0], [1, *[5] * 2000, 3], good[1]])
        alone = client.score_ids(good)
    assert set(caught.value.failures) == {1}
    assert [caught.value.rewards[0], caught.value.rewards[2]] == pytest.approx(alone, abs=0.05)


def test_parity_says_so(server: Any, bundled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dtype, url = server
    code = main(["parity", url, "--model", str(bundled), "--device", "cpu"])
    captured = capsys.readouterr().err
    sys.stdout.write(f"vLLM, {dtype}:\n{captured}")
    assert code == (0 if dtype == "float32" else 2)


def test_qwen3_with_its_bias_of_zero_is_loaded(bundled: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("served") / "qwen3"
    nano = RewardModel.load(bundled, device="cpu", dtype="float32")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=nano.template.tokenizer.get_vocab_size(),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=2048,
        pad_token_id=nano.model.config.pad_token_id,
        bos_token_id=1,
        eos_token_id=None,
        num_labels=1,
        initializer_range=0.3,
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=nano.template.tokenizer, pad_token="<pad>")
    RewardModel(Qwen3ForSequenceClassification(config).eval(), tokenizer, nano.template).save(directory)
    with serve(directory, tmp_path_factory.mktemp("vllm") / "log", "float32") as url:
        assert main(["parity", url.removesuffix("/v1"), "--model", str(directory), "--device", "cpu"]) == 0
