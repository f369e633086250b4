import pytest

from polar.cli.main import main
from polar.core.errors import InputError
from polar.training.plan import DEVICES, Run, batch_size, forecast, learning_rate, quantity

PAPER = {  # D.1.2: parameters, tokens before, tokens of the corpus, learning rate, batch, GPUs (H800), hours
    "1.8B": (1.8e9, 2.5e12, 0.94e12, 1.4e-5, 1940, 320, 57),
    "7B": (7e9, 4.0e12, 3.6e12, 1.67e-5, 4343, 912, 175),
}


@pytest.mark.parametrize("name", PAPER)
def test_the_fits_give_the_published_values(name: str) -> None:
    parameters, before, corpus, published_rate, published_batch, *_ = PAPER[name]
    # 1.4e-5 is printed with two digits
    assert learning_rate(parameters, before, corpus) == pytest.approx(published_rate, rel=0.025)
    assert round(batch_size(parameters, corpus)) == published_batch


def test_the_papers_7b_run_takes_its_time_and_steps() -> None:
    parameters, before, corpus, _, batch, devices, hours = PAPER["7B"]
    result = forecast(Run(parameters, before, corpus, devices, DEVICES["h800"]))
    assert result.hours == pytest.approx(hours, rel=0.05)
    assert result.batch == batch
    assert result.steps == pytest.approx(510e6 / batch, rel=0.01)
    assert result.state_bytes == pytest.approx(16 * 7e9 / 912)


def test_time_and_memory_go_down_with_devices() -> None:
    one, eight = (forecast(Run(1e9, 1e12, 1e9, devices)) for devices in (1, 8))
    assert one.hours == pytest.approx(8 * eight.hours)
    assert one.device_hours == pytest.approx(eight.device_hours)
    assert one.state_bytes == pytest.approx(8 * eight.state_bytes)
    assert one.activation_bytes == eight.activation_bytes


@pytest.mark.parametrize(
    ("text", "number"),
    [("1.8B", 1.8e9), ("0.94T", 0.94e12), ("300m", 3e8), ("1_000", 1000), ("5e9", 5e9), ("2 g", 2e9)],
)
def test_quantities_have_units(text: str, number: float) -> None:
    assert quantity(text) == pytest.approx(number)


@pytest.mark.parametrize("text", ["", "many", "1.8BB", "-1B", "1B2"])
def test_what_is_no_quantity_is_one_line(text: str) -> None:
    with pytest.raises(InputError, match="expected a number such as 1.8B"):
        quantity(text)


def test_the_command_prints_a_plan(capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--parameters 1.8B --corpus-tokens 0.94T --pretrained-tokens 2.5T --devices 320 --device h800".split()
    assert main(["plan", *flags]) == 0
    output = capsys.readouterr().out
    assert "1.43e-05" in output
    assert "1,940 triples" in output
    assert "it fits" in output
    assert main(["plan", *flags[:-1], "abacus"]) == 2
    assert "expected one of a100" in capsys.readouterr().err
