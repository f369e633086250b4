"""HTML pages in the tests: hostile texts, what a browser would see of them, and a browser where there is one."""

import base64
import hashlib
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

HOSTILE = [
    "<script>document.title = 'owned'</script>",
    "</script><script>document.title = 'owned'</script>",
    '"><img src=x onerror="document.title = \'owned\'">',
    "'><svg onload=document.title='owned'>",
    "<!-- ",
    "</pre></details></main></table>",
    "]]></style><style>* { display: none }</style>",
    "{{ 7 * 7 }} {% raw %} $x_1$ \\frac",
    "\u202eright to left",
    "\u200f",
    "a\x00b\x1b[31mc\x7f",
    "| a | b |\n|---|",
    "模型 模型",
    "",
]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


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


def assert_safe(html: str, plots: int) -> None:
    """No hostile text became an element, only our one script may run, and nothing is loaded from elsewhere."""
    found = Elements(html)
    ours = {"html", "head", "meta", "title", "style", "body", "header", "section", "nav", "main", "script", "h1", "h2"}
    ours |= {"h3", "h4", "p", "a", "ul", "li", "div", "small", "strong", "bdi", "br", "pre", "details", "summary"}
    ours |= {"table", "thead", "tbody", "tr", "th", "td", "button", "label", "input", "span", "dl", "dt", "dd"}
    drawing = {"svg", "metadata", "rdf:rdf", "cc:work", "dc:title", "dc:type", "dc:format", "defs", "g", "path", "use"}
    assert set(found.tags) <= ours | drawing | {"text", "clippath", "rect", "tspan"}
    assert found.tags.count("script") == 1
    assert found.tags.count("svg") == plots
    assert found.tags.count("style") == 1 + plots
    assert not any(name.startswith("on") for name in found.attributes)
    assert "{{ 7 * 7 }}" in html
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    assert f"script-src '{hash_of(script)}'" in html
    assert "default-src 'none'" in html
    texts = r"<pre.*?</pre>|<td.*?</td>|<li>.*?</li>|<p class=\"note\">.*?</p>|<summary.*?</summary>|<bdi>.*?</bdi>"
    assert not re.search(r"""(?:src|href)=["'](?!#)""", re.sub(texts, "", html, flags=re.DOTALL))


def browse(html: str, driver: str, directory: Path, width: int) -> tuple[str, str]:
    """Run a driver in a page, and return the document after it and what the browser said.

    The policy of the page stays in force: only its own script and the driver, known by its hash, may run.
    """
    assert CHROMIUM is not None
    html = html.replace("script-src '", f"script-src '{hash_of(driver)}' '", 1)
    path = directory / "page.html"
    path.write_text(html.replace("</body>", f"<script>{driver}</script></body>"), "utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--window-size={width},900"]
    command = [CHROMIUM, *flags, f"--user-data-dir={directory / 'profile'}", "--dump-dom", path.as_uri()]
    run = subprocess.run(command, capture_output=True, timeout=60, check=False)
    return run.stdout.decode(), run.stderr.decode(errors="replace")


def hash_of(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
