"""The command line as a user meets it: real processes, exit codes, one-line errors."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from polar.cli.main import app, main
from polar.core.records import Aggregate, aggregated

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def polar(*words: str, stdin: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "polar.cli.main", *words],
        input=stdin,
        capture_output=True,
        text=True,
        env={**ENVIRONMENT, **environment},
        timeout=120,
        check=False,
    )


def rows(count: int) -> list[dict]:
    return [
        {"id": f"row-{n}", "prompt": f"What is {n} + 1?", "reference": f"It is {n + 1}.", "output": f"{n + n % 3}"}
        for n in range(count)
    ]


def write(path: Path, lines: list[object]) -> str:
    texts = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
    path.write_text("".join(text + "\n" for text in texts), "utf-8")
    return str(path)


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The only line on stderr that is ours (log lines aside), and nothing on stdout."""
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("polar: error:")]
    assert len(lines) == 1
    assert "Traceback" not in captured.err
    return lines[0]


def test_files_in_files_out_ids_and_order_kept(tmp_path: Path, checkpoint: Path) -> None:
    source = write(tmp_path / "in.jsonl", rows(600))
    for target in ("out.jsonl", "out.parquet"):
        assert main(["score", source, "--model", str(checkpoint), "--output", str(tmp_path / target), "--explain"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [row["id"] for row in rows(600)]
    assert pq.read_table(tmp_path / "out.parquet").to_pylist() == lines
    assert {"tokens", "cut_prompt", "cut_reference", "cut_output"} <= lines[0].keys()


def test_stdin_to_stdout_and_broken_pipe(tmp_path: Path, checkpoint: Path) -> None:
    source = "".join(json.dumps(row) + "\n" for row in rows(3))
    result = polar("score", "-", "--model", str(checkpoint), stdin=source)
    assert result.returncode == 0, result.stderr
    assert [json.loads(line)["id"] for line in result.stdout.splitlines()] == ["row-0", "row-1", "row-2"]
    big = write(tmp_path / "big.jsonl", rows(3000))
    command = f"{sys.executable} -m polar.cli.main score {big} --model {checkpoint} | head -1"
    piped = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    assert json.loads(piped.stdout)["id"] == "row-0"
    assert "Traceback" not in piped.stderr
    assert "error" not in piped.stderr


def test_flags_score_one_group(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--prompt", "2+2?", "--reference", "4", "--candidate", "-4", "--candidate", "--4"]
    assert main(["score", *words, "--model", str(checkpoint)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["candidate"] for line in lines] == [0, 1]


def test_candidates_rows_give_one_result_per_candidate(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "g.jsonl", [{"id": 7, "prompt": "p", "reference": "r", "candidates": ["a", "b", "r"]}])
    assert main(["score", source, "--model", str(checkpoint)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["id"], line["candidate"]) for line in lines] == [(7, 0), (7, 1), (7, 2)]


@pytest.mark.parametrize("how", ["max", "mean", "softmax"])
def test_several_references_become_one_reward(
    how: Aggregate, tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = {"prompt": "p", "candidates": ["a", "b"]}
    texts = ["r", "another reference"]
    rows = [{**shared, "id": "several", "references": texts}, *({**shared, "reference": text} for text in texts)]
    words = ["--model", str(checkpoint), "--scale", "probability", "--aggregate", how, "--explain"]
    assert main(["score", write(tmp_path / "in.jsonl", rows), *words]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    several, first, second = lines[:2], lines[2:4], lines[4:]
    single = [[line["reward"] for line in lines] for lines in (first, second)]
    assert [line["reward"] for line in several] == pytest.approx(aggregated(single, how), abs=1e-6)
    by_candidate = list(zip(*single, strict=True))
    assert [line["by_reference"] for line in several] == [pytest.approx(each, abs=1e-6) for each in by_candidate]
    tokens = [[line["tokens"] for line in lines] for lines in (several, first, second)]
    assert tokens[0] == [a + b for a, b in zip(*tokens[1:], strict=True)]
    flags = [word for text in texts for word in ("--reference", text)]
    assert main(["score", "--prompt", "p", *flags, "--candidate", "a", "--candidate", "b", *words]) == 0
    assert [json.loads(line)["reward"] for line in capsys.readouterr().out.splitlines()] == pytest.approx(
        [line["reward"] for line in several], abs=1e-6
    )


def test_a_broken_row_stops_or_is_skipped_and_counted(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines: list[object] = [*rows(2000)]
    lines[1000] = {"id": "x", "prompt": "p", "reference": None, "output": "o"}
    source, target = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    assert main(["score", source, "--model", str(checkpoint), "--output", str(target)]) == 2
    assert re.search(r'in\.jsonl:1001: field "reference": expected .*found null', error_line(capsys))
    assert not target.exists()
    words = ["score", source, "--model", str(checkpoint), "--output", str(target), "--on-bad-row", "skip"]
    assert main(words) == 0
    assert "skipped 1 unreadable rows, scored 1999" in capsys.readouterr().err
    assert len(target.read_text().splitlines()) == 1999


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "expected at least one row"),
        ("{not json}\n", "in.jsonl:1"),
        ('{"prompt": "p", "reference": "r"}\n', "output"),
        ('{"prompt": "p", "reference": "r", "output": 5}\n', 'field "output"'),
        ('{"prompt": "p", "reference": "r", "output": "\\ud83d"}\n', "surrogate"),
    ],
)
def test_bad_files(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    (tmp_path / "in.jsonl").write_text(content)
    assert main(["score", str(tmp_path / "in.jsonl"), "--model", str(checkpoint)]) == 2
    assert message in error_line(capsys)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nonsense"], "Unknown command"),
        (["score"], "nothing to score"),
        (["score", "--prompt", "p"], "--reference, --candidate missing"),
        (["score", "missing.jsonl"], "missing.jsonl"),
        (["score", "--nope", "x"], "unknown flag --nope"),
        (["score", "a.jsonl", "--prompt", "p"], "not both"),
        (["score", "a.jsonl", "--on-bad-row", "ignore"], "on-bad-row"),
        (["score", "a.jsonl", "--aggregate", "min"], "aggregate"),
        (["score", "--batch-tokens", "many"], "batch-tokens"),
        (["score", "--prompt", "p", "--reference", "r", "--candidate", "o", "--model", "no/such"], "no/such"),
        (["score", "--prompt", "p", "--reference", "r", "--candidate", "o", "--device", "tpu"], "tpu"),
        (["pretrain", "--output", "x"], "data"),
        (["pretrain", "--config", "missing.yaml"], "no such file"),
        (["convert", "missing-directory", "target"], "missing-directory"),
        (["pair", "missing.parquet", "--output", "t.jsonl"], "missing.parquet"),
        (["eval"], "triples"),
    ],
)
def test_bad_usage_exits_with_2_and_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(words) == 2
    assert message in error_line(capsys)


def test_an_unknown_key_in_a_config_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text("learning_rat: 1\n")
    assert main(["pretrain", "--config", str(tmp_path / "c.yaml"), "--data", "x", "--output", "y"]) == 2
    assert "learning_rat" in error_line(capsys)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("data: x\nlearning_rate: [1, 2\nseed: 0\n", "c.yaml:3: not readable as YAML (expected ',' or ']'"),
        ("a: 1\n\tb: 2\n", "c.yaml:2: not readable as YAML"),
        ("a: 1\nb: \x01\n", "c.yaml: not readable as YAML"),
        ("- data\n", "c.yaml: expected flags with their values, found a list"),
        ("", "c.yaml: expected flags with their values, found null"),
    ],
)
def test_a_broken_config_file_is_named_with_its_line(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text(content)
    assert main(["score", "--config", str(tmp_path / "c.yaml")]) == 2
    assert message in error_line(capsys)


@pytest.mark.parametrize("command", [["score", "--candidate", "4"], ["rank", "--candidate", "4"]])
def test_a_hyphen_is_stdout(command: list[str], checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    question = ["--prompt", "2+2?", "--reference", "4", "--model", str(checkpoint), "--device", "cpu"]
    assert main([*command, *question, "--output", "-"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "warnings"),
    [
        (["--output", "4", "--output", "5"], ["--output for a text is --candidate now"]),
        (["--output", "4", "--to", "FILE"], ["--to is --output now", "--output for a text is --candidate now"]),
        (["--candidate", "4", "--to", "FILE"], ["--to is --output now"]),
        (["--candidate", "4", "--output", "FILE"], []),
    ],
)
def test_old_names_of_flags_work_with_a_warning(
    words: list[str], warnings: list[str], checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out.jsonl"
    words = [str(target) if word == "FILE" else word for word in words]
    assert main(["score", "--prompt", "2+2?", "--reference", "4", "--model", str(checkpoint), *words]) == 0
    captured = capsys.readouterr()
    found = [line.removeprefix("polar: warning: ") for line in captured.err.splitlines() if "warning" in line]
    assert [line.partition(";")[0] for line in found] == warnings
    written = target.read_text() if str(target) in words else captured.out
    assert len(written.splitlines()) == sum(word in ("4", "5") for word in words)


def test_the_old_name_of_the_file_of_ranks_works(checkpoint: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", rows(1))
    words = ["rank", source, "--model", str(checkpoint), "--to", str(tmp_path / "out.jsonl")]
    assert main(words) == 0
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 1
    assert main([*words, "--output", str(tmp_path / "other.jsonl")]) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output", "rewards.jsonl"], "--output rewards.jsonl: expected --candidate for the texts"),
        (["--output", "-"], "--output -: expected --candidate for the texts"),
        (["--candidate", "4", "--output", "5", "--output", "6"], "expected one file for the results, found 5, 6"),
        (["--candidate", "4", "--output", "a.jsonl", "--to", "b.jsonl"], "found a.jsonl, b.jsonl"),
        (["--candidate", "4", "--output", "5"], "5: "),
    ],
)
def test_a_text_is_never_taken_for_a_file_nor_a_file_for_a_text(
    words: list[str], message: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    question = ["--prompt", "2+2?", "--reference", "4", "--model", str(checkpoint)]
    assert main(["score", *question, *words]) == 2
    assert message in error_line(capsys)


@pytest.mark.parametrize(
    "command", [["score", "--prompt", "p", "--reference", "r", "--candidate", "o", "--server-address"], ["parity"]]
)
def test_a_port_that_is_none_is_one_line(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "127.0.0.1:99999"]) == 2
    assert "http://127.0.0.1:99999: expected a port from 1 to 65535" in error_line(capsys)


def test_environment_variables_set_flags(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("POLAR_SCORE_MODEL", str(checkpoint))
    monkeypatch.setenv("POLAR_SCORE_EXPLAIN", "true")
    assert main(["score", write(tmp_path / "in.jsonl", rows(2))]) == 0
    assert "tokens" in json.loads(capsys.readouterr().out.splitlines()[0])


COMMANDS = [name for name in app if not name.startswith("-") and name != "corpus"]
COMMANDS += ["eval report", "corpus prompts", "corpus clean", "corpus report"]
HEAVY = ["accelerate", "datasketch", "duckdb", "matplotlib", "scipy", "torch", "transformers"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_flags_and_examples(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main([*command.split(), "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"polar {command}" in shown
    assert "Examples:" in shown


def test_help_of_no_command_imports_what_is_slow() -> None:
    program = (
        "import contextlib, io, sys\n"
        "from polar.cli.main import main\n"
        f"for words in [[], ['--help'], ['corpus'], *[[*name.split(), '--help'] for name in {COMMANDS}]]:\n"
        "    with contextlib.redirect_stdout(io.StringIO()):\n"
        "        assert main(words) == 0, words\n"
        f"    for name in {HEAVY}:\n"
        "        assert name not in sys.modules, (words, name)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr


def test_our_own_fault_exits_with_1_and_a_traceback(checkpoint: Path) -> None:
    program = (
        "import sys, polar.cli.main as m, polar.model.reward_model as r\n"
        "def broken(*a, **k): raise RuntimeError('bug')\n"
        "r.RewardModel.load = broken\n"
        "sys.exit(m.main(['score', '--prompt', 'p', '--reference', 'r', '--candidate', 'o']))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=ENVIRONMENT, timeout=60
    )
    assert result.returncode == 1
    assert "RuntimeError: bug" in result.stderr


def test_a_killed_run_leaves_no_half_result(tmp_path: Path, checkpoint: Path) -> None:
    source = write(tmp_path / "in.jsonl", [{**row, "output": "word " * 100} for row in rows(20_000)])
    target = tmp_path / "results" / "out.jsonl"
    target.parent.mkdir()
    words = ["score", source, "--model", str(checkpoint), "--output", str(target)]
    process = subprocess.Popen(
        [sys.executable, "-m", "polar.cli.main", *words], env=ENVIRONMENT, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not any(target.parent.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not target.exists()


@pytest.mark.slow
def test_memory_stays_flat_while_scoring(tmp_path: Path, checkpoint: Path) -> None:
    """Ten times the rows, at most a few MB more (a row's texts alone are 8 kB)."""

    def peak(count: int) -> int:
        source = write(tmp_path / f"{count}.jsonl", [{**row, "output": "word " * 1600} for row in rows(count)])
        program = (
            "import resource, sys; from polar.cli.main import main; "
            f"code = main(['score', {source!r}, '--model', {str(checkpoint)!r}, '--output', {source + '.out.jsonl'!r}, "
            "'--max-length', '64', '--max-response-length', '16']); "
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(code)"
        )
        result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=ENVIRONMENT)
        assert result.returncode == 0, result.stderr
        return int(result.stdout)

    assert peak(4000) - peak(400) < 20_000  # kB; 3,600 more rows hold 29 MB of text


def test_a_megabyte_of_output_is_cut_and_reported(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"prompt": "p", "reference": "r", "output": "word " * 200_000}
    assert main(["score", write(tmp_path / "in.jsonl", [row]), "--model", str(checkpoint), "--explain"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["cut_output"] > 150_000
    assert result["tokens"] <= 512


@pytest.mark.parametrize("words", [["corpus"], ["corpus", "--help"]])
def test_the_first_word_of_several_commands_lists_them(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    output = capsys.readouterr().out
    assert all(name in output for name in ("prompts", "clean", "report"))
