"""The `polar` command: one function per command, flags from its signature, YAML through `--config`.

A flag can also be set in a YAML file (`--config FILE`) or by an environment variable (`POLAR_<COMMAND>_<FLAG>`).
Exit codes: 0 success, 2 bad input (one line on stderr), 1 our own fault (with a traceback), 130 interrupted (Ctrl-C),
143 terminated (SIGTERM).
"""

from __future__ import annotations

import inspect
import itertools
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from cyclopts import App, CycloptsError, Group
from cyclopts.config import Env, Yaml
from rich.console import Console
from rich.logging import RichHandler

from polar.core.errors import InputError, TerminatedError
from polar.core.version import __version__
from polar.data.fields import describe

app = App(
    name="polar",
    help="Reward models that score outputs by their closeness to a reference. polar COMMAND --help shows examples.",
    help_format="plaintext",
    version=__version__,
    version_flags=["--version"],
    suppress_keyboard_interrupt=False,
)
# A command is a path: its module is imported when it is asked for, so that `--help` is quick.
rewards, corpus = Group("Rewards", sort_key=1), Group("Corpus", sort_key=2)
training = Group("Training", sort_key=3)
app.command("polar.cli.score:score", group=rewards, help="Score candidates against references.")
app.command("polar.cli.rank:rank", group=rewards, help="Order candidates by reward: best-of-N, rejection sampling.")
app.command("polar.cli.calibrate:calibrate", group=rewards, help="Measure the range of a checkpoint's rewards.")
app.command("polar.cli.serve:serve", group=rewards, help="Serve rewards over HTTP.")
app.command("polar.cli.serve:parity", group=rewards, help="Compare a server with the model in this process.")
app.command("polar.cli.evaluate:app", name="eval", group=rewards, help="Measure a model beside simple baselines.")
app.command("polar.cli.sample:sample", group=corpus, help="Prompts and a pool of policies -> trajectories.")
app.command("polar.cli.pair:pair", group=corpus, help="Trajectories of many policies -> triples.")
app.command(App(name="corpus", group=corpus, help="Prefixes, cleaning and an HTML page of trajectories."))
app["corpus"].command("polar.cli.corpus:prompts", help="Texts -> prefixes that base policies continue.")
app["corpus"].command("polar.cli.corpus:clean", help="Take out loops, duplicates and evaluation data.")
app["corpus"].command("polar.cli.corpus:report", help="Write an HTML page about trajectories.")
app.command("polar.cli.rft_data:rft_data", group=corpus, help="Data sets -> prompts and references for RL.")
app.command("polar.cli.train:pretrain", group=training, help="Train a policy discriminator on triples.")
app.command("polar.cli.train:finetune", group=training, help="Fine-tune a reward model on preferences.")
app.command("polar.cli.train:plan", group=training, help="Learning rate, batch, memory and time of a pre-training.")
app.command("polar.cli.convert:convert", group=training, help="Official POLAR checkpoint -> Hugging Face checkpoint.")
app.command("polar.cli.convert:export", group=training, help="Checkpoint -> the layout of XTuner or LMDeploy.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' bars for a few files are noise here
    words = list(sys.argv[1:] if arguments is None else arguments)
    names = tuple(itertools.takewhile(lambda word: not word.startswith("-"), words))
    try:
        _set_up_logging()
        words, config = _take_config(words)
        names, apps, _ = app.parse_commands(names)
        if apps[-1].default_command is not None:
            _prepare(apps[-1], names, config)
        app(words, exit_on_error=False, print_error=False, result_action="return_value")
    except InputError as error:
        return _refuse(str(error))
    except CycloptsError as error:
        return _refuse(f"{' '.join(str(error).split())} (see {' '.join(('polar', *names))} --help)")
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


def _prepare(command: App, names: tuple[str, ...], config: Path | None) -> None:
    """Give a command its help, its variables of the environment and its `--config` file."""
    command.help, command.help_epilogue = _documentation(command.default_command)
    variables = Env(f"POLAR_{'_'.join(names).replace('-', '_').upper()}_", command=False)
    files = [] if config is None else [Yaml(config, must_exist=True, use_commands_as_keys=False)]
    command.config = (*files, variables)


def _documentation(command: Callable[..., Any] | None) -> tuple[str, str]:
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
