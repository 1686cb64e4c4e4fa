"""Inputs of different vocabularies, as the recipe's `vocabulary` brings them together: the place of each row."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, NamedTuple

from ties_ray.errors import InputError, Problem, RecipeError, enumerated
from ties_ray.formats import Rules
from ties_ray.formats.adapted import DENSE
from ties_ray.formats.by_token import ByToken
from ties_ray.inputs import configs, tokenizers
from ties_ray.inputs.agreement import ReadModel
from ties_ray.inputs.expand import BASE, Entry
from ties_ray.inputs.names import model_names
from ties_ray.inputs.small_files import Taken
from ties_ray.inputs.tokenizers import MOST_TOKENS, SETTINGS, VOCABULARY, Tokenizer, Tokens
from ties_ray.libraries.ties import Tie
from ties_ray.recipe.vocabulary import TokenRow, Vocabulary
from ties_ray.safetensors import MERGEABLE
from ties_ray.stores import Pin, Stores, absolute, hub_uri
from ties_ray.tensors import Parameter, Rows, Run, Source, TensorRef

Json = dict[str, Any]
Place = tuple[str, int]
"""(id of an input, row of its embedding)."""
UNUSED = "rows of tokens that the output lacks"
SAVE = "write it with AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
_NAMES = re.compile(
    r"(?:.*\.)?(?:embed_tokens|embed_in|embed_out|wte|lm_head|word_embeddings|tok_embeddings|token_embedding"
    r"|embeddings?|shared|emb|head|output|decoder)\.(?:weight|bias)|(?:.*\.)?predictions\.bias"
)
"""Names of embeddings and of output heads."""


class Aligned(NamedTuple):
    """The inputs with their rows in the order of the output's tokens."""

    base: dict[str, Parameter]
    inputs: dict[str, ReadModel]
    problems: list[tuple[str, Problem]]
    """(id of an input, problem)."""
    owner: str = BASE
    """The id of the input whose tokenizer the output has."""
    num_rows: int = 0
    """Zero where a problem left the question open."""
    added: tuple[Json, ...] = ()
    """Tokens that the tokenizer gets, as the `added_tokens` of a tokenizer.json."""
    notes: tuple[str, ...] = ()


class _Input(NamedTuple):
    """What one input brings."""

    read: ReadModel
    tokens: Tokens
    num_rows: int

    def row(self, token: str) -> int | None:
        """Return the row of a token; None where the input has no such token, or no row for it."""
        row = self.tokens.ids.get(token, self.num_rows)
        return row if row < self.num_rows else None


def by_token(base: Mapping[str, Parameter], config: bytes, tied: Sequence[Tie]) -> tuple[str, ...]:
    """Return the parameters of a base that have a row for each token, and the names that it ties to them.

    Raises `RecipeError` where no parameter has the name and the rows of an embedding.
    """
    rows = configs.rows(config)
    names = [
        name
        for name, parameter in base.items()
        if parameter.dtype in MERGEABLE
        and _NAMES.fullmatch(name)
        and parameter.shape
        and rows in (None, parameter.shape[0])
    ]
    if not names:
        message = "no parameter of the base has the name of an embedding, and as many rows as its config says"
        raise RecipeError(Problem("vocabulary", message, "leave it out, where all vocabularies agree"))
    return (*names, *(tie.alias for tie in tied if tie.kept in names and tie.alias not in base))


def align(
    asked: Vocabulary,
    base: dict[str, Parameter],
    inputs: dict[str, ReadModel],
    entries: Sequence[Entry],
    files: Mapping[str, Tokenizer],
    rules: Rules,
    stores: Stores,
    threads: Executor,
) -> Aligned:
    """Return the base's parameters and all inputs with the output's rows.

    inputs: those without problems. files: the tokenizers' files by id. Raises `RecipeError` for what the recipe asks
    and the inputs do not have.
    """
    names = [name for name in rules.by_token if name in base]
    if excluded := [name for name in names if rules.excludes(name)]:
        message = f"leaves out {enumerated(excluded)}, and `vocabulary` puts their rows in order"
        raise RecipeError(Problem("exclude", message, "leave out either the patterns that match them, or `vocabulary`"))
    sharing = {id_: read for id_, read in inputs.items() if any(name in read.contents.sources for name in names)}
    problems = [(id_, problem) for id_, read in sharing.items() for problem in _problems(read, names)]
    wrong = {id_ for id_, _ in problems}
    sound = {id_: read for id_, read in sharing.items() if id_ not in wrong}
    tokens_of = dict(
        zip(sound, threads.map(partial(tokenizers.read, stores), map(files.__getitem__, sound)), strict=True)
    )
    brought: dict[str, _Input] = {}
    for id_, read in sound.items():
        num_rows = read.contents.sources[names[0]].tensors[0].shape[0]
        tokens = tokens_of[id_]
        same_as_base = tokens is None and not any(name in files[id_].files for name in VOCABULARY) and BASE in brought
        if same_as_base and brought[BASE].num_rows == num_rows:
            tokens = brought[BASE].tokens
        if tokens is None:
            message = "has no tokenizer.json, vocab.json or vocab.txt that tells the token of each row"
            problems.append((id_, Problem(read.entry.uri, message, f"add tokenizer.json: {SAVE}")))
        else:
            brought[id_] = _Input(read, tokens, num_rows)
    if BASE not in brought:
        return Aligned(base, inputs, problems)
    return _Alignment(asked, names, entries, brought).aligned(base, inputs, problems)


def _problems(read: ReadModel, names: Sequence[str]) -> Iterator[Problem]:
    """Yield why the rows of an input can't be matched by token."""
    sources = {name: read.contents.sources[name] for name in names if name in read.contents.sources}
    changed = [name for name, source in sources.items() if source.encoding != "dense" or DENSE in dict(source.numbers)]
    if changed or not read.format.whole:
        message = f"changes {enumerated(changed or list(sources))}, whose rows `vocabulary` matches by token"
        yield Problem(read.entry.uri, message, "merge it into its model first (merge_and_unload), and give that model")
        return
    if missing := [name for name in names if name not in sources]:
        message = f"lacks {enumerated(missing)}, and has {enumerated(list(sources))}"
        yield Problem(read.entry.uri, message, "drop the model: its rows can't be matched by token")
        return
    if parts := [name for name, source in sources.items() if len(source.tensors) > 1]:
        yield Problem(read.entry.uri, f"stores {enumerated(parts)} in several tensors", "save each in one")
    rows = {name: source.tensors[0].shape[0] for name, source in sources.items()}
    if len(set(rows.values())) > 1:
        message = f"has {' and '.join(f'{count} rows of {name}' for name, count in rows.items())}"
        yield Problem(read.entry.uri, message, "drop the model: its embedding and its head differ in their tokens")


class _Alignment:
    """Finds the place of each row of each input."""

    def __init__(
        self, asked: Vocabulary, names: Sequence[str], entries: Sequence[Entry], inputs: Mapping[str, _Input]
    ) -> None:
        self._asked = asked
        self._names = names
        self._entries = entries
        self._inputs = inputs
        self._models = [id_ for id_ in inputs if id_ != BASE]
        self.owner = BASE if asked.tokens == "union" else self._id(asked.tokens, "vocabulary.tokens")
        self.without_row: list[str] = []
        """Tokens that no input has a row for."""
        self._defaults: dict[str, tuple[Place, ...]] = {}

    def aligned(
        self, base: dict[str, Parameter], inputs: dict[str, ReadModel], problems: list[tuple[str, Problem]]
    ) -> Aligned:
        """Return all inputs, those that have the rows of tokens with their places."""
        shapes = {name: (self.num_rows, *base[name].shape[1:]) for name in self._names}
        base = {**base, **{name: base[name]._replace(shape=shape) for name, shape in shapes.items()}}
        inputs = {**inputs, **{id_: self._with_rows(id_) for id_ in self._inputs}}
        return Aligned(base, inputs, problems, self.owner, self.num_rows, self.added, tuple(self._notes()))

    # -- the output's tokens

    @cached_property
    def added(self) -> tuple[Json, ...]:
        """The tokens that the owner's tokenizer lacks, with the ids that a loader gives them.

        Ordinary tokens of models come first, then their added ones, model by model in the order of their ids.
        """
        own = self._inputs[self.owner].tokens
        flags = {token: entry for each in self._inputs.values() for token, entry in each.tokens.added.items()}
        united = [
            token
            for each in self._inputs.values()
            for token in sorted(each.tokens.ids, key=each.tokens.ids.__getitem__)
            if self._asked.tokens == "union" and each.row(token) is not None
        ]
        united.sort(key=flags.__contains__)
        tokens = [token for token in dict.fromkeys((*united, *self._asked.rows)) if token not in own.ids]
        first = max([own.num_ordinary, *(own.ids[token] + 1 for token in own.added)])
        if tokens and max(own.ids.values(), default=-1) >= first:
            message = f"the ids of its {len(own.ids):,} tokens have gaps, so that added tokens would share an id"
            remedy = "write `vocabulary: {tokens: base}` without further tokens, or name a model as `tokens`"
            raise RecipeError(Problem(self._inputs[self.owner].read.entry.uri, message, remedy))
        return tuple(_entry(first + number, token, flags.get(token, {})) for number, token in enumerate(tokens))

    @cached_property
    def _tokens(self) -> dict[int, str]:
        """The output's tokens by row."""
        own = {row: token for token, row in self._inputs[self.owner].tokens.ids.items()}
        return own | {entry["id"]: entry["content"] for entry in self.added}

    @cached_property
    def num_rows(self) -> int:
        """The number of rows of the output."""
        needed, multiple = max(self._tokens) + 1, self._asked.pad_to_multiple_of
        if not 0 <= min(self._tokens) <= needed <= MOST_TOKENS:
            message = f"its tokenizer has ids up to {needed - 1:,}, and at most {MOST_TOKENS:,} rows are made"
            raise RecipeError(Problem(self._inputs[self.owner].read.entry.uri, message, "name another model"))
        if multiple:
            return -(-needed // multiple) * multiple
        return max(needed, self._inputs[self.owner].num_rows)

    @cached_property
    def _filler(self) -> str:
        """The token whose row fills up the others: the last ordinary one, which is rare where ranks order tokens."""
        own = self._inputs[self.owner].tokens
        rows = {row: token for token, row in own.ids.items() if token not in own.added}
        return rows[max(rows)] if rows else self._tokens[max(self._tokens)]

    # -- the places of rows

    def _with_rows(self, id_: str) -> ReadModel:
        own = self._inputs[id_]
        runs = list(_runs(self._places(id_)))
        if runs == [(self.num_rows, ((id_, 0),))] and own.num_rows == self.num_rows:
            return own.read
        users = list(dict.fromkeys([id_, *(user for _, places in runs for user, _ in places)]))
        index = {user: number for number, user in enumerate(users)}
        rows = Rows(tuple(Run(count, tuple((index[user], row) for user, row in places)) for count, places in runs))
        contents = own.read.contents
        objects, sources = list(contents.objects), dict(contents.sources)
        for name in self._names:
            refs = [contents.sources[name].tensors[0], *(self._ref(user, name, objects) for user in users[1:])]
            sources[name] = Source(tuple(refs), rows=rows)
        used = {row + at for count, places in runs for user, row in places if user == id_ for at in range(count)}
        idle = own.num_rows - len(used)
        stored = {contents.sources[name].tensors[0] for name in self._names}  # two names may mean one tensor
        widths = [math.prod(ref.shape[1:]) for ref in stored]
        account = contents.account
        if idle:
            account = account.set_aside(UNUSED, len(widths), idle * sum(widths))
        contents = replace(contents, objects=tuple(objects), sources=sources, account=account)
        return ReadModel(own.read.entry, ByToken(), contents)

    def _places(self, id_: str) -> Iterator[tuple[Place, ...]]:
        """Yield the place of each row of an input."""
        own = self._inputs[id_]
        named = set(own.tokens.ids.values())
        for row in range(self.num_rows):
            token = self._tokens.get(row)
            if token is None and row < self._inputs[self.owner].num_rows:
                nameless = row < own.num_rows and row not in named
                yield ((id_ if nameless else self.owner, row),)
                continue
            token = self._filler if token is None else token
            place, asked = own.row(token), self._asked.rows.get(token)
            if place is None or (asked and asked.everywhere):
                yield self._default(token)
            else:
                yield ((id_, place),)

    def _default(self, token: str) -> tuple[Place, ...]:
        """Return the places of the rows whose mean a token takes in an input that lacks it."""
        if token not in self._defaults:
            asked = self._asked.rows.get(token)
            places = self._as_asked(token, asked) if asked else self._usual(token)
            if not places and not asked:
                self.without_row.append(token)
            self._defaults[token] = places
        return self._defaults[token]

    def _usual(self, token: str) -> tuple[Place, ...]:
        of_base = self._inputs[BASE].row(token)
        base = () if of_base is None else ((BASE, of_base),)
        models = tuple((id_, row) for id_ in self._models if (row := self._inputs[id_].row(token)) is not None)
        if self._asked.missing == "mean":
            return models or base
        return base or (models if self._asked.missing == "base" else ())

    def _as_asked(self, token: str, asked: TokenRow) -> tuple[Place, ...]:
        if asked.from_ == "zero":
            return ()
        place = f"vocabulary.rows.{token}"
        id_ = self._id(asked.from_, place)
        own = self._inputs[id_]
        row = asked.row if asked.row is not None else own.row(asked.token or token)
        if row is None:
            message = f"{own.read.entry.uri} has no row for {asked.token or token!r}"
        elif row >= own.num_rows:
            message = f"{own.read.entry.uri} has {own.num_rows:,} rows, and row {row:,} is asked for"
        else:
            return ((id_, row),)
        raise RecipeError(Problem(place, message, "name another model, token or row"))

    def _id(self, asked: str, place: str) -> str:
        """Return the id of the input that the recipe names by id or path."""
        for entry in self._entries:
            paths = {absolute(entry.uri).rstrip("/"), hub_uri(entry.uri)}
            if (
                asked == entry.id or paths & {absolute(asked).rstrip("/"), hub_uri(asked)}
            ) and entry.id in self._inputs:
                return entry.id
        message = f"{asked!r} is neither the id nor the path of an input that has rows of tokens"
        raise RecipeError(Problem(place, message, "write `base`, or a model's id, position or path"))

    def _ref(self, user: str, name: str, objects: list[Pin]) -> TensorRef:
        """Return where another input stores a parameter, among objects, to which its file is added."""
        contents = self._inputs[user].read.contents
        ref = contents.sources[name].tensors[0]
        pin = contents.objects[ref.object]
        if pin not in objects:
            objects.append(pin)
        return ref._replace(object=objects.index(pin))

    def _notes(self) -> Iterator[str]:
        """Yield what becomes of the vocabularies."""
        owner = self._inputs[self.owner].read.entry.uri
        more = f", and {len(self.added):,} more" if self.added else ""
        own_tokens = len(self._tokens) - len(self.added)
        yield f"vocabulary: {self.num_rows:,} rows, for the {own_tokens:,} tokens of {owner}{more}"
        tokens = set(self._tokens.values())
        names = model_names([self._inputs[id_].read.entry for id_ in self._models])
        for id_, own in self._inputs.items():
            lacking = sum(own.row(token) is None for token in tokens)
            unused = sum(row < own.num_rows and token not in tokens for token, row in own.tokens.ids.items())
            if lacking or unused:
                whose = "the base" if id_ == BASE else f"model {names[id_]}"
                yield f"vocabulary: {whose} lacks {lacking:,} of these tokens, and {unused:,} of its own are left aside"
        if self.without_row:
            yield f"vocabulary: zeros, since no input has a row for {enumerated(sorted(self.without_row))}"
        if ordinary := sum(not entry["special"] for entry in self.added):
            yield f"vocabulary: {ordinary:,} added tokens are matched in a text before the tokenizer's own rules"


def _runs(places: Iterator[tuple[Place, ...]]) -> Iterator[tuple[int, tuple[Place, ...]]]:
    """Yield (number of rows, places of the first) of rows that follow each other in all of their places."""
    first: tuple[Place, ...] = ()
    count = 0
    for each in places:
        if count and each == tuple((user, row + count) for user, row in first):
            count += 1
            continue
        if count:
            yield count, first
        first, count = each, 1
    if count:
        yield count, first


def _entry(row: int, token: str, entry: Mapping[str, Any]) -> Json:
    """Return a token as tokenizer.json lists added ones; entry: what the tokenizer that has it says of it."""
    flags = {key: bool(entry.get(key, False)) for key in ("single_word", "lstrip", "rstrip")}
    special = bool(entry.get("special", False))
    return {
        "id": row,
        "content": token,
        **flags,
        "normalized": bool(entry.get("normalized", not special)),
        "special": special,
    }


def with_tokenizer(
    aligned: Aligned, carried: Taken, of_owner: Taken, config: Mapping[str, Any], owner_config: Mapping[str, Any]
) -> Taken:
    """Return the output's small files: the owner's tokenizer, and the config with the number of rows.

    carried: the files of the input that gives all but the tokenizer, with its config. Raises `InputError` where the
    tokenizer can't take tokens up.
    """
    own = {file.name: file for file in of_owner.files if _is_tokenizers(file.name)}
    files = {file.name: file for file in carried.files if not _is_tokenizers(file.name)} | own
    notes = list(carried.notes)
    changes = {configs.CONFIG: _in_config(aligned.num_rows, config, owner_config)}
    if aligned.added:
        if "tokenizer.json" not in own:
            message = f"has no tokenizer.json, which could take up {len(aligned.added):,} tokens"
            raise InputError(Problem(aligned.inputs[aligned.owner].entry.uri, message, f"add it: {SAVE}"))
        stale = [name for name in files if name in VOCABULARY and name != "tokenizer.json"]
        files = {name: file for name, file in files.items() if name not in stale}
        notes += [f"left out, since they lack the added tokens: {', '.join(stale)}"] if stale else []
        changes["tokenizer.json"] = {"added_tokens": list(aligned.added)}
        decoder = {str(entry["id"]): {key: entry[key] for key in entry if key != "id"} for entry in aligned.added}
        changes["tokenizer_config.json"] = {"added_tokens_decoder": decoder}
    changed = (replace(file, amended=changes.get(name, {})) for name, file in sorted(files.items()))
    return Taken(tuple(changed), tuple(notes))


def _is_tokenizers(name: str) -> bool:
    return name in (*VOCABULARY, *SETTINGS)


def _in_config(num_rows: int, config: Mapping[str, Any], owner_config: Mapping[str, Any]) -> Json:
    """Return what changes in config.json: the number of rows, and the special tokens of the tokenizer's owner."""
    size = {"vocab_size": num_rows}
    text = config.get("text_config")
    parts: Json = {"text_config": size} if isinstance(text, dict) and "vocab_size" in text else {}
    whole = size if "vocab_size" in config or not parts else {}
    special = {key for key in config if key.endswith(("_token_id", "_token_ids"))}
    return {**whole, **parts, **{key: owner_config[key] for key in sorted(special & owner_config.keys())}}
