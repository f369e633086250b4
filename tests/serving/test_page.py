"""The page for people, in headless Chromium."""

import asyncio
import html
import json
import re
import shutil
import subprocess
from base64 import b64encode
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from polar.serving import app as application
from polar.serving.app import PAGE, PAGE_HEADERS, create_app
from polar.serving.server import bind, serve
from polar.serving.service import Service
from tests.serving.serving import ask, service

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")

HOSTILE = [
    "<script>document.title = 'owned'</script>",
    "</textarea></script><script>document.title = 'owned'</script>",
    '"><img src=x onerror="document.title = \'owned\'">',
    "'><svg onload=document.title='owned'>",
    "javascript:document.title='owned'",
    "</style><style>* { display: none }</style>",
    "{{ 7 * 7 }} ${7 * 7} \u202eright to left",
    "<iframe src='data:text/html,<script>top.document.title=1</script>'></iframe>",
]

DRIVER = """
const wait = condition => new Promise(done => {
  const again = () => condition() ? done() : setTimeout(again, 20);
  again();
});
const key = (target, name, more) => target.dispatchEvent(
  new KeyboardEvent("keydown", {key: name, bubbles: true, cancelable: true, ...more}));
const answered = () => wait(() => !byId("score").disabled);
const report = {};
(async () => {
  const task = TASK;
  if (task.example) byId("example").click(); else fill(task);
  if (task.output) byId("output").value = task.output;
  if (task.key) byId("key").value = task.key;
  key(byId("prompt"), "Enter", {ctrlKey: true});
  await answered();
  report.message = byId("message").textContent;
  report.focus = document.activeElement.id;
  report.items = Array.from(byId("ranking").children, item => ({
    text: item.querySelector(".text").textContent,
    value: item.querySelector(".value").textContent,
    bar: item.querySelector(".bar").style.width,
    added: Array.from(item.querySelectorAll("ins"), part => part.textContent),
    missing: Array.from(item.querySelectorAll("del"), part => part.textContent),
    cut: (item.querySelector(".cut") || {}).textContent,
  }));
  report.elements = Array.from(new Set(Array.from(document.querySelectorAll("*"), found => found.localName))).sort();
  report.wide = document.documentElement.scrollWidth > document.documentElement.clientWidth;
  report.title = document.title;
  report.background = getComputedStyle(document.body).backgroundColor;
  const before = candidates.children.length;
  byId("add").click();
  report.added = [candidates.children.length - before, document.activeElement.getAttribute("aria-label")];
  candidates.lastChild.lastChild.click();
  report.removed = [candidates.children.length - before, document.activeElement.localName];
  document.body.dataset.report = JSON.stringify(report);
})();
"""


def browse(
    task: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    of: Service | None = None,
    *flags: str,
    **more: Any,
) -> dict[str, Any]:
    """Let the page do a task; the content security policy stays in force, the driver is allowed by its hash."""
    driver = DRIVER.replace("TASK", json.dumps(task).replace("<", "\\u003c"))
    digest = b64encode(sha256(driver.encode()).digest()).decode()
    policy = PAGE_HEADERS["Content-Security-Policy"].replace("script-src", f"script-src 'sha256-{digest}'")
    monkeypatch.setattr(application, "PAGE", PAGE.replace("</body>", f"<script>{driver}</script></body>"))
    monkeypatch.setattr(application, "PAGE_HEADERS", PAGE_HEADERS | {"Content-Security-Policy": policy})
    of = of or service()

    async def run() -> tuple[str, str]:
        listener = bind("127.0.0.1", 0, protected=False)
        app = create_app(of, **more)
        server = asyncio.create_task(serve(app, of, listener, drain_seconds=2, read_seconds=5))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        assert CHROMIUM is not None
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", *flags]
        command += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=20000", "--dump-dom", url]
        shown = await asyncio.to_thread(subprocess.run, command, capture_output=True, timeout=60)
        server.cancel()
        await asyncio.gather(server, return_exceptions=True)
        return shown.stdout.decode(), shown.stderr.decode(errors="replace")

    dom, errors = asyncio.run(run())
    found = re.search(r'data-report="([^"]*)"', dom)
    assert found, errors
    report: dict[str, Any] = json.loads(html.unescape(found[1]))
    assert "Content Security Policy" not in errors
    return report


def test_only_our_own_script_and_style_may_run_and_nothing_is_loaded() -> None:
    answer = ask(lambda client: client.get("/"))
    policy = answer.headers["Content-Security-Policy"]
    for name in ("script", "style"):
        (content,) = re.findall(f"<{name}>(.*?)</{name}>", answer.text, re.DOTALL)
        assert f"{name}-src 'sha256-{b64encode(sha256(content.encode()).digest()).decode()}'" in policy
    assert policy.startswith("default-src 'none'")
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|https?://", answer.text)

    attributes: set[str] = set()

    class Attributes(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            attributes.update(name for name, _ in attrs)

    Attributes().feed(answer.text)
    assert attributes.isdisjoint({"src", "href", "style", "action"})
    assert not any(name.startswith("on") for name in attributes)


@browser
@pytest.mark.parametrize(
    ("flags", "background"),
    [
        (["--window-size=500,900"], "rgb(255, 255, 255)"),
        (["--window-size=1200,900", "--blink-settings=preferredColorScheme=0"], "rgb(20, 23, 27)"),
    ],
    ids=["phone", "dark"],
)
def test_the_example_is_ranked_with_bars_and_differences(
    flags: list[str], background: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = browse({"example": True}, tmp_path, monkeypatch, None, *flags)
    assert report["background"] == background
    assert (report["message"], report["focus"]) == ("", "result-heading")
    values = [float(item["value"]) for item in report["items"]]
    assert len(values) == 3
    assert values == sorted(values, reverse=True)
    bars = [float(item["bar"].removesuffix("%")) for item in report["items"]]
    assert (bars[0], bars[-1]) == (100, 4)
    assert [item["text"][:5] for item in report["items"]] == ["PutPl", "PutBo", "PutFr"]  # one word for another
    assert {"Place", "in"} <= set(report["items"][0]["added"])
    assert "Put" in report["items"][0]["missing"]
    assert not report["wide"]
    assert report["added"] == [1, "Candidate 4"]
    assert report["removed"] == [0, "textarea"]


@browser
def test_nothing_hostile_runs_from_any_field(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = browse({"prompt": "p", "reference": "r", "candidates": ["c"]}, tmp_path, monkeypatch)
    monkeypatch.undo()
    of = service()
    of.name = HOSTILE[2]
    task = {"prompt": HOSTILE[0], "reference": HOSTILE[1], "candidates": HOSTILE, "key": HOSTILE[3]}
    report = browse(task, tmp_path, monkeypatch, of)
    assert report["title"] == plain["title"] == "Score answers against a reference"
    assert set(report["elements"]) <= set(plain["elements"])
    assert len(report["items"]) == len(HOSTILE)


@browser
def test_what_was_cut_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = {"prompt": "p", "reference": "word " * 300, "candidates": ["a", "word " * 280], "output": "probability"}
    report = browse(task, tmp_path, monkeypatch)
    cuts = {item["cut"] for item in report["items"]}
    assert any("of the reference and" in cut and "of the candidate were not read" in cut for cut in cuts)
    assert all(0 <= float(item["value"]) <= 1 for item in report["items"])


@browser
@pytest.mark.parametrize(
    ("task", "words", "focus"),
    [
        ({"output": "zscore"}, "polar calibrate", None),
        ({"key": "wrong"}, "expected a valid API key", "key"),
    ],
)
def test_refusals_are_shown_in_words(
    task: dict[str, Any], words: str, focus: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = (b"right",) if "key" in task else ()
    whole = {"prompt": "p", "reference": "r", "candidates": ["c"]} | task
    report = browse(whole, tmp_path, monkeypatch, keys=keys)
    assert words in report["message"]
    assert report["items"] == []
    assert focus in (None, report["focus"])
