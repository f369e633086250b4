"""Evaluation: the items of a suite become records, in shards, so that a run that was killed goes on from those."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

from polar.client.engines import ServerType
from polar.core.errors import InputError
from polar.core.files import on_disk, write_json
from polar.core.records import Group, aggregated, text_of
from polar.core.version import __version__
from polar.data.readers import OnBadRow, ReadReport
from polar.evaluation.datasets import read_items
from polar.evaluation.manifest import (
    MANIFEST,
    DatasetFacts,
    Manifest,
    ModelFacts,
    commit,
    model_facts,
    read_manifest,
    write_manifest,
)
from polar.evaluation.perturbations import read_paraphrases, with_perturbations
from polar.evaluation.records import (
    HASH_DIGITS,
    MODEL,
    RECORDS,
    WITHOUT_REFERENCE,
    Item,
    Record,
    fingerprint,
    sample,
    shard_fingerprint,
    shard_path,
    stretches,
    write_shard,
)
from polar.evaluation.scorers import Model, Scorer, baselines, library_versions, open_model
from polar.evaluation.suites import Dataset, ReferenceSource, Suite, read_suite
from polar.evaluation.summary import SUMMARY, Summary, summarise
from polar.model.reward_model import RewardModel


def planned(suite: Suite) -> tuple[DatasetFacts, ...]:
    """Return the facts of the data sets before anything is scored."""
    return tuple(
        DatasetFacts(
            name=dataset.name,
            path=dataset.path,
            task=dataset.task,
            reference="the triples" if dataset.task == "policy discrimination" else str(dataset.reference),
            aggregate=dataset.aggregate,
            scoring=dataset.scoring,
        )
        for dataset in suite.datasets
    )


def evaluate(
    model: str | Path | RewardModel | None,
    suite: str | Path | Suite,
    *,
    output: str | Path | None = None,
    data: str | Path | None = None,
    reference: ReferenceSource | None = None,
    limit: int | None = None,
    without_reference: bool = False,
    reference_free: bool = False,
    embedding: str | None = None,
    on_bad_row: OnBadRow = "error",
    server_address: str | None = None,
    engine: ServerType = "auto",
    device: str | None = None,
    dtype: str | None = None,
    max_length: int | None = None,
    max_response_length: int | None = None,
    batch_tokens: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> Summary:
    """Measure a reward model beside baselines, as `polar eval` does, and keep a record of every item.

    Example:
        >>> import polar
        >>> from polar.evaluation.suites import Suite
        >>> summary = polar.evaluate("polar-mini", Suite.of_files(triples=["held-out.jsonl"]))
        >>> print(summary.table())
        >>> summary.save("results/mini")

    Args:
        model: Checkpoint directory, hub name, bundled model, or a loaded model; None for the baselines alone.
        suite: A YAML file, the name of a suite of the package, or data sets (`Suite`).
        output: Directory for records, manifest and summary; the same evaluation goes on there after a crash.
        data: Directory that the paths of a named suite are relative to (default: where its file is).
        reference: Where references come from, for data sets of a named suite that do not say.
        limit: At most this many items of each data set, drawn at random (always the same ones).
        without_reference: Score with an empty reference too: what the model knows without one.
        reference_free: The model reads empty references, the baselines the true ones.
        embedding: A sentence-transformers model for one more baseline.
        on_bad_row: "skip" leaves unreadable rows out; the manifest counts them.
        server_address: host:port or URL of a server that gives the rewards, several separated by commas; the model is
            then the directory of the checkpoint that it serves.
        engine: Type of these servers; "auto" finds out.
        device: Torch device (default: a GPU if there is one).
        dtype: float32, bfloat16 or float16 (default: bfloat16 on a GPU, float32 on a CPU).
        max_length: Longest input in tokens (default: the checkpoint's).
        max_response_length: Longest reference and answer in tokens (default: the checkpoint's).
        batch_tokens: Tokens of one forward pass (default: 4096 on a CPU, 16384 elsewhere).
        progress: Called with the number of items that are done, scored now or before.

    Raises:
        InputError: a suite, a row, a model or a server cannot be used; or the directory holds records of another run,
            or of other data.
        FloatingPointError: a reward is not finite.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit must be at least 1, found {limit}")
    if output is not None and (Path(output).is_file() or Path(output).suffix == ".json"):
        raise InputError(f"{output}: expected a directory for the records; the summary in it is {SUMMARY}")
    if model is None and server_address is not None:
        raise InputError("give either a server address or the baselines alone: a server has a model")
    chosen = suite if isinstance(suite, Suite) else read_suite(str(suite), data, reference)
    baseline_scorers = baselines(embedding)
    opened: AbstractContextManager[Model | None] = nullcontext()
    if model is not None:
        opened = open_model(
            model,
            server_address=server_address,
            engine=engine,
            device=device,
            dtype=dtype,
            max_length=max_length,
            max_response_length=max_response_length,
            batch_tokens=batch_tokens,
        )
    with opened as rewarding, ExitStack() as temporary:
        facts: ModelFacts | None = None
        own: list[str] = []
        if rewarding is not None:
            name = None if isinstance(model, RewardModel) else model
            facts = model_facts(name, rewarding.template, rewarding.local, engine)
            own = [MODEL, WITHOUT_REFERENCE] if without_reference else [MODEL]
        manifest = Manifest(
            polar=__version__,
            commit=commit(),
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            suite="flags" if isinstance(suite, Suite) else str(suite),
            model=facts,
            scorers=(*own, *baseline_scorers),
            settings={
                "limit": limit,
                "on_bad_row": on_bad_row,
                "reference_free": reference_free,
                "embedding": embedding,
                "datasets": [dataset.model_dump(mode="json", exclude_defaults=True) for dataset in chosen.datasets],
            },
            versions=dict(library_versions()),
            datasets=planned(chosen),
        )
        directory = Path(output or temporary.enter_context(TemporaryDirectory(prefix="polar-eval-")))
        _record_items(chosen, directory, manifest, rewarding, baseline_scorers, progress)
        summary = summarise(directory)
        write_json(directory / SUMMARY, summary.content())
        weakref.finalize(summary, temporary.pop_all().close)
    return summary


def _record_items(
    suite: Suite,
    directory: Path,
    manifest: Manifest,
    model: Model | None,
    baselines: dict[str, Scorer],
    progress: Callable[[int], object] | None,
) -> None:
    """Score all items of a suite, except those that are recorded already.

    Memory holds one stretch of items (or `limit` of them), whatever the size of the data.

    Args:
        suite: Data sets to read.
        directory: For manifest and records; made if needed.
        manifest: With `planned` data sets; its scorers are those of the records.
        model: None for the baselines alone.
        baselines: By name.
        progress: Called with the number of items that are done, scored now or before.
    """
    settings = manifest.settings
    with on_disk(directory):
        (directory / RECORDS).mkdir(parents=True, exist_ok=True)
    manifest = _continued(directory, manifest)
    write_manifest(directory, manifest)
    datasets = list(manifest.datasets)
    for place, dataset in enumerate(suite.datasets):
        report = ReadReport()
        digest, count, shard = hashlib.sha256(), 0, -1
        paraphrases = read_paraphrases(dataset.paraphrases) if dataset.paraphrases else {}
        items = with_perturbations(
            sample(read_items(dataset, settings["on_bad_row"], report), settings["limit"]),
            dataset.perturbations,
            paraphrases,
        )
        for shard, stretch in enumerate(stretches(items)):
            own = [item.digest() for item in stretch]
            path = shard_path(directory, dataset.name, shard)
            if not _known(path, fingerprint(own)):
                blind = settings["reference_free"]
                records = _score(dataset, count, stretch, manifest.scorers, model, baselines, blind)
                write_shard(path, records, manifest.scorers, fingerprint(own))
            digest.update(b"".join(own))
            count += len(own)
            if progress is not None:
                progress(len(stretch))
        _known(shard_path(directory, dataset.name, shard + 1), "no further items")
        datasets[place] = datasets[place].model_copy(
            update={
                "finished": True,
                "items": count,
                "skipped": report.skipped,
                "first_reasons": tuple(report.first_reasons),
                "hash": digest.hexdigest()[:HASH_DIGITS],
            }
        )
        manifest = manifest.model_copy(update={"datasets": tuple(datasets)})
        write_manifest(directory, manifest)


def _continued(directory: Path, manifest: Manifest) -> Manifest:
    """Return the manifest to continue with: that of the directory, if it is of the same run."""
    if not (directory / MANIFEST).exists():
        if any((directory / RECORDS).iterdir()):
            raise InputError(f"{directory}: holds records without a {MANIFEST}; choose another directory")
        return manifest
    before = read_manifest(directory)
    # Settings hold the data sets, so the suite may be named in another way now.
    for field in ("polar", "model", "scorers", "settings"):
        old, new = getattr(before, field), getattr(manifest, field)
        if old != new:
            raise InputError(
                f"{directory}: holds records of another run (its {field}: {_short(old)}; now: {_short(new)}); "
                "choose another directory, or remove this one"
            )
    unfinished = {"finished": False, "items": 0, "skipped": 0, "first_reasons": (), "hash": None}
    if [each.model_copy(update=unfinished) for each in before.datasets] != list(manifest.datasets):
        raise InputError(f"{directory}: holds records of other data sets; choose another directory, or remove this one")
    return before


def _short(value: object) -> str:
    if value is None:
        return "none, the baselines alone"
    if isinstance(value, ModelFacts):
        value = f"{value.name}, {value.hashes}, {value.computed}"
    text = " ".join(str(value).split())
    return text if len(text) <= 150 else text[:150] + "..."


def _known(path: Path, items: str) -> bool:
    """Return whether these items are recorded at this place."""
    found = shard_fingerprint(path)
    if found is not None and found != items:
        raise InputError(
            f"{path}: holds records of other items: the data changed since they were written; "
            "choose another directory, or remove this one"
        )
    return found is not None


def _score(
    dataset: Dataset,
    first: int,
    items: Sequence[Item],
    scorers: Sequence[str],
    model: Model | None,
    baselines: dict[str, Scorer],
    reference_free: bool,
) -> list[Record]:
    groups = [group for item in items for group in item.groups]
    rewards = {name: scorer(groups) for name, scorer in baselines.items()}
    cut = [(0,) * len(group.candidates) for group in groups]
    if model is not None:
        bare = [replace(group, reference="") for group in groups]
        rewards[MODEL], cut = _model_rewards(model, bare if reference_free else groups)
        if WITHOUT_REFERENCE in scorers:
            rewards[WITHOUT_REFERENCE], _ = _model_rewards(model, bare)
    records, end = [], 0
    for number, item in enumerate(items, first):
        start, end = end, end + len(item.groups)
        by_reference = {name: tuple(map(tuple, rewards[name][start:end])) for name in scorers}
        records.append(_record(dataset, number, item, tuple(map(sum, zip(*cut[start:end], strict=True))), by_reference))
    return records


def _model_rewards(model: Model, groups: Sequence[Group]) -> tuple[list[list[float]], list[tuple[int, ...]]]:
    """Return rewards of the model and tokens that were cut; groups of similar length are scored together."""
    encoded = [model.template.encode_group(group) for group in groups]
    order = sorted(range(len(groups)), key=lambda i: len(encoded[i].prefix) + sum(map(len, encoded[i].branches)))
    rewards: list[list[float]] = [[] for _ in groups]
    for i, values in zip(order, model.score_encoded([encoded[i] for i in order]), strict=True):
        rewards[i] = values
    return rewards, [tuple(cut.prompt + cut.reference + cut.output for cut in group.truncations) for group in encoded]


def _record(
    dataset: Dataset,
    number: int,
    item: Item,
    cut: tuple[int, ...],
    by_reference: dict[str, tuple[tuple[float, ...], ...]],
) -> Record:
    further = tuple(map(text_of, item.further_references))
    references, candidates = (text_of(item.group.reference), *further), tuple(map(text_of, item.group.candidates))
    return Record(
        dataset=dataset.name,
        number=number,
        task=item.task,
        domain=item.domain,
        slices=item.slices,
        id=None if item.group.id is None else str(item.group.id),
        prompt_id=item.prompt_id,
        reference_source=item.reference_source,
        reference_policy=item.reference_policy,
        reference_family=item.reference_family,
        reference_quality=item.reference_quality,
        reference_length=len(references[0]),
        quality=item.quality,
        policies=item.policies,
        families=item.families,
        lengths=tuple(map(len, candidates)),
        copies_reference=tuple(candidate in references for candidate in candidates),
        cut_tokens=cut,
        rewards={name: tuple(aggregated(each, dataset.aggregate)) for name, each in by_reference.items()},
        by_reference=by_reference if further else None,
        prompt=text_of(item.group.prompt),
        reference=references[0],
        further_references=further or None,
        candidates=candidates,
    )
