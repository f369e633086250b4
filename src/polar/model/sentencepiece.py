"""Fast tokenizers from sentencepiece BPE models, without sentencepiece or protobuf at run time.

A `tokenizer.model` is one protobuf message. The field numbers below are those of `sentencepiece_model.proto` in
google/sentencepiece; absent fields have that file's defaults. sentencepiece merges the pair whose joined piece has the
highest score, so a BPE model with one merge for every split of every piece, best score first, gives the same ids.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE

from polar.core.errors import InputError

SPACE = "▁"
"""Stands for a space inside pieces (U+2581)."""

NORMAL, UNKNOWN, USER_DEFINED, UNUSED = 1, 2, 4, 5
"""Piece types that matter here; control (3) and byte (6) pieces only occupy their ids."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One entry of the vocabulary; its id is its position."""

    text: str
    score: float
    type: int


@dataclass(frozen=True, slots=True)
class SentencePieceModel:
    """The parts of a `tokenizer.model` that decide the ids of a text."""

    pieces: list[Piece]
    byte_fallback: bool
    """Characters without a piece become their UTF-8 bytes."""
    add_dummy_prefix: bool
    """A space is put before every text."""


def read_model(path: Path) -> SentencePieceModel:
    """Read a sentencepiece model.

    Raises:
        InputError: the file is missing or damaged, or it is no BPE model with identity normalisation.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: not readable ({error.strerror}); expected a sentencepiece model") from error
    try:
        pieces, trainer, normalizer = _parse_model(data)
    except (ValueError, IndexError, TypeError, AttributeError, struct.error) as error:
        raise InputError(f"{path}: damaged, or not a sentencepiece model ({error}); download it again") from error
    types = [piece.type for piece in pieces]
    for fits, expected in (
        (trainer.get(3, 1) == 2, "a BPE model (trainer_spec.model_type 2)"),
        (not trainer.get(24, 0), "treat_whitespace_as_suffix off"),
        (not normalizer.get(2), "identity normalisation (no precompiled_charsmap)"),
        (not normalizer.get(4, 1), "remove_extra_whitespaces off"),
        (normalizer.get(5, 1), "escape_whitespaces on"),
        (types.count(UNKNOWN) == 1 and UNUSED not in types, "one unknown piece and no unused ones"),
    ):
        if not fits:
            raise InputError(f"{path}: expected {expected}, as in the InternLM2 tokenizer; cannot convert this one")
    return SentencePieceModel(pieces, bool(trainer.get(35, 0)), bool(normalizer.get(3, 1)))


def build_tokenizer(model: SentencePieceModel, config: Mapping[str, Any], where: str = "tokenizer") -> Tokenizer:
    """The fast tokenizer of a sentencepiece model and its `tokenizer_config.json`.

    Tokens of `added_tokens_decoder` take over the slots of their ids. Texts are encoded as by sentencepiece with two
    exceptions: the old name of such a slot is ordinary text, and no dummy prefix precedes a user-defined piece.

    Args:
        model: vocabulary and normalisation.
        config: content of `tokenizer_config.json`; read are `added_tokens_decoder`, `add_bos_token` (on when absent,
            as in the InternLM2 tokenizer), `bos_token`, the other named tokens and `additional_special_tokens`.
        where: what error messages call the place, for instance the directory.

    Raises:
        InputError: the configuration does not fit the vocabulary.
    """
    added = _added_tokens(config, where)
    names = {index: piece.text for index, piece in enumerate(model.pieces)}
    names |= {index: token.content for index, token in added.items()}
    vocabulary = {name: index for index, name in names.items()}
    if len(vocabulary) != len(names):
        twice = next(name for index, name in names.items() if vocabulary[name] != index)
        raise InputError(f"{where}: token {twice!r} has two ids; expected distinct tokens in added_tokens_decoder")
    special = [token for token in added.values() if token.special]
    for name in named_tokens(config):
        if name not in vocabulary:
            raise InputError(f"{where}: tokenizer_config.json names {name!r}, which is not in the vocabulary")
        if name not in {token.content for token in special}:
            special.append(AddedToken(name, normalized=False, special=True))

    kept = {index: piece for index, piece in enumerate(model.pieces) if index not in added}
    unknown = next(names[index] for index, piece in enumerate(model.pieces) if piece.type == UNKNOWN)
    tokenizer = Tokenizer(
        BPE(vocabulary, _merges(kept), unk_token=unknown, fuse_unk=True, byte_fallback=model.byte_fallback)
    )
    prefix = [normalizers.Prepend(SPACE)] if model.add_dummy_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if model.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    user_defined = [piece.text for piece in kept.values() if piece.type == USER_DEFINED]
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in user_defined])
    tokenizer.add_tokens([token for token in added.values() if not token.special])
    tokenizer.add_special_tokens(special)
    if config.get("add_eos_token", False):
        raise InputError(f"{where}: add_eos_token is on, but a reward is read at the score token, which must be last")
    if config.get("add_bos_token", True):
        bos = token_content(config.get("bos_token"))
        if bos is None:
            raise InputError(f"{where}: tokenizer_config.json has add_bos_token, but no bos_token")
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, vocabulary[bos])]
        )
    return tokenizer


def named_tokens(config: Mapping[str, Any]) -> list[str]:
    """The tokens that a `tokenizer_config.json` names by a role, without repetition."""
    roles = [config.get(f"{role}_token") for role in ("unk", "bos", "eos", "pad")]
    contents = [token_content(token) for token in (*roles, *(config.get("additional_special_tokens") or []))]
    return list(dict.fromkeys(content for content in contents if content is not None))


def token_content(token: str | Mapping[str, Any] | None) -> str | None:
    """The text of a token that is stored as a string or as an object with "content"."""
    return token.get("content") if isinstance(token, Mapping) else token


def _added_tokens(config: Mapping[str, Any], where: str) -> dict[int, AddedToken]:
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    try:
        return {
            int(index): AddedToken(token["content"], **{flag: token[flag] for flag in flags})
            for index, token in (config.get("added_tokens_decoder") or {}).items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{where}: added_tokens_decoder of tokenizer_config.json is malformed ({error!r}); "
            f"expected ids with content, {', '.join(flags)}"
        ) from error


def _merges(pieces: Mapping[int, Piece]) -> list[tuple[str, str]]:
    """Every split of every normal piece into two normal pieces, in the order in which sentencepiece would merge."""
    ids = {piece.text: index for index, piece in pieces.items() if piece.type == NORMAL}
    merges: list[tuple[str, str]] = []
    for text in sorted(ids, key=lambda text: -pieces[ids[text]].score):
        splits = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        splits = [split for split in splits if split[0] in ids and split[1] in ids]
        merges += sorted(splits, key=lambda split: (ids[split[0]], ids[split[1]]))
    return merges


def _parse_model(data: bytes) -> tuple[list[Piece], dict[int, Any], dict[int, Any]]:
    """The pieces, and trainer_spec and normalizer_spec by field number."""
    pieces: list[Piece] = []
    specs: dict[int, dict[int, Any]] = {2: {}, 3: {}}
    for number, value in _fields(data):
        if number == 1:
            piece = dict(_fields(value))
            (score,) = struct.unpack("<f", piece.get(2, bytes(4)))
            pieces.append(Piece(piece.get(1, b"").decode(), score, piece.get(3, NORMAL)))
        elif number in specs:
            specs[number] |= dict(_fields(value))
    return pieces, specs[2], specs[3]


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Field numbers and raw values of one protobuf message: int for varints, bytes for everything else."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        match key & 7:
            case 0:
                value, position = _varint(data, position)
                yield key >> 3, value
                continue
            case 1:
                size = 8
            case 2:
                size, position = _varint(data, position)
            case 5:
                size = 4
            case wire_type:
                raise ValueError(f"wire type {wire_type} at byte {position}")
        end = position + size
        if end > len(data):
            raise ValueError(f"field {key >> 3} ends after the data")
        yield key >> 3, data[position:end]
        position = end


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, position
