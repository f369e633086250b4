import re
from pathlib import Path

import pytest

from polar.core.html import visible
from polar.core.records import Trajectory
from polar.corpus.report import page
from polar.corpus.statistics import Sample, statistics
from tests.pages import HOSTILE, assert_safe, browse, needs_browser

DRIVER = """
const seen = [];
const click = name => headers.find(header => header.textContent.startsWith(name)).querySelector("button").click();
const order = () => Array.from(body.rows).filter(row => !row.hidden).map(row => row.cells[0].textContent).join();
seen.push(order());
click("Trajectories"); seen.push(order() + table.querySelector("[aria-sort]").getAttribute("aria-sort"));
click("Trajectories"); seen.push(order() + table.querySelector("[aria-sort]").getAttribute("aria-sort"));
click("Policy"); seen.push(order() + table.querySelectorAll("[aria-sort]").length);
const filter = document.getElementById("filter");
filter.value = "TWO fam"; filter.dispatchEvent(new Event("input"));
seen.push(order() + ": " + document.getElementById("found").textContent);
document.body.dataset.seen = seen.join("; ");
document.body.dataset.wide = document.documentElement.scrollWidth > document.documentElement.clientWidth;
"""


def html_of(trajectories: list[Trajectory]) -> str:
    return page(statistics([Sample(trajectory, finish_reason="<i>stop</i>") for trajectory in trajectories]))


def hostile() -> list[Trajectory]:
    return [
        Trajectory(f"{text} {number}", policy or "empty", f"{text}{sample}" if sample else text, family=policy, step=1)
        for number, text in enumerate(HOSTILE)
        for policy in HOSTILE
        for sample in range(2)
    ]


def test_hostile_texts_and_names_stay_text() -> None:
    assert_safe(html_of(hostile()), plots=2)


def test_the_same_report_gives_the_same_bytes() -> None:
    report = statistics(map(Sample, hostile()))
    assert page(report) == page(report)


def test_control_characters_are_shown_and_blank_texts_named() -> None:
    assert visible("a\x00b\x1b\x7f\x85\n\t字") == "a\u2400b\u241b\u2421\ufffd\n\t字"
    assert visible("\u200b\n") == "U+200B U+000A"
    assert visible("") == ""


def test_many_policies_are_all_in_the_table_but_not_all_in_the_plot() -> None:
    html = html_of([Trajectory("p", f"policy {n:03}", "x" * n) for n in range(100)])
    plot = html[html.index("Lengths by policy") : html.index('id="discrimination"')]
    table = html[html.index('<table id="policies"') :]
    assert set(re.findall(r"policy (\d+)", plot)) == {f"{n:03}" for n in (*range(30), *range(70, 100))}
    assert len(set(re.findall(r"policy (\d+)", table))) == 100


def test_the_lack_of_positives_is_on_top_of_the_page() -> None:
    html = html_of([Trajectory("p", policy, policy) for policy in "abc"])
    assert html.index("No reference with a positive") < html.index('id="overview"')


@needs_browser
@pytest.mark.parametrize("width", [500, 1200])
def test_in_a_browser_the_table_sorts_and_filters_and_nothing_hostile_runs(tmp_path: Path, width: int) -> None:
    sizes = {"one": 3, "two": 4, "ten": 2}
    named = [Trajectory(f"p{n}", policy, f"{n}", family="fam") for policy, size in sizes.items() for n in range(size)]
    others = [Trajectory(text, text or "empty", text + "!", step=3) for text in HOSTILE]
    plain, errors = browse(html_of(named), DRIVER, tmp_path, width)
    assert "CONSOLE" not in errors
    seen = re.findall('data-seen="([^"]*)"', plain)
    assert seen == ["one,ten,two; two,one,tendescending; ten,one,twoascending; one,ten,two1; two: 1 of 3 policies"]
    assert 'data-wide="false"' in plain  # the page itself never scrolls sideways
    dom, errors = browse(html_of(named + others), DRIVER, tmp_path, width)
    assert "CONSOLE" not in errors
    assert 'data-wide="false"' in dom
    assert "<title>Corpus report: 23 trajectories</title>" in dom
