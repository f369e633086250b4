"""`polar rft-data`: the files, the counts, the frameworks' columns, memory, and references by a model."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from polar.cli.main import main
from polar.core import http
from polar.rft.dataset import MESSAGES, TEXTS
from polar.rft.prompts import BOXED
from tests.servers import Reply, Script, Server

ROWS = [
    {"chosen": "\n\nHuman: hi\n\nAssistant: hello", "rejected": "\n\nHuman: hi\n\nAssistant: no"},
    {"chosen": "\n\nHuman: hi\n\nAssistant: ", "rejected": "\n\nHuman: hi\n\nAssistant: no"},
    {"problem": "How much is 1+1?", "solution": "It is $\\boxed{2}$."},
    {"chosen": "\n\nHuman: hi\n\nHuman: hi\n\nAssistant: a"},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "<think>b</think>c"}]},
    {"prompt": [{"role": "user", "content": "2+2?"}], "references": ["4", "four"]},
    {"text": "nothing"},
    {"chosen": "\n\nHuman: hi\n\nHuman: ho\n\nAssistant: a"},
]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def make(*arguments: object) -> int:
    return main(["rft-data", *map(str, arguments)])


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write(tmp_path / "rows.jsonl", ROWS)


def test_the_file_has_the_columns_of_verl_and_one_type_in_each(rows: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "train.parquet"
    assert make(rows, "--output", output, "--split", "dev") == 0
    table = pq.read_table(output)
    assert table.schema.names == ["data_source", "prompt", "ability", "reward_model", "extra_info"]
    assert table.schema.field("prompt").type == table.schema.field("extra_info").type.field("prompt").type == MESSAGES
    assert table.schema.field("extra_info").type.field("references").type == TEXTS
    found = table.to_pylist()
    assert found[1] == {
        "data_source": "math",
        "prompt": found[1]["extra_info"]["prompt"],
        "ability": "math",
        "reward_model": {"style": "polar", "ground_truth": "It is $\\boxed{2}$."},
        "extra_info": {
            "prompt": [
                {
                    "role": "user",
                    "content": f"How much is 1+1? {BOXED}",
                }
            ],
            "reference": "It is $\\boxed{2}$.",
            "references": ["It is $\\boxed{2}$."],
            "answer": "2",
            "ability": "math",
            "split": "dev",
            "index": 1,
        },
    }
    assert [row["data_source"] for row in found] == ["hh-rlhf", "math", "conversations", "prompts"]
    assert [row["extra_info"]["index"] for row in found] == [0, 1, 2, 3]
    assert [row["extra_info"]["references"] for row in found[2:]] == [["c"], ["4", "four"]]
    assert [row["extra_info"]["answer"] for row in found] == [None, "2", None, None]


def test_what_is_set_aside_is_counted_by_reason(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with rows.open("a") as file:
        file.write("{broken\n")
    assert make(rows, "--output", tmp_path / "train.parquet") == 0
    lines = capsys.readouterr().err.splitlines()
    no_answer = "a reference without an answer (empty, or nothing but thinking)"
    assert lines[-5:-1] == [
        f"skipped 2: turns out of order; the first: {rows}:4: turns out of order",
        f"skipped 1: {no_answer}; the first: {rows}:2: {no_answer}",
        next(line for line in lines if line.startswith("skipped 1: no row of a known format")),
        next(line for line in lines if line.startswith("skipped 1: unreadable; the first: ")),
    ]
    assert f"{rows}:7" in lines[-3]
    assert lines[-1] == f"wrote 4 rows to {tmp_path}/train.parquet"


def test_bad_rows_can_be_errors(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert make(rows, "--output", tmp_path / "train.parquet", "--on-bad-row", "error") == 2
    assert f"{rows}:2: a reference without an answer" in capsys.readouterr().err
    assert not (tmp_path / "train.parquet").exists()


def test_no_task_at_all_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write(tmp_path / "rows.jsonl", ROWS[1:2] * 3)
    assert make(rows, "--output", tmp_path / "train.parquet") == 2
    assert "no row can be used (3: a reference without an answer" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]


def test_files_of_a_directory_are_numbered_in_their_order(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in "cab":
        write(tmp_path / "data" / f"{name}.jsonl", [{"prompt": name, "reference": f"{name}{n}"} for n in range(2)])
    outputs = [tmp_path / "one.parquet", tmp_path / "two.parquet"]
    for output in outputs:
        assert make(tmp_path / "data", "--output", output, "--data-source", "abc", "--ability", "letters") == 0
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    found = pq.read_table(outputs[0]).to_pylist()
    assert [row["reward_model"]["ground_truth"] for row in found] == ["a0", "a1", "b0", "b1", "c0", "c1"]
    assert {(row["data_source"], row["ability"]) for row in found} == {("abc", "letters")}


def test_a_home_directory_is_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert make("~/rows.jsonl", "--output", "~/data/train.jsonl") == 0
    assert (tmp_path / "data" / "train.jsonl").exists()
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize(
    ("framework", "row"),
    [
        (
            "trl",
            {
                "prompt": [{"role": "user", "content": "2+2?"}],
                "reference": "4",
                "references": ["4", "four"],
                "answer": None,
            },
        ),
        (
            "openrlhf",
            {
                "prompt": [{"role": "user", "content": "2+2?"}],
                "label": '{"prompt": [{"role": "user", "content": "2+2?"}], "references": ["4", "four"]}',
            },
        ),
        (
            "swift",
            {"messages": [{"role": "user", "content": "2+2?"}], "references": ["4", "four"], "solution": None},
        ),
    ],
)
def test_columns_of_other_frameworks(rows: Path, tmp_path: Path, framework: str, row: dict[str, Any]) -> None:
    for output in (tmp_path / "train.parquet", tmp_path / "train.jsonl"):
        assert make(rows, "--output", output, "--for", framework) == 0
    assert pq.read_table(tmp_path / "train.parquet").to_pylist()[3] == row
    assert json.loads((tmp_path / "train.jsonl").read_text().splitlines()[3]) == row


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    """200 MB of rows, which as Python objects would take more."""
    big = tmp_path / "big.jsonl"
    line = json.dumps({"prompt": "2+2?", "reference": "4 " * 5000})
    with big.open("w") as file:
        for _ in range(20_000):
            file.write(f"{line}\n")
    program = (
        "import re\nfrom pathlib import Path\nfrom polar.cli.main import main\n"
        "peak = lambda: int(re.search('VmHWM: *(.*) kB', Path('/proc/self/status').read_text())[1]) // 1024\n"
        "from polar.corpus import references\nfrom polar.rft import dataset\nbefore = peak()\n"
        f"assert main(['rft-data', {str(big)!r}, '--output', {str(tmp_path / 'train.parquet')!r}]) == 0\n"
        "print(peak() - before)\n"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert int(found.stdout) < 300  # MiB: one row group in its forms; all rows at once would take 800
    assert pq.read_metadata(tmp_path / "train.parquet").num_rows == 20_000


# References by a model


def answer(text: str, finish_reason: str = "stop") -> Reply:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
    return Reply(body={"choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": 5}})


def says(number: int, body: dict[str, Any]) -> Reply:
    """Another answer for every seed, with thinking; some of no use."""
    question = body["messages"][-1]["content"]
    if question == "cut":
        return answer("It goes on and", "length")
    if question == "thinks":
        return answer("<think>hm")
    if question == "always the same":
        return answer("yes")
    return answer(f"<think>hm</think>{question} {body['seed'] % 1000}")


PROMPTS = [{"prompt": name, "answer": name} for name in ("a", "b", "cut", "a", "thinks", "always the same", "c")]


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "FIRST_PAUSE_SECONDS", 0.0)


def asking(server: Server, tmp_path: Path, *more: str) -> list[object]:
    flags = ["--references-from", server.url, "--references-model", "big", "--references-per-prompt", "3", *more]
    return [tmp_path / "prompts.jsonl", "--output", tmp_path / "train.parquet", *flags]


def test_a_model_gives_several_references_per_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "prompts.jsonl", PROMPTS)
    monkeypatch.setenv("BIG_KEY", "sk-secret")
    with Server(says) as server:
        arguments = asking(server, tmp_path, "--references-key-env", "BIG_KEY", "--temperature", "0.5")
        assert make(*arguments) == 0
        asked = len(server.bodies)
        assert make(*arguments) == 0  # everything is there
        assert len(server.bodies) == asked == 6 * 3
    assert {body["temperature"] for body in server.bodies} == {0.5}
    assert {body["max_tokens"] for body in server.bodies} == {4096}
    assert not any("top_k" in body for body in server.bodies)
    assert len({body["seed"] for body in server.bodies}) == 18
    assert server.headers[0]["authorization"] == "Bearer sk-secret"
    found = pq.read_table(tmp_path / "train.parquet").to_pylist()
    assert [(row["extra_info"]["answer"], len(row["extra_info"]["references"])) for row in found] == [
        ("a", 3),
        ("b", 3),
        ("always the same", 1),
        ("c", 3),
    ]
    for row in found:
        assert row["reward_model"]["ground_truth"] == row["extra_info"]["references"][0]
        assert all(one.startswith(("a ", "b ", "c ", "yes")) for one in row["extra_info"]["references"])
    error = capsys.readouterr().err
    assert "skipped 2: no usable reference from the model; the first: prompt 2 (" in error
    assert "skipped 1: a prompt that repeats an earlier one; the first: prompt 3 (" in error
    everything = "".join(path.read_text("utf-8", "replace") for path in tmp_path.rglob("*") if path.is_file())
    assert "sk-secret" not in everything + error


def test_failures_are_set_aside_and_tried_again(
    tmp_path: Path, short_pauses: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first run meets refusals; the second asks only for what is missing."""
    write(tmp_path / "prompts.jsonl", PROMPTS[:2] + PROMPTS[-1:])

    def refuses(number: int, body: dict[str, Any]) -> Reply:
        if body["messages"][-1]["content"] == "b":
            return Reply(400, {"error": {"message": "content filter"}})
        return says(number, body)

    script: list[Script] = [refuses]
    with Server(lambda number, body: script[0](number, body)) as server:
        assert make(*asking(server, tmp_path)) == 2
        error = capsys.readouterr().err
        assert f"3 of 9 references could not be drawn (most often, 3 times, big: {server.url}/chat/comp" in error
        assert "skipped 1: no answer from the model; the first: prompt 1 (" in error
        assert "content filter" in error
        assert "the same command tries these again" in error
        assert pq.read_table(tmp_path / "train.parquet")["data_source"].to_pylist() == ["prompts"] * 2
        before, script[0] = len(server.bodies), says
        assert make(*asking(server, tmp_path)) == 0
        assert {body["messages"][-1]["content"] for body in server.bodies[before:]} == {"b"}
    found = pq.read_table(tmp_path / "train.parquet").to_pylist()
    assert [row["extra_info"]["answer"] for row in found] == ["a", "b", "c"]
    assert [row["extra_info"]["index"] for row in found] == [0, 1, 2]


@pytest.mark.parametrize("reply", [Reply(401, {"error": {"message": "wrong key"}}), Reply(503, "loading")])
def test_a_server_that_gives_nothing_is_named_and_asked_again(
    tmp_path: Path, short_pauses: None, capsys: pytest.CaptureFixture[str], reply: Reply
) -> None:
    """A wrong key, or a dead server: nothing is written, nothing is taken for complete."""
    write(tmp_path / "prompts.jsonl", PROMPTS[:2] + PROMPTS[-1:])
    script: list[Script] = [lambda number, body: reply]
    with Server(lambda number, body: script[0](number, body)) as server:
        arguments = asking(server, tmp_path, "--deadline", "0.3", "--concurrency", "2")
        for _ in range(2):
            before = len(server.bodies)
            assert make(*arguments) == 2
            assert len(server.bodies) > before
            *_, last = capsys.readouterr().err.strip().splitlines()
            assert "9 of 9 references could not be drawn" in last
            assert f"{server.url}/chat/completions: " in last
            assert "the same command tries these again" in last
            assert not (tmp_path / "train.parquet").exists()
        script[0] = says
        assert make(*arguments) == 0
    assert pq.read_metadata(tmp_path / "train.parquet").num_rows == 3


def test_a_run_that_is_killed_goes_on(tmp_path: Path) -> None:
    """SIGKILL in mid-run; no answer that was saved is asked for again."""
    write(tmp_path / "prompts.jsonl", [{"prompt": f"question {number}"} for number in range(200)])
    with Server(says) as server:
        arguments = [str(word) for word in asking(server, tmp_path, "--concurrency", "4")]
        command = [sys.executable, "-m", "polar.cli.main", "rft-data", *arguments]
        parts = tmp_path / "train.parquet.references" / "_job" / "parts"
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and len(list(parts.rglob("*.parquet"))) < 4:
                time.sleep(0.01)
            process.kill()
        saved = sum(pq.read_metadata(file).num_rows for file in parts.rglob("*.parquet"))
        assert 0 < saved < 600
        before = len(server.bodies)
        assert make(*arguments) == 0
        assert len(server.bodies) - before == 600 - saved
    assert pq.read_metadata(tmp_path / "train.parquet").num_rows == 200


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-", "--references-from", "http://127.0.0.1:1/v1", "--references-model", "m"], "references_from needs files"),
        (["rows.jsonl", "--references-from", "http://127.0.0.1:1/v1"], "references_model is missing"),
        (["rows.jsonl", "--references-from", "127.0.0.1:1", "--references-model", "m"], "expected an address such as"),
        (["rows.jsonl", "--references-model", "m"], "references_from is missing"),
        (
            [
                *("rows.jsonl", "--references-from", "http://127.0.0.1:1/v1", "--references-model", "m"),
                "--deadline",
                "0",
            ],
            "deadline: Input should be greater than 0",
        ),
        (["rows.jsonl", "--references-per-prompt", "0"], "references_per_prompt must be at least 1"),
        (["nothing.jsonl"], "nothing.jsonl"),
        (
            [
                *("rows.jsonl", "--references-from", "http://127.0.0.1:1/v1", "--references-model", "m"),
                *("--references-key-env", "NO_SUCH_KEY"),
            ],
            "NO_SUCH_KEY",
        ),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str],
    message: str,
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert make(*arguments, "--output", "train.parquet") == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not Path("train.parquet").exists()
