"""The baselines that can be computed here, those from libraries too: ROUGE-L, chrF and similarity of embeddings.

All are closeness to the reference. They come with the extra `eval`; where it is not installed, ROUGE-L and chrF are
left out with a warning.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from polar.core.baselines import BASELINES, chrf, rouge_l
from polar.core.errors import InputError
from polar.core.records import Group, text_of

log = logging.getLogger(__name__)

Scorer = Callable[[Sequence[Group]], list[list[float]]]
"""Rewards of all candidates of several groups."""

LIBRARIES = {"ROUGE-L": "rapidfuzz", "chrF": "sacrebleu", "embedding": "sentence_transformers"}


def baselines(embedding: str | None = None) -> dict[str, Scorer]:
    """All baselines that can be computed here, by the name that tables show; chance is the last.

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
    """Names and versions of the libraries that the numbers depend on, as far as they are installed."""
    for library in ("torch", "transformers", "tokenizers", "numpy", *LIBRARIES.values()):
        try:
            yield library, version(library)
        except PackageNotFoundError:
            continue


def embedding_similarity(name: str) -> Scorer:
    """Cosine of the embeddings of candidate and reference.

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
