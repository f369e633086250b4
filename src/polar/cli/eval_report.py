"""`polar eval report`: evaluations side by side, as an HTML page, as JSON and as a section for a model card."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.text import Text

from polar.core.errors import InputError
from polar.core.files import on_disk, write_text
from polar.core.html import visible
from polar.evaluation.page import model_card, page
from polar.evaluation.report import build_report


def report(
    runs: Annotated[Sequence[str], Parameter(negative="")], /, *, output: str, without_texts: bool = False
) -> None:
    """Compare evaluations, from the records that `polar eval --output` wrote; no model is loaded.

    Every model stands beside the baselines and beside the first model, with a paired bootstrap over prompts that says
    better, worse or cannot tell, for every data set, domain and slice. The page needs no network: its tables sort and
    can be searched, and it shows the worst mistakes to read. Beside it stand the same numbers as JSON, and a section
    for the model card in Markdown.

    Examples:
      polar eval report runs/nano --output report.html
      polar eval report runs/new runs/old runs/without-pretraining --output reports/july.html

    Args:
        runs: Directories of evaluations; models are compared with that of the first one.
        output: File for the page (.html); a .json and a .md of the same name are written beside it.
        without_texts: Leave the worst mistakes out, for a report on data whose texts may not be passed on.
    """
    target = Path(output)
    if target.suffix != ".html":
        raise InputError(f"{output}: expected a file name that ends in .html")
    if len({Path(run).resolve() for run in runs}) < len(runs):
        raise InputError("a run is given twice; expected different directories")
    found = build_report(runs, texts=not without_texts)
    contents = {".json": found.to_json(), ".md": model_card(found), ".html": page(found)}
    with on_disk(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
    for suffix, content in contents.items():
        write_text(target.with_suffix(suffix), content)
    console = Console(stderr=True)
    for warning in found.warnings:
        console.print(Text(f"warning: {visible(warning)}"))
    sys.stderr.write(f"wrote {target}, {target.stem}.json and {target.stem}.md\n")
