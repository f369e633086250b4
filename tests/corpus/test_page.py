import base64
import hashlib
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from polar.core.html import visible
from polar.core.records import Trajectory
from polar.corpus.page import page
from polar.corpus.statistics import Sample, statistics

HOSTILE = [
    "<script>document.title = 'owned'</script>",
    "</script><script>document.title = 'owned'</script>",
    '"><img src=x onerror="document.title = \'owned\'">',
    "'><svg onload=document.title='owned'>",
    "<!-- ",
    "</pre></details></main>",
    "]]></style><style>* { display: none }</style>",
    "{{ 7 * 7 }} {% raw %} $x_1$ \\frac",
    "\u202eright to left",
    "\u200f",
    "a\x00b\x1b[31mc\x7f",
    "line\nline",
    "模型 模型",
    "",
]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

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


class Elements(HTMLParser):
    """The elements and attributes of a page, as a browser would see them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}


def html_of(trajectories: list[Trajectory]) -> str:
    return page(statistics([Sample(trajectory, finish_reason="<i>stop</i>") for trajectory in trajectories]))


def hostile() -> list[Trajectory]:
    return [
        Trajectory(f"{text} {number}", policy or "empty", f"{text}{sample}" if sample else text, family=policy, step=1)
        for number, text in enumerate(HOSTILE)
        for policy in HOSTILE
        for sample in range(2)
    ]


@pytest.fixture(scope="module")
def hostile_page() -> str:
    return html_of(hostile())


def test_hostile_texts_and_names_become_no_elements(hostile_page: str) -> None:
    harmless = html_of([Trajectory(f"p {n}", f"policy {p}", f"{p} {s}", family="f", step=1) for n in range(14) for p in range(14) for s in range(2)])  # noqa: E501  # fmt: skip
    found, expected = Elements(hostile_page), Elements(harmless)
    assert {"img", "i"}.isdisjoint(found.tags)
    assert found.tags.count("script") == expected.tags.count("script") == 1
    assert found.tags.count("style") == expected.tags.count("style")
    assert found.tags.count("svg") == expected.tags.count("svg") == 2
    assert found.attributes <= expected.attributes
    assert not any(name.startswith("on") for name in found.attributes)
    assert "{{ 7 * 7 }}" in hostile_page


def test_nothing_is_loaded_from_elsewhere_and_only_our_script_may_run(hostile_page: str) -> None:
    (script,) = re.findall(r"<script>(.*?)</script>", hostile_page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in hostile_page
    assert "default-src 'none'" in hostile_page
    assert not re.search(
        r"""(?:src|href)=["'](?!#)""", re.sub(r"<pre.*?</pre>|<td.*?</td>", "", hostile_page, flags=re.S)
    )


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


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [500, 1200])
def test_in_a_browser_the_table_sorts_and_filters_and_nothing_hostile_runs(tmp_path: Path, width: int) -> None:
    sizes = {"one": 3, "two": 4, "ten": 2}
    named = [Trajectory(f"p{n}", policy, f"{n}", family="fam") for policy, size in sizes.items() for n in range(size)]
    others = [Trajectory(text, text or "empty", text + "!", step=3) for text in HOSTILE]
    # The policy of the page stays in force: only our script and the driver, known by its hash, may run.
    digest = base64.b64encode(hashlib.sha256(DRIVER.encode()).digest()).decode()
    for name, rows in (("plain", named), ("hostile", named + others)):
        html = html_of(rows).replace("script-src '", f"script-src 'sha256-{digest}' '", 1)
        (tmp_path / f"{name}.html").write_text(html.replace("</body>", f"<script>{DRIVER}</script></body>"), "utf-8")
    plain, errors = browse(tmp_path / "plain.html", width)
    assert "CONSOLE" not in errors
    seen = re.findall('data-seen="([^"]*)"', plain)
    assert seen == ["one,ten,two; two,one,tendescending; ten,one,twoascending; one,ten,two1; two: 1 of 3 policies"]
    assert 'data-wide="false"' in plain  # the page itself never scrolls sideways
    dom, errors = browse(tmp_path / "hostile.html", width)
    assert "CONSOLE" not in errors
    assert 'data-wide="false"' in dom
    assert "<title>Corpus report: 23 trajectories</title>" in dom


def browse(path: Path, width: int) -> tuple[str, str]:
    """The document after its scripts ran, and what the browser said."""
    assert CHROMIUM is not None
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--window-size={width},900"]
    home = f"--user-data-dir={path.parent / 'profile'}"
    run = subprocess.run([CHROMIUM, *flags, home, "--dump-dom", path.as_uri()], capture_output=True, timeout=60)
    return run.stdout.decode(), run.stderr.decode(errors="replace")
