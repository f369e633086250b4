"""The lines that docs/rft.md prints for verl, OpenRLHF and TRL, run as they stand there against a `polar serve`."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from polar import Comparison, InputError, RewardModel, Template
from polar.core.errors import EngineError
from polar.rft.reward import Sample, reward_for
from polar.serving.app import create_app
from polar.serving.checkpoint import load_checkpoint
from polar.serving.server import bind
from polar.serving.service import Service
from tests.client.fakes import Fake
from tests.client.test_faults import free_port
from tests.conftest import build_model
from tests.serving.serving import CPU, service

DOCUMENT = (Path(__file__).parents[2] / "docs" / "rft.md").read_text("utf-8")
PORT = 30000
QUESTION = [{"role": "user", "content": "What is the capital of China?"}]


class Served:
    """`polar serve` of a checkpoint on a thread."""

    def __init__(self, directory: Path, keys: tuple[bytes, ...] = (), port: int = 0) -> None:
        self.service: Service = service(load_checkpoint(str(directory), CPU))
        self.listener = bind("127.0.0.1", port, protected=False)
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        app = create_app(self.service, keys)
        self._server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_config=None, timeout_graceful_shutdown=1))
        self._thread = threading.Thread(target=self._server.run, args=([self.listener],), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)


@pytest.fixture
def server(checkpoint: Path) -> Iterator[Served]:
    served = Served(checkpoint)
    yield served
    served.stop()


def lines(framework: str) -> str:
    """What the document prints below the name of a framework; the port is that of the test."""
    found = re.search(rf"^\*\*{framework}\*\*[^*]*?\n\n((?:    [^\n]*\n)+)", DOCUMENT, re.M)
    assert found is not None
    return re.sub("^    ", "", found[1], flags=re.M)


def at(server: Served, text: str) -> str:
    assert f"127.0.0.1:{PORT}" in text
    return text.replace(f"127.0.0.1:{PORT}", server.address)


def expected(model: RewardModel, output: str, prompt: Any = QUESTION[0]["content"]) -> Any:
    return pytest.approx(model.score([Comparison(prompt, "It is Beijing.", output)])[0], abs=1e-4)


def test_the_server_of_the_document_listens_where_its_lines_ask() -> None:
    assert re.search(rf"^    polar serve rm --port {PORT}$", DOCUMENT, re.M)  # on 127.0.0.1, its default


def test_verl(server: Served, llama: RewardModel) -> None:
    words = dict(line.lstrip("+").split("=") for line in at(server, lines("verl")).split())
    prefix = "reward.custom_reward_function."
    module = import_module(words.pop(f"{prefix}path").removeprefix("pkg://"))
    function = getattr(module, words.pop(f"{prefix}name"))
    settings = {name.removeprefix(f"{prefix}reward_kwargs."): value for name, value in words.items()}

    async def step() -> list[Any]:
        extra_info = {"prompt": QUESTION, "index": 0}
        return await asyncio.gather(
            *(
                function(
                    data_source="d",
                    solution_str=output,
                    ground_truth="It is Beijing.",
                    extra_info=extra_info,
                    **settings,
                )
                for output in ("Beijing.", "Shanghai.")
            )
        )

    assert [one["score"] for one in asyncio.run(step())] == [expected(llama, "Beijing."), expected(llama, "Shanghai.")]


def test_openrlhf(server: Served, llama: RewardModel, monkeypatch: pytest.MonkeyPatch) -> None:
    export, url, _ = at(server, lines("OpenRLHF")).splitlines()
    script = f"python() {{ {sys.executable} \"$@\"; }}\n{export}\nprintf '%s\\n' $POLAR_REWARD_ADDRESS {url}"
    result = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, timeout=60, check=True, env=os.environ
    )
    address, flag, path = result.stdout.splitlines()
    assert flag == "--reward.remote_url"
    monkeypatch.setenv("POLAR_REWARD_ADDRESS", address)
    spec = importlib.util.spec_from_file_location("reward_func", path)  # as OpenRLHF does
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    label = json.dumps({"prompt": QUESTION, "references": ["It is Beijing."]})
    found = module.reward_func(["<user>...<model>Beijing."], ["<user>...<model>"], [label])
    assert found["rewards"].tolist() == [expected(llama, "Beijing.")]


def test_trl(server: Served, checkpoint: Path, llama: RewardModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkpoint.parent)
    checkpoint.rename("rm")
    imported, trainer, comment = at(server, lines("TRL")).splitlines()
    calls = [re.search(r"polar_reward\(.*?\)", line) for line in (trainer, comment)]
    for call in [one[0] for one in calls if one]:
        names: dict[str, Any] = {}
        exec(f"{imported}\nfunction = {call}", names)
        found = names["function"](prompts=[QUESTION], completions=["Beijing."], reference=["It is Beijing."])
        assert found == [expected(llama, "Beijing.")]
    assert all(calls)


SAMPLE = Sample("What is the capital of China?", ("It is Beijing.",), "Beijing.", "capitals:7")


def test_scales_and_proofs_come_from_the_server_too(checkpoint: Path, llama: RewardModel) -> None:
    content = json.loads((checkpoint / "polar.json").read_text())
    content["calibration"] = {"mean": 1.0, "std": 2.0}
    (checkpoint / "polar.json").write_text(json.dumps(content))
    server = Served(checkpoint)
    try:
        reward = reward_for({"address": server.address, "scale": "zscore"})
        (scored,) = reward.score_all([SAMPLE])
        assert 2 * scored.reward + 1 == expected(llama, "Beijing.")
        assert len(reward._client._client._probes) == 3
    finally:
        server.stop()


def test_a_server_with_another_checkpoint_than_the_setting_says(
    server: Served, template: Template, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    build_model("llama", template, seed=1).save(other)
    setting = r"the reward setting model \(POLAR_REWARD_MODEL\) is "
    with pytest.raises(EngineError, match=rf"it serves another model than this checkpoint.*{setting}'{other}'"):
        reward_for({"address": server.address, "model": str(other)}).score_all([SAMPLE])
    with pytest.raises(EngineError, match=rf"HTTP 400: .*probes of .*polar-nano.*{setting}'polar-nano'"):
        reward_for({"address": server.address, "model": "polar-nano"}).score_all([SAMPLE])


def test_other_servers_do_not_tell_their_checkpoint(fake: Fake) -> None:
    with pytest.raises(
        InputError, match=r"reward setting model \(POLAR_REWARD_MODEL\) is not set.*no `polar serve`"
    ) as error:
        reward_for({"address": fake.address})
    assert fake.address in str(error.value)


def test_a_server_that_asks_for_a_key(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, llama: RewardModel) -> None:
    server = Served(checkpoint, keys=(b"s3cret",))
    try:
        with pytest.raises(InputError, match="model .* is not set.*HTTP 401: expected a valid API key"):
            reward_for({"address": server.address})
        monkeypatch.setenv("POLAR_API_KEY", "s3cret")
        assert reward_for({"address": server.address}).score_all([SAMPLE])[0].reward == expected(llama, "Beijing.")
    finally:
        server.stop()


def test_a_server_that_comes_up_late_is_waited_for(checkpoint: Path) -> None:
    port = free_port()
    with pytest.raises(InputError, match=f"no server answers: http://127.0.0.1:{port}"):
        reward_for({"address": f"127.0.0.1:{port}", "deadline": 0.2})
    found: list[Any] = []
    waiting = threading.Thread(
        target=lambda: found.append(reward_for({"address": f"127.0.0.1:{port}", "deadline": 20}))
    )
    waiting.start()
    time.sleep(0.1)
    server = Served(checkpoint, port=port)
    try:
        waiting.join(20)
        assert found[0].score_all([SAMPLE])
    finally:
        server.stop()
