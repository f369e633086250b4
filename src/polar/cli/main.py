"""The `polar` command: one function per command, flags from its signature, YAML through `--config`.

A flag can also be set in a YAML file (`--config FILE`) or by an environment variable (`POLAR_<COMMAND>_<FLAG>`).
Exit codes: 0 success, 2 bad input (one line on stderr), 1 our own fault (with a traceback), 130 interrupted (Ctrl-C),
143 terminated (SIGTERM).
"""

from __future__ import annotations

import inspect
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from cyclopts import App, CycloptsError
from cyclopts.config import Env, Yaml
from rich.console import Console
from rich.logging import RichHandler

from polar.core.errors import InputError, TerminatedError
from polar.core.version import __version__
from polar.data.fields import describe

COMMANDS = {
    "score": ("polar.cli.score", "score outputs against references"),
    "rank": ("polar.cli.rank", "candidates in the order of their rewards: best-of-N, rejection sampling"),
    "calibrate": ("polar.cli.calibrate", "measure the range of a checkpoint's rewards, for z-scores and probabilities"),
    "serve": ("polar.cli.serve", "rewards over HTTP: our own routes, and those of vLLM, SGLang and others"),
    "eval": ("polar.cli.evaluate", "measure a reward model beside simple baselines"),
    "eval report": ("polar.cli.evaluate", "an HTML page that compares evaluations, from their records"),
    "convert": ("polar.cli.convert", "official POLAR checkpoint -> plain Hugging Face checkpoint"),
    "export": ("polar.cli.convert", "checkpoint -> the layout of XTuner or LMDeploy"),
    "parity": ("polar.cli.parity", "compare a reward server with the model in this process"),
    "corpus prompts": ("polar.cli.corpus", "texts -> prefixes that base policies continue"),
    "sample": ("polar.cli.sample", "prompts and a pool of policies -> trajectories"),
    "corpus clean": ("polar.cli.clean", "trajectories -> trajectories without loops, duplicates and test data"),
    "corpus report": ("polar.cli.corpus", "an HTML page about trajectories"),
    "pair": ("polar.cli.pair", "trajectories of many policies -> triples"),
    "rft-data": ("polar.cli.rft_data", "data sets -> prompts and references for reinforcement fine-tuning"),
    "plan": ("polar.cli.plan", "learning rate, batch, memory and time of a pre-training run"),
    "pretrain": ("polar.cli.train", "train a policy discriminator on triples"),
    "finetune": ("polar.cli.train", "fine-tune a reward model on preferences"),
}
"""Command -> its module and a summary. A module is imported when its command is asked for: `--help` needs no torch.
The function in it has the last word of the command as its name (rft_data for rft-data)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        sys.stdout.write(_overview())
        return 0
    if words[0] == "--version":
        sys.stdout.write(f"polar {__version__}\n")
        return 0
    count = 2 if " ".join(words[:2]) in COMMANDS else 1
    name = " ".join(words[:count])
    if name not in COMMANDS:
        if words[1:] in ([], ["-h"], ["--help"]) and any(command.startswith(f"{name} ") for command in COMMANDS):
            sys.stdout.write(_overview())  # the first word of several commands
            return 0
        return _refuse(f"unknown command {' '.join(words[:2])!r}; expected one of: {', '.join(COMMANDS)}")
    try:
        _set_up_logging()
        _run(name, words[count:])
    except InputError as error:
        return _refuse(str(error))
    except CycloptsError as error:
        return _refuse(f"{' '.join(str(error).split())} (see polar {name} --help)")
    except BrokenPipeError:  # the reader went away, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt as error:
        _say(str(error) or "interrupted")
        return 130
    except TerminatedError as error:
        _say(str(error))
        return 143
    return 0


def script() -> None:
    """Entry point of the installed `polar` script."""
    sys.exit(main())


def _run(name: str, words: list[str]) -> None:
    module, _ = COMMANDS[name]
    command: Callable[..., None] = getattr(
        import_module(module), {"eval": "evaluate"}.get(name, name.split()[-1].replace("-", "_"))
    )
    if transformers := sys.modules.get("transformers"):  # its bars for loading a few files are noise here
        transformers.utils.logging.disable_progress_bar()
    summary, examples = _documentation(command)
    app = App(
        name=f"polar {name}",
        help=summary,
        help_epilogue=examples,
        help_format="plaintext",
        version_flags=[],
        suppress_keyboard_interrupt=False,
        config=Env(f"POLAR_{re.sub('[ -]', '_', name.upper())}_", command=False),
    )
    app.default(command)
    words, config = _take_config(words)
    if config is not None:
        app.config = (Yaml(config, must_exist=True), *app.config)
    app(words, exit_on_error=False, print_error=False, result_action="return_value")


def _documentation(command: Callable[..., Any]) -> tuple[str, str]:
    """The docstring's text without its arguments, and its examples (shown below the flags)."""
    text = inspect.cleandoc(command.__doc__ or "").split("\nArgs:")[0]
    summary, _, examples = text.partition("\nExamples:\n")
    return summary.strip(), f"Examples:\n{examples.rstrip()}\n\nFlags can also come from a YAML file: --config FILE."


def _take_config(words: list[str]) -> tuple[list[str], Path | None]:
    """Split `--config FILE` off the words."""
    for number, word in enumerate(words):
        if word.startswith("--config="):
            return words[:number] + words[number + 1 :], _config_file(word.partition("=")[2])
        if word == "--config":
            if number + 1 == len(words):
                raise InputError("--config: expected a YAML file")
            return words[:number] + words[number + 2 :], _config_file(words[number + 1])
    return words, None


def _config_file(name: str) -> Path:
    path = Path(name).expanduser()
    if not path.is_file():
        raise InputError(f"--config {name}: no such file")
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = "" if mark is None else f":{mark.line + 1}"
        raise InputError(f"--config {name}{line}: not readable as YAML ({error.problem})") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"--config {name}: not readable as YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise InputError(f"--config {name}: expected flags with their values, found {describe(content)}")
    return path


def _overview() -> str:
    lines = [f"polar {__version__}: reward models that score outputs by their closeness to a reference", ""]
    lines += ["usage: polar COMMAND [flags]     (polar COMMAND --help lists the flags, with examples)", ""]
    lines += [f"  {name:<16}{summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(lines) + "\n"


def _set_up_logging() -> None:
    level = os.environ.get("POLAR_LOG", "INFO").upper()
    if level not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        raise InputError(f"POLAR_LOG={level}: expected DEBUG, INFO, WARNING or ERROR")
    logger = logging.getLogger("polar")
    logger.handlers = [RichHandler(console=Console(stderr=True), show_path=False, show_time=False)]
    logger.propagate = False
    logger.setLevel(level if _is_main_process() else "ERROR")


def _refuse(message: str) -> int:
    _say(f"error: {message}")
    return 2


def _say(message: str) -> None:
    if _is_main_process():
        sys.stderr.write(f"polar: {message}\n")


def _is_main_process() -> bool:
    """Of several that `torchrun` or `accelerate launch` started, all with the same command."""
    return os.environ.get("RANK", "0") == "0"


if __name__ == "__main__":
    script()
