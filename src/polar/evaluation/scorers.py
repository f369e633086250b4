"""Scorers: a model in this process or on servers, and the baselines beside it.

Baselines measure closeness to the reference. ROUGE-L and chrF come with the extra `eval`; where it is not installed,
they are left out with a warning.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from polar.client.engines import ServerType
from polar.client.sync import RewardModelClient
from polar.core.baselines import BASELINES, chrf, rouge_l
from polar.core.checkpoint import Calibration, read_calibration, served_directory
from polar.core.errors import InputError, RewardError
from polar.core.records import Group, text_of
from polar.core.template import Compat, Template
from polar.model.reward_model import RewardModel

log = logging.getLogger(__name__)

Scorer = Callable[[Sequence[Group]], list[list[float]]]
"""Rewards of all candidates of several groups."""

LIBRARIES = {"ROUGE-L": "rapidfuzz", "chrF": "sacrebleu", "embedding": "sentence_transformers"}


@dataclass(frozen=True, slots=True)
class Model:
    """A reward model, wherever it computes."""

    template: Template
    calibration: Calibration | None
    score_encoded: Callable[..., list[list[float]]]
    """As in `RewardModel`, with the arguments groups and progress."""
    local: RewardModel | None
    """None where servers have it."""


@contextmanager
def open_model(
    name: str | Path | RewardModel,
    *,
    server_address: str | None = None,
    engine: ServerType = "auto",
    device: str | None = None,
    dtype: str | None = None,
    max_length: int | None = None,
    max_response_length: int | None = None,
    batch_tokens: int | None = None,
    compat: Compat | None = None,
) -> Iterator[Model]:
    """Load a model, or connect to the servers that have it; one that is loaded already is taken as it is.

    Raises:
        InputError: the model or its servers cannot be used, or, inside the block, a server failed to give a reward.
    """
    if isinstance(name, RewardModel):
        if engine != "auto" or {server_address, device, dtype, max_length, max_response_length, compat} != {None}:
            raise InputError("the model is loaded already: leave out what says where and how to load it")
        yield Model(name.template, name.calibration, partial(name.score_encoded, batch_tokens=batch_tokens), name)
        return
    if batch_tokens is not None and batch_tokens < 1:
        raise InputError(f"batch_tokens must be at least 1, found {batch_tokens}")
    if server_address is None:
        if engine != "auto":
            raise InputError("--engine says what serves at --server-address: give both")
        model = RewardModel.load(name, device=device, dtype=dtype, compat=compat)
        template = model.template = model.template.with_lengths(max_length, max_response_length)
        yield Model(template, model.calibration, partial(model.score_encoded, batch_tokens=batch_tokens), model)
        return
    if device is not None or dtype is not None or batch_tokens is not None:
        raise InputError("device, dtype and batch_tokens are the server's own: leave those flags out")
    calibration = read_calibration(served_directory(name))
    with RewardModelClient(
        name,
        max_length,
        max_response_length,
        server_address=server_address,
        server_type=engine,
        compat=compat,
    ) as client:
        client.connect()
        try:
            yield Model(client.template, calibration, client.score_encoded, None)
        except RewardError as error:
            raise InputError(f"{server_address}: {error}") from error


def baselines(embedding: str | None = None) -> dict[str, Scorer]:
    """Return all baselines that can be computed here, by the name that tables show; chance is the last.

    Args:
        embedding: Directory or hub name of a sentence-transformers model, or None for no similarity of embeddings.

    Raises:
        InputError: an embedding model is asked for, and the package or the model is not there.
    """
    found: dict[str, Callable[[Group], list[float]]] = {}
    for name, scorer in (("ROUGE-L", rouge_l), ("chrF", chrf)):
        if find_spec(LIBRARIES[name]):
            found[name] = scorer
        else:
            log.warning("the baseline %s is left out: pip install 'polar-rm[eval]'", name)
    first, *others = BASELINES.items()
    by_group = dict([first, *found.items(), *others])
    scorers: dict[str, Scorer] = {} if embedding is None else {"embedding": embedding_similarity(embedding)}
    return {**scorers, **{name: _each(scorer) for name, scorer in by_group.items()}}


def library_versions() -> Iterator[tuple[str, str]]:
    """Yield names and versions of the libraries that the numbers depend on, as far as they are installed."""
    for library in ("torch", "transformers", "tokenizers", "numpy", *LIBRARIES.values()):
        try:
            yield library, version(library)
        except PackageNotFoundError:
            continue


def embedding_similarity(name: str) -> Scorer:
    """Return the cosine of the embeddings of candidate and reference as a scorer.

    Args:
        name: Directory or hub name of a sentence-transformers model; no code of it is run.

    Raises:
        InputError: the package is not installed, or there is no such model.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise InputError(
            "similarity of embeddings needs sentence-transformers: pip install 'polar-rm[embeddings]'"
        ) from error
    try:
        model = SentenceTransformer(name, model_kwargs={"use_safetensors": True})  # never a pickle
    except (OSError, ValueError) as error:
        raise InputError(f"{name}: cannot be loaded as an embedding model: {' '.join(str(error).split())}") from error

    def score(groups: Sequence[Group]) -> list[list[float]]:
        texts = [[text_of(text) for text in (group.reference, *group.candidates)] for group in groups]
        different = list(dict.fromkeys(text for own in texts for text in own))
        vectors = model.encode(different, normalize_embeddings=True, show_progress_bar=False)
        place = {text: number for number, text in enumerate(different)}
        own = [vectors[[place[text] for text in each]] for each in texts]
        return [[float(candidate @ each[0]) for candidate in each[1:]] for each in own]

    return score


def _each(scorer: Callable[[Group], list[float]]) -> Scorer:
    return lambda groups: [scorer(group) for group in groups]
