"""Fast tokenizers from sentencepiece BPE models, which the library sentencepiece reads.

It merges the pair whose joined piece has the highest score, so a BPE model with one merge for every split of every
piece, best score first, gives the same ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE

from polar.core.errors import InputError

SPACE = "▁"
"""A space inside pieces (U+2581)."""

NORMAL, UNKNOWN, USER_DEFINED, UNUSED = 1, 2, 4, 5
"""Piece types that matter here; control (3) and byte (6) pieces only occupy their ids."""


def read_model(path: Path) -> Any:
    """Return the `ModelProto` of a sentencepiece model: pieces, trainer_spec and normalizer_spec.

    Raises:
        InputError: The file is missing or damaged, it is no BPE model with identity normalisation, or the extra
            `convert` is not installed.
    """
    try:
        from google.protobuf.message import DecodeError
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise InputError(f"{path}: reading it needs {error.name}: pip install 'polar-rm[convert]'") from error
    try:
        model = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())  # type: ignore[attr-defined]
        types = [piece.type for piece in model.pieces if piece.piece is not None]  # bad UTF-8 is found when it is read
    except OSError as error:
        raise InputError(f"{path}: not readable ({error.strerror}); expected a sentencepiece model") from error
    except (DecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: damaged, or not a sentencepiece model ({error}); download it again") from error
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    for fits, expected in (
        (trainer.model_type == trainer.BPE, "a BPE model (trainer_spec.model_type 2)"),
        (not trainer.treat_whitespace_as_suffix, "treat_whitespace_as_suffix off"),
        (not normalizer.precompiled_charsmap, "identity normalisation (no precompiled_charsmap)"),
        (not normalizer.remove_extra_whitespaces, "remove_extra_whitespaces off"),
        (normalizer.escape_whitespaces, "escape_whitespaces on"),
        (types.count(UNKNOWN) == 1 and UNUSED not in types, "one unknown piece and no unused ones"),
    ):
        if not fits:
            raise InputError(f"{path}: expected {expected}, as in the InternLM2 tokenizer; cannot convert this one")
    return model


def build_tokenizer(model: Any, config: Mapping[str, Any], where: str = "tokenizer") -> Tokenizer:
    """The fast tokenizer of a sentencepiece model and its `tokenizer_config.json`.

    Tokens of `added_tokens_decoder` take over the slots of their ids. Texts are encoded as by sentencepiece with two
    exceptions: the old name of such a slot is ordinary text, and no dummy prefix precedes a user-defined piece.

    Args:
        model: From `read_model`.
        config: content of `tokenizer_config.json`; read are `added_tokens_decoder`, `add_bos_token` (on when absent,
            as in the InternLM2 tokenizer), `bos_token`, the other named tokens and `additional_special_tokens`.
        where: what error messages call the place, for instance the directory.

    Raises:
        InputError: the configuration does not fit the vocabulary.
    """
    added = _added_tokens(config, where)
    names = {index: piece.piece for index, piece in enumerate(model.pieces)}
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
        BPE(vocabulary, _merges(kept), unk_token=unknown, fuse_unk=True, byte_fallback=model.trainer_spec.byte_fallback)
    )
    prefix = [normalizers.Prepend(SPACE)] if model.normalizer_spec.add_dummy_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if model.normalizer_spec.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    user_defined = [piece.piece for piece in kept.values() if piece.type == USER_DEFINED]
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


def _merges(pieces: Mapping[int, Any]) -> list[tuple[str, str]]:
    """Every split of every normal piece into two normal pieces, in the order in which sentencepiece would merge."""
    ids = {piece.piece: index for index, piece in pieces.items() if piece.type == NORMAL}
    merges: list[tuple[str, str]] = []
    for text in sorted(ids, key=lambda text: -pieces[ids[text]].score):
        splits = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        splits = [split for split in splits if split[0] in ids and split[1] in ids]
        merges += sorted(splits, key=lambda split: (ids[split[0]], ids[split[1]]))
    return merges
