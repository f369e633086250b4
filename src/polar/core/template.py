r"""THE input format: one place that turns texts into token ids, for training, scoring and serving alike.

The input of one candidate (paper 4.1) is::

    [bos] prompt \n reference [split] prompt \n candidate [score]

so everything before the candidate is the same for all candidates of a group. `Template.encode_group` returns that
shared prefix once and one branch per candidate. The reward is read at the last token, the score token.

Decisions, and how they differ from the original client:

- Texts are encoded as text. A user's text that spells a special token stays text; only the template places separators.
- `prompt + newline`, reference and candidate are encoded each on its own and joined as ids, so the ids of the prefix do
  not depend on the candidate, and nothing is decoded and encoded again after a cut.
- One truncation budget per group: responses are cut on the right to `max_response_length`, then the prompt is cut on
  the left until the longest candidate fits. All candidates of a group see the same prompt. What was cut is reported.
- The newline between prompt and response stays, even for an empty response (as in the original client).

`compat="seed"` reproduces the original client exactly, quirks included (`seed_text`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from secrets import token_hex
from typing import Literal

from tokenizers import Tokenizer

from polar.core.checkpoint import CHECKPOINT_FILE, read_checkpoint_file
from polar.core.errors import InputError
from polar.core.records import Comparison, Group, Text, Wrapper, text_of

Compat = Literal["seed"]


@dataclass(frozen=True, slots=True)
class TemplateSettings:
    """Input format of a checkpoint (`polar.json`, key "template")."""

    split_token_id: int
    """Separates the reference part from the candidate part (POLAR's `<|reward|>`)."""
    score_token_id: int
    """The last token; the reward is read at its position (POLAR's `[UNUSED_TOKEN_130]`)."""
    bos_token_id: int | None = None
    """First token, or None when the model was trained without one."""
    max_length: int = 16384
    """Longest input in tokens, special tokens included."""
    max_response_length: int = 4096
    """Longest reference and longest candidate in tokens."""

    def __post_init__(self) -> None:
        special = 2 + (self.bos_token_id is not None)
        if self.max_response_length < 1:
            raise InputError(f"template: max_response_length must be at least 1, found {self.max_response_length}")
        if 2 * self.max_response_length + special > self.max_length:
            raise InputError(
                f"template: max_length {self.max_length} leaves no room for two responses of "
                f"max_response_length {self.max_response_length}; use at least {2 * self.max_response_length + special}"
            )

    @property
    def num_special(self) -> int:
        """Special tokens in every input."""
        return 2 + (self.bos_token_id is not None)


@dataclass(frozen=True, slots=True)
class Truncation:
    """Tokens that were cut from each part; all zero when everything fitted."""

    prompt: int = 0
    reference: int = 0
    output: int = 0

    def __bool__(self) -> bool:
        return bool(self.prompt or self.reference or self.output)


@dataclass(frozen=True, slots=True)
class EncodedGroup:
    """Token ids of a group: a shared prefix and one branch per candidate.

    The input of candidate `i` is `prefix + branches[i]`; every branch ends with the score token.
    """

    prefix: list[int]
    branches: list[list[int]]
    truncations: list[Truncation]
    """One per candidate; prompt and reference counts are the same for the whole group."""
    reference: list[int] = field(default_factory=list)
    """The reference's tokens in the prefix (empty under compat, where there is no shared prefix)."""

    def sequences(self) -> list[list[int]]:
        """The candidates' inputs as separate sequences."""
        return [self.prefix + branch for branch in self.branches]


class Template:
    """Encodes comparisons and groups with one tokenizer and one set of `TemplateSettings`."""

    def __init__(self, tokenizer: Tokenizer, settings: TemplateSettings, compat: Compat | None = None) -> None:
        for name in ("split_token_id", "score_token_id", "bos_token_id"):
            token_id = getattr(settings, name)
            if token_id is not None and tokenizer.id_to_token(token_id) is None:
                raise InputError(
                    f"template: {name} {token_id} is not in the tokenizer ({tokenizer.get_vocab_size()} tokens)"
                )
        if compat not in (None, "seed"):
            raise InputError(f'template: compat must be "seed" or left out, found {compat!r}')
        self.tokenizer = tokenizer
        self.settings = settings
        self.compat = compat
        added = tokenizer.get_added_tokens_decoder().values()
        self.special_tokens = [token.content for token in added if token.special]
        """As they are spelt; in a text they are text."""
        self._plain = _without_special_tokens(tokenizer, {settings.split_token_id, settings.score_token_id})

    @property
    def largest_id(self) -> int:
        """The largest id that an input can have."""
        special = {*self.special_tokens}
        placed = (self.settings.bos_token_id, self.settings.split_token_id, self.settings.score_token_id)
        vocabulary = self.tokenizer.get_vocab()
        return max(number for token, number in vocabulary.items() if token not in special or number in placed)

    @classmethod
    def load(cls, directory: str | Path, compat: Compat | None = None) -> Template:
        """Read `tokenizer.json` and `polar.json` of a checkpoint directory; needs neither torch nor transformers."""
        directory = Path(directory)
        tokenizer_file = directory / "tokenizer.json"
        if not tokenizer_file.is_file():
            raise InputError(f"{directory}: no tokenizer.json; expected a checkpoint with a fast tokenizer")
        try:
            tokenizer = Tokenizer.from_file(str(tokenizer_file))
        except Exception as error:  # tokenizers raises plain Exception
            raise InputError(f"{tokenizer_file}: not a readable tokenizer ({error})") from error
        values = read_checkpoint_file(directory).get("template")
        if not isinstance(values, dict):
            raise InputError(f'{directory / CHECKPOINT_FILE}: no "template" object')
        known = {name: value for name, value in values.items() if name in TemplateSettings.__dataclass_fields__}
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise InputError(f"{directory / CHECKPOINT_FILE}: unknown template keys {unknown}; made by a newer polar?")
        bad = [name for name, value in known.items() if not isinstance(value, int | None) or isinstance(value, bool)]
        missing = [name for name in ("split_token_id", "score_token_id") if known.get(name) is None]
        if bad or missing:
            raise InputError(f"{directory / CHECKPOINT_FILE}: template needs integers for {sorted({*bad, *missing})}")
        return cls(tokenizer, TemplateSettings(**known), compat)

    def save(self, directory: str | Path, **more: object) -> None:
        """Write `tokenizer.json`, and `polar.json` with the template and `more` top-level entries."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save(str(directory / "tokenizer.json"))
        content = {"format": 1, "template": asdict(self.settings), **more}
        (directory / CHECKPOINT_FILE).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")

    def with_lengths(self, max_length: int | None = None, max_response_length: int | None = None) -> Template:
        """Return the template with another truncation budget (None keeps the present value)."""
        settings = replace(
            self.settings,
            max_length=max_length or self.settings.max_length,
            max_response_length=max_response_length or self.settings.max_response_length,
        )
        return Template(self.tokenizer, settings, self.compat)

    def encode(self, comparison: Comparison, *, one_of_many: bool = False) -> EncodedGroup:
        """Encode one comparison: a group of one candidate. See `encode_group`."""
        return self.encode_group(
            Group(
                comparison.prompt, comparison.reference, (comparison.output,), comparison.id, wrapper=comparison.wrapper
            ),
            one_of_many=one_of_many,
        )

    def encode_group(self, group: Group, *, one_of_many: bool = False) -> EncodedGroup:
        """Encode a group of candidates under one truncation budget.

        Args:
            group: Prompt, reference and candidates.
            one_of_many: The other candidates of this prompt are encoded elsewhere: leave the room of the longest
                possible one, so that all of them see the same prompt, though it may be cut more than it had to be.

        Raises:
            InputError: a text holds lone surrogates (it is not valid Unicode).
        """
        if self.compat == "seed":
            return self._encode_group_as_seed(group)
        settings = self.settings
        prompt_text = text_of(group.prompt) + ("\n" if group.wrapper == "sft" else "")
        prompt, reference, *candidates = self._encode_texts(
            [prompt_text, text_of(group.reference), *map(text_of, group.candidates)]
        )
        limit = settings.max_response_length
        kept_reference, kept_candidates = reference[:limit], [ids[:limit] for ids in candidates]
        longest = limit if one_of_many else max(map(len, kept_candidates), default=0)
        budget = (settings.max_length - settings.num_special - len(kept_reference) - longest) // 2
        # Not prompt[-budget:], which would keep everything when the budget is 0.
        kept_prompt = prompt[max(0, len(prompt) - budget) :]
        bos = [] if settings.bos_token_id is None else [settings.bos_token_id]
        return EncodedGroup(
            prefix=[*bos, *kept_prompt, *kept_reference, settings.split_token_id, *kept_prompt],
            branches=[[*ids, settings.score_token_id] for ids in kept_candidates],
            truncations=[
                Truncation(
                    prompt=len(prompt) - len(kept_prompt),
                    reference=len(reference) - len(kept_reference),
                    output=len(full) - len(kept),
                )
                for full, kept in zip(candidates, kept_candidates, strict=True)
            ],
            reference=kept_reference,
        )

    def _encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        try:
            return [encoding.ids for encoding in self._plain.encode_batch(list(texts), add_special_tokens=False)]
        except (UnicodeEncodeError, TypeError) as error:
            for text in texts:
                require_unicode(text, "template")
            raise InputError(f"template: the tokenizer refused a text ({error})") from error

    def _encode_group_as_seed(self, group: Group) -> EncodedGroup:
        settings = self.settings
        sequences, truncations = [], []
        for candidate in group.candidates:
            text, truncation = seed_text(
                self.tokenizer, settings, group.prompt, group.reference, candidate, wrapper=group.wrapper
            )
            ids = self.tokenizer.encode(text, add_special_tokens=False).ids
            bos = [] if settings.bos_token_id is None else [settings.bos_token_id]
            sequences.append(bos + ids)
            truncations.append(truncation)
        return EncodedGroup(prefix=[], branches=sequences, truncations=truncations)


def require_unicode(text: str, where: str) -> None:
    """Raise an `InputError` that names the place when `text` holds a lone surrogate (half of a UTF-16 pair)."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: lone surrogate {text[error.start]!r} at character {error.start}; "
            "expected valid Unicode text (the file was probably cut inside an emoji)"
        ) from error


def seed_text(
    tokenizer: Tokenizer,
    settings: TemplateSettings,
    prompt: Text,
    reference: Text,
    output: Text,
    *,
    wrapper: Wrapper = "sft",
    response_cut_side: Literal["right", "left"] = "right",
) -> tuple[str, Truncation]:
    """Return the text that the original POLAR client sends (InternLM/POLAR 80626f3, `RewardModelClient.encode`).

    Its quirks are kept: every part is measured with its own BOS, the prompt budget depends on this output alone, a
    budget of 0 keeps the whole prompt and a negative one drops only that many tokens from its start, parts are decoded
    and special tokens in them vanish, and an empty response keeps its newline.

    Returns:
        The text, without BOS, and what was cut.
    """
    bos = [] if settings.bos_token_id is None else [settings.bos_token_id]
    parts = [
        bos + tokenizer.encode(text_of(part), add_special_tokens=False).ids for part in (prompt, reference, output)
    ]
    full_lengths = [len(part) for part in parts]
    limit = settings.max_response_length
    for index in (1, 2):
        if len(parts[index]) > limit:
            parts[index] = parts[index][:limit] if response_cut_side == "right" else parts[index][-limit:]
    # Four: two separators, the split and the score token, by the original's count.
    budget = (settings.max_length - 4 - len(parts[1]) - len(parts[2])) // 2
    if len(parts[0]) > budget:
        parts[0] = parts[0][-budget:]
    cut = [full - len(part) for full, part in zip(full_lengths, parts, strict=True)]
    prompt_text, reference_text, output_text = (tokenizer.decode(part, skip_special_tokens=True) for part in parts)
    newline = "" if wrapper == "pretrain" else "\n"
    split, score = tokenizer.id_to_token(settings.split_token_id), tokenizer.id_to_token(settings.score_token_id)
    text = f"{prompt_text}{newline}{reference_text}{split}{prompt_text}{newline}{output_text}{score}"
    return text, Truncation(*cut)


def _without_special_tokens(tokenizer: Tokenizer, also: set[int]) -> Tokenizer:
    """Return a copy of the tokenizer in which text cannot spell special tokens or the ids in `also`.

    They keep their ids under names that no text holds. Taken out of the table, they would hand their ids to the tokens
    behind them; left in the vocabulary of the model, they could still be found there.
    """
    content = json.loads(tokenizer.to_str())
    special = {token["content"] for token in content["added_tokens"] if token["special"]}
    special |= {tokenizer.id_to_token(token_id) for token_id in also}
    secret = token_hex()  # drawn anew every time, so that nobody can write it into a text
    names = {token: f"{secret}:{number}" for number, token in enumerate(special)}
    for token in content["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = content["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(piece, piece): token_id for piece, token_id in model["vocab"].items()}
    else:  # Unigram: the id is the place
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    if "unk_token" in model:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        model["merges"] = [pair for pair in model["merges"] if special.isdisjoint((*pair, "".join(pair)))]
    content["post_processor"] = None  # it may name tokens of the old names; ids are placed by the template
    content["truncation"] = content["padding"] = None
    return Tokenizer.from_str(json.dumps(content))
