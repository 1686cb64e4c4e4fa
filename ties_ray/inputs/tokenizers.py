"""Comparison of the inputs' tokenizers, as far as it is cheap; differences become notes of the catalog."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from functools import lru_cache, partial
from typing import Any, NamedTuple

from ties_ray.errors import InputError, Problem
from ties_ray.libraries import bounded
from ties_ray.stores import Pin, Stores, scheme_of, shown

VOCABULARY = (
    "tokenizer.json", "tokenizer.model", "tekken.json", "spiece.model", "sentencepiece.bpe.model", "vocab.json",
    "vocab.txt", "merges.txt", "added_tokens.json",
)  # fmt: skip
TEMPLATES = ("chat_template.jinja", "chat_template.json")
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", *TEMPLATES)
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
MOST_BYTES = 64 * 2**20
"""The largest file that is read; a large vocabulary has 20 MB."""
MOST_TOKENS = 4_000_000
"""The most lines of a text vocabulary; each takes a hundred bytes."""
REMOTE_BYTES = 2**20
"""The largest file that is fetched for a comparison; larger files differ where their ETags do."""

Files = Mapping[str, Pin]
"""The listed files beside the weights of one input, by name."""
Fetch = Callable[[Pin], bytes]


class Tokenizer(NamedTuple):
    """The files of one input that may be a tokenizer's."""

    id: str
    """What notes call it."""
    uri: str
    files: Files


class Tokens(NamedTuple):
    """The tokens of one input."""

    ids: dict[str, int]
    added: dict[str, dict[str, Any]]
    """Entries of `added_tokens` in tokenizer.json, by token; empty ones where it is not there."""
    num_ordinary: int
    """Tokens of the model itself, which added ones follow."""


def notes(base: Tokenizer, models: Sequence[Tokenizer], stores: Stores, threads: Executor) -> list[str]:
    """Return notes on vocabularies, special tokens and chat templates that differ from the base's."""
    read_base = lru_cache(maxsize=None)(partial(_fetch, stores))
    compare = partial(_differences, base.files, read_base, fetch=partial(_fetch, stores))
    who: dict[str, list[str]] = {}
    for model, differences in zip(models, threads.map(compare, [model.files for model in models]), strict=True):
        for message in differences:
            who.setdefault(message, []).append(model.id)
    return [
        f"{'models' if len(ids) > 1 else 'model'} {', '.join(ids)}: {message}" for message, ids in sorted(who.items())
    ]


def check_common_ids(base: Tokenizer, model: Tokenizer, rows: int, stores: Stores) -> list[Problem]:
    """Return why the first `rows` embedding rows of two inputs do not line up: ids that mean different tokens."""
    fetch = partial(_fetch, stores)
    ours, theirs = _tokens(base.files, fetch), _tokens(model.files, fetch)
    if ours is None or theirs is None:
        lacking = base.uri if ours is None else model.uri
        message = "has another number of embedding rows than the base, and without a vocabulary (tokenizer.json,"
        message += f" vocab.json or vocab.txt) in {lacking} it can't be shown that the common rows mean the same tokens"
        return [Problem(model.uri, message, "add the tokenizer's files, or drop the model")]
    differ = sorted(
        number for number in ours.keys() & theirs.keys() if number < rows and ours[number] != theirs[number]
    )
    if not differ:
        return []
    first = differ[0]
    message = (
        f"has another number of embedding rows than the base, and {len(differ)} of the common ids mean other tokens"
    )
    message += f" (id {first}: {theirs[first]!r} where the base has {ours[first]!r})"
    return [Problem(model.uri, message, "`vocabulary: base` matches the rows by token; else drop the model")]


def differ(base: Tokenizer, models: Sequence[Tokenizer], stores: Stores, threads: Executor) -> bool:
    """Return whether any model has another vocabulary than the base, by tokens and ids; one without files has none."""
    fetch = partial(_fetch, stores)
    ours = _tokens(base.files, fetch)

    def differs(model: Tokenizer) -> bool:
        names = [name for name in VOCABULARY if name in model.files]
        if not names or all(name in base.files and _same(base.files[name], model.files[name]) for name in names):
            return False
        theirs = _tokens(model.files, fetch)
        return ours is None or ours != theirs

    return any(threads.map(differs, models))


def templates(inputs: Sequence[Tokenizer], stores: Stores, threads: Executor) -> list[str]:
    """Return the chat template of each input, empty where it has none. Of several named ones it is the default."""

    def template(tokenizer: Tokenizer) -> str:
        value = _settings(tokenizer.files, partial(_fetch, stores)).get("chat_template")
        if isinstance(value, list):  # older files list {name, template}
            named = {each.get("name"): each.get("template") for each in value if isinstance(each, dict)}
            value = named.get("default")
        return value.strip() if isinstance(value, str) else ""

    return list(threads.map(template, inputs))


def _differences(base: Files, read_base: Fetch, model: Files, *, fetch: Fetch) -> list[str]:
    """Return the differences between two inputs; files that a fine-tune left out are none."""
    differences = []
    for name in VOCABULARY:
        if name in base and name in model and not _same(base[name], model[name]):
            pins = base[name], model[name]
            near = all(scheme_of(pin.uri) == "local" for pin in pins)
            small = pins[0].size == pins[1].size <= (MOST_BYTES if near else REMOTE_BYTES)
            if not small or read_base(pins[0]) != fetch(pins[1]):
                differences.append(f"{name} differs from the base's")
    mine = [name for name in SETTINGS if name in model]
    if mine and not all(name in base and _same(base[name], model[name]) for name in mine):
        ours, theirs = _settings(base, read_base), _settings(model, fetch)
        if ours.get("chat_template") != theirs.get("chat_template"):
            differences.append("the chat template differs from the base's")
        tokens = [key for key in SPECIAL if ours.get(key) != theirs.get(key)]
        if tokens:
            differences.append(f"{', '.join(tokens)} differ{'' if len(tokens) > 1 else 's'} from the base's")
    return differences


def _settings(files: Files, fetch: Fetch) -> dict[str, object]:
    """Return special tokens and chat template as they take effect: a template's own file wins over the config."""
    settings: dict[str, object] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json", "chat_template.json"):
        if name in files and isinstance(value := _json(fetch(files[name])), dict):
            settings |= {key: value[key] for key in (*SPECIAL, "chat_template") if value.get(key) is not None}
    if "chat_template.jinja" in files:
        settings["chat_template"] = fetch(files["chat_template.jinja"]).decode(errors="replace")
    return {key: value.get("content") if isinstance(value, dict) else value for key, value in settings.items()}


def read(stores: Stores, tokenizer: Tokenizer) -> Tokens | None:
    """Return the tokens of an input; None where its files hold none that can be read."""
    return _read(tokenizer.files, partial(_fetch, stores))


def _read(files: Files, fetch: Fetch) -> Tokens | None:
    try:
        if "tokenizer.json" in files:
            whole = bounded.loads(fetch(files["tokenizer.json"]), bounded.DENSE)
            vocabulary = whole["model"]["vocab"]
            if isinstance(vocabulary, list):  # Unigram: [token, score], the id is the place
                vocabulary = {pair[0]: number for number, pair in enumerate(vocabulary)}
            entries = {str(token["content"]): token for token in whole.get("added_tokens") or ()}
            added = {token: entry["id"] for token, entry in entries.items()}
        else:
            vocabulary, added = _of_text_files(files, fetch)
            entries = {token: {} for token in added}
        ids = {str(token): int(number) for token, number in (*vocabulary.items(), *added.items())}
        return Tokens(ids, entries, len(vocabulary))
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError):
        return None


def _of_text_files(files: Files, fetch: Fetch) -> tuple[dict[str, int], dict[str, int]]:
    """Return (ids of ordinary tokens, ids of added ones) of a tokenizer without tokenizer.json."""
    if "vocab.json" in files:
        vocabulary = bounded.loads(fetch(files["vocab.json"]), bounded.DENSE)
    else:
        raw = fetch(files["vocab.txt"])
        if raw.count(b"\n") > MOST_TOKENS:
            raise ValueError("too many lines")
        text = raw.decode(errors="replace").replace("\r\n", "\n")
        lines = text.removesuffix("\n").split("\n")  # splitlines would split at tokens like U+2028
        vocabulary = {token: number for number, token in enumerate(lines)}
    listed = "added_tokens.json" in files
    return vocabulary, bounded.loads(fetch(files["added_tokens.json"]), bounded.DENSE) if listed else {}


def _tokens(files: Files, fetch: Fetch) -> dict[int, str] | None:
    """Return the token of every id; None where the files hold none."""
    tokens = _read(files, fetch)
    return tokens and {number: token for token, number in tokens.ids.items()}


def _same(pin: Pin, other: Pin) -> bool:
    """Return whether the pins alone show equal content; of local files only links of one file do."""
    return bool(pin.etag) and (pin.size, pin.etag) == (other.size, other.etag)


def _fetch(stores: Stores, listed: Pin) -> bytes:
    pin, data = stores.of(listed.uri).head_listed(listed, MOST_BYTES)
    if pin.size > MOST_BYTES:
        message = f"has {pin.size:,} bytes, and at most {MOST_BYTES:,} were expected"
        raise InputError(Problem(shown(pin.uri), message, "check that this is the right file"))
    return data


def _json(data: bytes) -> Any:
    try:
        return bounded.loads(data, bounded.DENSE)
    except (ValueError, RecursionError):
        return None
