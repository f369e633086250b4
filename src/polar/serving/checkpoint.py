"""A checkpoint as the server sees it: how inputs are made for it, and the model itself unless that runs elsewhere."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from starlette.responses import JSONResponse

from polar.client.client import AsyncRewardModelClient
from polar.client.transport import Limits
from polar.core.checkpoint import (
    BUNDLED,
    Calibration,
    checkpoint_directory,
    local_directory,
    read_calibration,
    read_checkpoint_file,
)
from polar.core.errors import InputError
from polar.core.http import CHECKPOINT_HEADER
from polar.core.records import Comparison
from polar.core.template import Compat, EncodedGroup, Template
from polar.model.reward_model import RewardModel
from polar.serving.errors import RefusalError

SERVERS_SECONDS = 300.0
"""Time that the servers behind a gateway have for one request, with all tries."""

Inputs = list[str] | list[list[int]]
"""Complete inputs, as other servers take them: texts in which special tokens are spelt, or token ids."""


@dataclass(frozen=True, slots=True)
class Loading:
    """Settings for loading checkpoints, at the start and later; see `RewardModel.load` and `Template.with_lengths`."""

    device: str | None = None
    dtype: str | None = None
    compat: Compat | None = None
    max_length: int | None = None
    max_response_length: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """A checkpoint that requests are encoded for and scored by; one request never sees two of them."""

    source: str
    template: Template
    vocab_size: int
    calibration: Calibration | None
    probes: list[dict[str, Any]]
    """See `polar.core.checkpoint.Probe`."""
    identity: str
    """Sixteen hexadecimal digits of weights, template, tokenizer and probes; replicas have the same."""
    model: RewardModel | None
    """None in a gateway."""
    servers: AsyncRewardModelClient | None = None
    """In a gateway, what asks the servers that have it: of this checkpoint alone, so another one is proven anew."""
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def max_length(self) -> int:
        """Longest input in tokens."""
        return self.template.settings.max_length

    async def connect(self) -> None:
        """Prove the servers of a gateway, before the first request.

        Raises:
            EngineError: One gives other rewards than this checkpoint, or none can be reached.
        """
        if self.servers is not None:
            await self.servers.connect()

    async def close(self) -> None:
        """Close the connections of a gateway, after the last request."""
        if self.servers is not None:
            await self.servers.aclose()

    def description(self) -> dict[str, object]:
        """Return what clients without the checkpoint need: the contents of its polar.json and its tokenizer.json."""
        calibration = None if self.calibration is None else asdict(self.calibration)
        facts = {"template": asdict(self.template.settings), "probes": self.probes, "calibration": calibration}
        return {"checkpoint": facts, "tokenizer": self.template.tokenizer.to_str()}

    def answer(self, content: object) -> JSONResponse:
        """Return content as JSON that names this checkpoint, for clients that keep their connection."""
        return JSONResponse(content, headers={CHECKPOINT_HEADER: self.identity})

    def encode_inputs(self, inputs: Inputs, where: str, limit: int | None = None) -> EncodedGroup:
        """Return the token ids of complete inputs.

        Texts get the BOS token that the checkpoint was trained with, unless they begin with it; ids are taken as they
        are. Nothing is cut, because the reward is read at the score token at the end.

        Args:
            inputs: Texts or lists of ids.
            where: The field of the request that holds them, for messages.
            limit: Longest input in tokens, if less than the checkpoint's.

        Raises:
            RefusalError: The reward of an input would be meaningless; it says which one and why.
        """
        texts = all(isinstance(one, str) for one in inputs)
        sequences = self._encode_texts(cast(list[str], inputs)) if texts else cast(list[list[int]], inputs)
        for number, ids in enumerate(sequences):
            self._require_scorable(ids, f"{where}[{number}]", min(limit or self.max_length, self.max_length))
        return EncodedGroup(prefix=[], branches=list(sequences), truncations=[])

    def _encode_texts(self, texts: list[str]) -> list[list[int]]:
        encodings = self.template.tokenizer.encode_batch(texts, add_special_tokens=False)
        bos = self.template.settings.bos_token_id
        if bos is None:
            return [encoding.ids for encoding in encodings]
        return [ids if ids[:1] == [bos] else [bos, *ids] for ids in (encoding.ids for encoding in encodings)]

    def _require_scorable(self, ids: Sequence[int], place: str, limit: int) -> None:
        settings, name = self.template.settings, self.template.tokenizer.id_to_token
        split, score = settings.split_token_id, settings.score_token_id
        if len(ids) > limit:
            raise RefusalError(
                400,
                f"{place}: this model's maximum context length is {limit} tokens, but the input has {len(ids)}; "
                "shorten it in the client, since cutting it here would lose the score token",
                place,
            )
        if not ids:
            raise RefusalError(400, f"{place}: the input is empty", place)
        if not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise RefusalError(400, f"{place}: expected token ids from 0 to {self.vocab_size - 1}", place)
        if ids[-1] != score or split not in ids:
            raise RefusalError(
                400,
                f"{place}: not an input of this model, so its reward would mean nothing: expected prompt, reference, "
                f"{name(split)} (id {split}), prompt, output and at the end {name(score)} (id {score}); "
                "POST /v1/rewards takes the parts and puts them together",
                place,
            )


def load_checkpoint(source: str, loading: Loading) -> Checkpoint:
    """Load a model and score one comparison by it.

    Raises:
        InputError: There is no usable checkpoint at that place, or its rewards are not finite numbers.
    """
    model = RewardModel.load(source, device=loading.device, dtype=loading.dtype, compat=loading.compat)
    model.template = model.template.with_lengths(loading.max_length, loading.max_response_length)
    try:
        model.score([Comparison("2+2?", "It is 4.", "4")])
    except FloatingPointError as error:
        raise InputError(f"{source}: {error}") from error
    return _checkpoint(source, checkpoint_directory(source), model.template, model)


def load_served(source: str, loading: Loading, backends: Sequence[str]) -> Checkpoint:
    """Return a checkpoint whose rewards servers compute; `Checkpoint.connect` proves them.

    Only input format, tokenizer and probes are read, no weights. Every checkpoint has a client of its own: a reward is
    never asked of servers that were proven for another one.

    Args:
        source: The checkpoint that the servers serve.
        loading: Its compat and lengths.
        backends: Addresses as `AsyncRewardModelClient` takes them: `vllm=HOST:PORT,HOST:PORT`.

    Raises:
        InputError: There is no usable checkpoint at that place, or an address is unusable.
    """
    directory = BUNDLED.get(source) or local_directory(source, ["*.json"])
    template = Template.load(directory, loading.compat).with_lengths(loading.max_length, loading.max_response_length)
    limits = Limits(timeout=SERVERS_SECONDS, deadline=SERVERS_SECONDS)
    servers = AsyncRewardModelClient(directory, server_address=addresses(backends), limits=limits)
    return _checkpoint(source, directory, template, servers=servers)


def addresses(backends: Sequence[str]) -> list[str]:
    """Return one address for each server; `vllm=a,b` names the engine of both."""
    found = []
    for backend in backends:
        kind = "auto"
        for word in backend.split(","):
            before, equals, after = word.strip().partition("=")
            kind, address = (before, after) if equals else (kind, before)
            found.append(f"{kind}={address}")
    return found


def _checkpoint(
    source: str,
    directory: Path,
    template: Template,
    model: RewardModel | None = None,
    servers: AsyncRewardModelClient | None = None,
) -> Checkpoint:
    vocab_size = max(template.tokenizer.get_vocab().values()) + 1 if model is None else model.model.config.vocab_size
    probes = read_checkpoint_file(directory).get("probes", [])
    from polar.model.weights import weights_hash

    weights = None if model is None else weights_hash(directory)  # a gateway reads none; the probes tell enough
    facts = [weights, asdict(template.settings), probes, template.tokenizer.to_str()]
    identity = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    return Checkpoint(source, template, vocab_size, read_calibration(directory), probes, identity, model, servers)
