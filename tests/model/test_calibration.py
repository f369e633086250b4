import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar import Comparison, Group, InputError, RewardModel
from polar.cli.main import main
from polar.core.checkpoint import Calibration, read_checkpoint_file, scaling
from polar.model.calibration import Sample, calibrate, fit_temperature, read_samples
from polar.model.export import export
from polar.serving.checkpoint import Loading, load_checkpoint
from polar.training.config import FinetuneConfig
from polar.training.run import finetune

PAIRS = [
    {"prompt": f"{n} + 1?", "reference": f"{n + 1}", "chosen": f"It is {n + 1}.", "rejected": f"no {n * 7}"}
    for n in range(12)
]


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def unranked(rewards: list[float]) -> tuple[Sample, list[float]]:
    return Sample(Group("p", "r", ("o",) * len(rewards)), ranked=False), rewards


def test_mean_deviation_and_quantiles_are_those_of_the_rewards() -> None:
    rewards = np.random.default_rng(0).normal(3, 2, 1001)
    found = calibrate([unranked(list(rewards[:500])), unranked(list(rewards[500:]))], ["a.jsonl"])
    assert (found.mean, found.std) == pytest.approx((np.mean(rewards), np.std(rewards, ddof=1)))
    assert found.quantiles["0.5"] == pytest.approx(np.sort(rewards)[500])
    assert list(found.quantiles.values()) == sorted(found.quantiles.values())
    assert (found.count, found.pairs, found.temperature, found.data) == (1001, 0, None, ["a.jsonl"])
    standard = scaling("zscore", found)(rewards)
    assert (np.mean(standard), np.std(standard, ddof=1)) == pytest.approx((0, 1))


@pytest.mark.parametrize("rewards", [[], [1.0], [2.0, 2.0]])
def test_rewards_without_a_scale_are_refused(rewards: list[float]) -> None:
    with pytest.raises(InputError, match="they have no scale"):
        calibrate([unranked(rewards)])


@pytest.mark.parametrize("temperature", [0.2, 1.0, 5.0])
def test_the_temperature_behind_simulated_preferences_is_found(temperature: float) -> None:
    random = np.random.default_rng(1)
    gaps = random.normal(0, 2 * temperature, 20_000)
    won = random.random(20_000) < 1 / (1 + np.exp(-gaps / temperature))
    assert fit_temperature(np.where(won, gaps, -gaps)) == pytest.approx(temperature, rel=0.05)


@given(st.lists(st.floats(-50, 50), min_size=2, max_size=20), st.floats(1e-3, 1e3))
def test_no_other_temperature_fits_better_and_units_do_not_matter(values: list[float], unit: float) -> None:
    margins = np.array(values)
    best = fit_temperature(margins)
    if best is None:
        assert margins.min() >= 0 or margins.mean() <= 0
        return

    def misfit(temperature: float) -> float:
        return float(np.logaddexp(0, -margins / temperature).sum())

    assert misfit(best) <= min(misfit(best * 1.01), misfit(best / 1.01)) + 1e-9
    assert fit_temperature(margins * unit) == pytest.approx(best * unit, rel=1e-6)


@pytest.mark.parametrize("margins", [[], [1.0, 2.0], [0.0, 1.0], [-1.0, 1.0], [-2.0, 1.0], [0.0]])
def test_pairs_that_say_nothing_about_a_temperature_give_none(margins: list[float]) -> None:
    assert fit_temperature(np.array(margins)) is None


def test_a_ranking_gives_all_its_pairs() -> None:
    sample = Sample(Group("p", "r", ("a", "b", "c")), ranked=True)
    found = calibrate([(sample, [3.0, 4.0, 1.0])])
    assert found.pairs == 3
    assert found.accuracy == pytest.approx(2 / 3)
    assert found.temperature == fit_temperature(np.array([-1.0, 2.0, 3.0]))


def test_comparisons_groups_triples_and_preferences_may_be_mixed(tmp_path: Path) -> None:
    both = {"prompt": "p", "reference": "r"}
    rows = [
        {**both, "output": "o"},
        {**both, "candidates": ["a", "b"]},
        {**both, "positive": "good", "negative": "bad", "wrapper": "pretrain"},
        {**both, "chosen": "good", "rejected": "bad"},
        {**both, "ranked": ["x", "y", "z"]},
    ]
    found = list(read_samples(write(tmp_path / "rows.jsonl", rows)))
    assert [sample.group.candidates for sample in found] == [
        ("o",),
        ("a", "b"),
        ("good", "bad"),
        ("good", "bad"),
        ("x", "y", "z"),
    ]
    assert [sample.ranked for sample in found] == [False, False, True, True, True]
    assert found[2].group.wrapper == "pretrain"


def test_the_command_writes_what_the_rewards_say_and_leaves_the_rest_alone(checkpoint: Path, tmp_path: Path) -> None:
    before = {file.name: file.read_bytes() for file in checkpoint.iterdir()}
    content = read_checkpoint_file(checkpoint)
    assert main(["calibrate", str(checkpoint), "--data", write(tmp_path / "pairs.jsonl", PAIRS)]) == 0
    after = {file.name: file.read_bytes() for file in checkpoint.iterdir()}
    assert after.keys() == before.keys()
    assert [name for name in after if after[name] != before[name]] == ["polar.json"]
    written = read_checkpoint_file(checkpoint)
    values = written.pop("calibration")
    assert written == content
    model = RewardModel.load(checkpoint)
    groups = [Group(row["prompt"], row["reference"], (row["chosen"], row["rejected"])) for row in PAIRS]
    rewards = np.array(model.score_groups(groups))
    assert (values["mean"], values["std"]) == pytest.approx((rewards.mean(), rewards.std(ddof=1)))
    assert values["temperature"] == pytest.approx(fit_temperature(rewards[:, 0] - rewards[:, 1]))
    assert (values["count"], values["pairs"], values["data"]) == (24, 12, ["pairs.jsonl"])
    serving = load_checkpoint(str(checkpoint), Loading(device="cpu")).calibration
    assert serving is not None
    assert (serving.mean, serving.std) == (values["mean"], values["std"])


def test_a_calibrated_copy_leaves_the_original_alone(checkpoint: Path, tmp_path: Path) -> None:
    data, target = write(tmp_path / "pairs.jsonl", PAIRS), tmp_path / "copies" / "calibrated"
    (checkpoint / "run").mkdir()
    (checkpoint / "run" / "state").write_text("of a training run")
    before = (checkpoint / "polar.json").read_bytes()
    assert main(["calibrate", str(checkpoint), "--data", data, "--output", str(target)]) == 0
    assert (checkpoint / "polar.json").read_bytes() == before
    assert not (target / "run").exists()
    original, copy = RewardModel.load(checkpoint), RewardModel.load(target)
    assert original.calibration is None
    assert copy.calibration is not None
    asked = [Comparison("p", "r", "o")]
    assert copy.score(asked) == original.score(asked)
    assert main(["calibrate", str(checkpoint), "--data", data, "--output", str(target)]) == 2


def test_the_bundled_model_is_not_written_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", "polar-nano", "--data", write(tmp_path / "pairs.jsonl", PAIRS)]) == 2
    assert "give --output DIR" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "place"),
    [
        ({"mean": 1}, "std: "),
        ({"mean": 1, "std": 0}, "std: "),
        ({"mean": math.nan, "std": 1}, "mean: "),
        ({"mean": True, "std": 1}, "mean: "),
        ({"mean": 1, "std": 1, "temperature": -1}, "temperature: "),
        ({"mean": 1, "std": 1, "temprature": 1}, "temprature: "),
        ([1, 2], "Input should be"),
    ],
)
def test_a_calibration_that_is_none_is_refused_by_name(checkpoint: Path, values: object, place: str) -> None:
    content = {**read_checkpoint_file(checkpoint), "calibration": values}
    (checkpoint / "polar.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=rf"polar\.json: calibration: expected .*; {place}"):
        RewardModel.load(checkpoint)


def test_a_model_keeps_its_calibration_and_answers_in_all_scales(checkpoint: Path, tmp_path: Path) -> None:
    model = RewardModel.load(checkpoint)
    model.calibration = Calibration(mean=-2.0, std=4.0, temperature=2.0)
    model.save(tmp_path / "saved")
    model = RewardModel.load(tmp_path / "saved")
    assert model.calibration == Calibration(mean=-2.0, std=4.0, temperature=2.0)
    group = Group("2+2?", "It is 4.", ("4", "5"))
    raw = model.score_groups([group])[0]
    of_reference = model.score([Comparison("2+2?", "It is 4.", "It is 4.")])[0]
    assert model.score_groups([group], scale="zscore")[0] == pytest.approx([(reward + 2) / 4 for reward in raw])
    expected = [1 / (1 + math.exp((of_reference - reward) / 2)) for reward in raw]
    assert model.score_groups([group], scale="probability")[0] == pytest.approx(expected, abs=1e-5)
    assert model.score([Comparison("2+2?", "It is 4.", "It is 4.")], scale="probability") == pytest.approx([0.5])


def test_z_scores_without_a_calibration_say_what_to_do(llama: RewardModel) -> None:
    with pytest.raises(InputError, match="run `polar calibrate MODEL --data FILE` first"):
        llama.score([Comparison("p", "r", "o")], scale="zscore")


def test_score_answers_in_the_scale_that_is_asked_for(checkpoint: Path, tmp_path: Path) -> None:
    model = RewardModel.load(checkpoint)
    model.calibration = Calibration(mean=1.0, std=2.0)
    model.save(checkpoint)
    group = Group("p", "r", ("a", "b"))
    source = write(tmp_path / "in.jsonl", [{"prompt": "p", "reference": "r", "candidates": ["a", "b"]}])
    for scale in ("raw", "zscore", "probability"):
        target = tmp_path / f"{scale}.jsonl"
        words = ["score", source, "--model", str(checkpoint), "--scale", scale, "--output", str(target), "--explain"]
        assert main(words) == 0
        rows = [json.loads(line) for line in target.read_text().splitlines()]
        assert [row["reward"] for row in rows] == pytest.approx(model.score_groups([group], scale=scale)[0], abs=1e-5)  # type: ignore[arg-type]


def test_an_exported_checkpoint_keeps_its_calibration(checkpoint: Path, tmp_path: Path) -> None:
    model = RewardModel.load(checkpoint)
    model.calibration = Calibration(mean=1.0, std=2.0)
    model.save(checkpoint)
    export(checkpoint, tmp_path / "exported", "lmdeploy")
    assert read_checkpoint_file(tmp_path / "exported")["calibration"]["std"] == 2.0


def test_training_on_drops_the_calibration(checkpoint: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "pairs.jsonl", PAIRS)
    assert main(["calibrate", str(checkpoint), "--data", data]) == 0
    output = tmp_path / "trained"
    trained = finetune(
        FinetuneConfig(model=str(checkpoint), data=[data], output=str(output), max_steps=1, batch_size=2)
    )
    assert trained.calibration is None
    assert "calibration" not in read_checkpoint_file(output)
