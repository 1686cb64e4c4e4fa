"""The keys of a mergekit configuration that choose a tokenizer, and the rows of its tokens."""

from collections.abc import Mapping
from typing import Any

from ties_ray.recipe._mergekit_settings import Document, Path, Reference
from ties_ray.recipe.vocabulary import MOST_PADDING

Json = dict[str, Any]
ROWS_OF_TOKENS: Json = {"pad_to_multiple_of": 1}
"""The output has no rows beside those of its tokens."""
_SOURCE = "write a model, {kind: zero}, or {kind: model_token, model: PATH, token: TOKEN}"


class VocabularyKeys:
    """Reads `tokenizer_source` and `tokenizer`."""

    def __init__(self, document: Document, base: str | None) -> None:
        """base: the `base_model`, if the configuration names one."""
        self._document = document
        self._base = base

    def converted(self) -> Json | None:
        """Return the recipe's `vocabulary`, None where the configuration chooses no tokenizer; note problems."""
        document = self._document
        if document.at(("tokenizer",)) is None:
            tokens = document.at(("tokenizer_source",))
            return None if tokens is None else self._of(("tokenizer_source",), tokens)
        document.check_keys(("tokenizer",), ("source", "tokens", "pad_to_multiple_of"))
        if document.at(("tokenizer_source",)) is not None:
            document.wrong(("tokenizer_source",), "mergekit ignores it beside `tokenizer`", "remove one of them")
        asked = document.at(("tokenizer", "source"))
        vocabulary = self._of(("tokenizer", "source"), "union" if asked is None else asked)
        rows = document.at(("tokenizer", "tokens"))
        if rows and not isinstance(rows, Mapping):
            document.wrong(("tokenizer", "tokens"), "is not a mapping of tokens", "mend the YAML")
        elif rows:
            vocabulary["rows"] = {str(token): self._row(("tokenizer", "tokens", token)) for token in rows}
        multiple = document.at(("tokenizer", "pad_to_multiple_of"))
        if multiple and not (isinstance(multiple, int) and 1 <= multiple <= MOST_PADDING):
            message = f"is {multiple!r}, and no number from 1 to {MOST_PADDING:,}"
            document.wrong(("tokenizer", "pad_to_multiple_of"), message, "give such a number")
        elif multiple:
            vocabulary["pad_to_multiple_of"] = multiple
        return vocabulary

    def _of(self, path: Path, asked: Any) -> Json:
        """Return the tokens of a recipe, and the row of those that an input lacks."""
        tokens = asked if asked in ("base", "union") else Reference.of(self._document, path, asked).path
        return {"tokens": tokens, **({} if self._base else {"missing": "mean"}), **ROWS_OF_TOKENS}

    def _row(self, path: Path) -> Json:
        document = self._document
        document.check_keys(path, ("source", "force"))
        source = document.at((*path, "source"))
        everywhere = {"everywhere": True} if document.at((*path, "force")) else {}
        kind = source.get("kind") if isinstance(source, Mapping) else None
        if kind == "zero":
            document.check_keys((*path, "source"), ("kind",))
            return {"from": "zero", **everywhere}
        if kind == "model_token":
            document.check_keys((*path, "source"), ("kind", "model", "token", "token_id"))
            return {**self._model_token((*path, "source"), source), **everywhere}
        if source is None or kind is not None:
            message = "has no source" if source is None else f"{kind!r} is no kind of source"
            document.wrong(path, message, _SOURCE)
            return {"from": "zero"}
        return {"from": Reference.of(document, (*path, "source"), source).path, **everywhere}

    def _model_token(self, path: Path, source: Mapping[str, Any]) -> Json:
        rows = {key: source[key] for key in ("token", "token_id") if source.get(key) is not None}
        if len(rows) != 1 or source.get("model") is None:
            self._document.wrong(path, "needs `model`, and either `token` or `token_id`", _SOURCE)
            return {"from": "zero"}
        model = Reference.of(self._document, (*path, "model"), source["model"]).path
        key, value = next(iter(rows.items()))
        return {"from": model, "token" if key == "token" else "row": value}
