"""The site: it builds without warnings, has every command and public name, and loads nothing from elsewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import polar
from polar.cli.main import app

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(target)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return target


def test_every_command_and_public_name_has_a_reference(site: Path) -> None:
    commands = (site / "reference/cli/index.html").read_text()
    for name in app:
        assert name.startswith("-") or f'id="polar-{name}"' in commands, name
    names = (site / "reference/python/index.html").read_text()
    for name in set(polar.__all__) - {"__version__", "BUNDLED_MODEL"}:
        assert re.search(rf'id="polar\.[\w.]*\b{name}"', names), name


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        loaded = re.findall(r'<(?:script|img|iframe)[^>]* src="([^"]+)"|<link[^>]* href="([^"]+)"', page.read_text())
        assert not [url for pair in loaded for url in pair if url.startswith(("http:", "https:", "//"))], page
