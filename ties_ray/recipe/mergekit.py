"""A mergekit configuration as a recipe: the same merge, or every reason why there is none.

The keys are those of mergekit 0.1.5, and one that it ignores is refused. The output's folder is still missing, since
mergekit takes it from the command line.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from ties_ray import plugins
from ties_ray.libraries.chat_templates import TEMPLATES
from ties_ray.outputs.checkpoint import AUTO
from ties_ray.recipe._mergekit_methods import METHODS, REFUSED, Asked, Source, Spec
from ties_ray.recipe._mergekit_settings import Block, Document, Path, Reference, Settings
from ties_ray.recipe._mergekit_vocabulary import VocabularyKeys

Json = dict[str, Any]
TOP = (
    "merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source",
    "tokenizer", "chat_template",
)  # fmt: skip
DTYPES = ("bfloat16", "float16", "float32", "float64")
_IGNORED = "mergekit ignores this key here"
_BELOW = (_IGNORED, "put it below `parameters`")
_UPWARDS = (_IGNORED, "move it to the `parameters` of the whole merge")
_MODULES = ("ties_ray merges the parts of a model alike", "leave `modules` out, and list the models under `models`")
_BASE = ("ties_ray has one base for all layers", "put base_model at the top level")
_DECLARES = re.compile(r"^[\"']?merge_method[\"']?\s*:", re.MULTILINE)


class Stack(NamedTuple):
    """The layers of the models."""

    num_layers: int | None = None
    """None where it is not known."""
    name: str = "layers"
    """Module that holds them."""
    before: tuple[str, ...] = ("*embed*",)
    """Patterns of the parameters before the first layer."""


class Conversion(NamedTuple):
    """A recipe, but for the output's folder."""

    recipe: Json
    notes: tuple[str, ...]
    """What is different from mergekit, for the reader."""
    vocabulary: Json | None = None
    """What the configuration asks of the recipe's `vocabulary`."""
    compared: tuple[str, ...] = ()
    """Models that need it if their vocabularies differ, the base first. It stands in the recipe where none is here."""


def is_mergekit(text: str) -> bool:
    """Return whether a recipe's text is a configuration of mergekit: its key `merge_method` is in no recipe."""
    return bool(_DECLARES.search(text))


def base_of(text: str, source: str) -> str | None:
    """Return the path of the base, or of the first model, where the layers can be counted; None without any."""
    document = Document(text, source)
    candidates = [
        document.at(("base_model",)),
        document.at(("models", 0, "model")) if document.at(("models",)) else None,
    ]
    if document.at(("slices",)):
        candidates.append(document.at(("slices", 0, "sources", 0, "model")))
    references = [Reference.of(document, (), value) for value in candidates if value is not None]
    return references[0].path if references and not document.problems else None


UNKNOWN = Stack()


def convert(text: str, source: str, stack: Stack = UNKNOWN) -> Conversion:
    """Return the recipe of a configuration. Raises `RecipeError` with every problem, its file and its line."""
    return _Converter(Document(text, source), stack).converted()


class _Converter:
    """Reads a configuration top down."""

    def __init__(self, document: Document, stack: Stack) -> None:
        self._document = document
        self._stack = stack
        self._notes: list[str] = []

    def converted(self) -> Conversion:
        """Return the recipe; raise `RecipeError` with all problems."""
        document = self._document
        document.check_keys((), TOP, {"modules": _MODULES})
        spec = self._spec()
        blocks, rows = self._blocks()
        if spec is not None:
            self._check_parameters(spec, blocks, rows)
        document.raise_problems()
        assert spec is not None
        base, sources = self._sources(blocks, rows)
        document.raise_problems()
        self._count(spec, base, sources)
        document.raise_problems()
        asked = Asked(
            Settings(document, blocks, self._stack.name, self._stack.before), document, base, sources, self._notes
        )
        made = spec.convert(asked)
        output = self._output()
        vocabulary = VocabularyKeys(document, base).converted()
        document.raise_problems()
        recipe: Json = {"base": made.base, "models": made.models, "method": made.method, "output": output}
        others = (made.base, *(str(source.entry["path"]) for source in sources))
        if vocabulary and (document.at(("tokenizer",)) or vocabulary["tokens"] not in ("base", "union")):
            recipe["vocabulary"], others = vocabulary, ()
        return Conversion(recipe, tuple(self._notes), vocabulary, tuple(dict.fromkeys(others if vocabulary else ())))

    def _spec(self) -> Spec | None:
        name = self._document.at(("merge_method",))
        if name in REFUSED:
            self._document.wrong(("merge_method",), *REFUSED[name])
        elif name not in METHODS:
            message = plugins.unknown(str(name), sorted(METHODS), "method")
            self._document.wrong(("merge_method",), message, "choose one of them")
        return METHODS.get(str(name))

    def _blocks(self) -> tuple[list[Block], list[list[Path]]]:
        """Return the blocks of layers, and the places of the models in each."""
        document = self._document
        keys = [key for key in ("models", "slices") if document.at((key,))]
        if len(keys) != 1 and document.at(("modules",)) is None:
            document.wrong((), "needs either `models` or `slices`", "list the models to merge under `models`")
        if len(keys) != 1:
            return [], []
        if keys == ["models"]:
            return [Block((), 0, None)], [self._entries(("models",), ("model", "parameters"))]
        blocks, rows = [], []
        for number in range(len(self._listed(("slices",)))):
            path: Path = ("slices", number)
            document.check_keys(path, ("sources", "parameters"), {"base_model": _BASE})
            places = self._entries((*path, "sources"), ("model", "layer_range", "parameters"))
            start, stop = self._range(path, places)
            blocks.append(Block(path, start, stop))
            rows.append(places)
        self._check_stack(blocks)
        return blocks, rows

    def _listed(self, path: Path) -> Sequence[Any]:
        value = self._document.at(path)
        if isinstance(value, list) and value:
            return value
        self._document.wrong(path, "is not a list with something in it", "mend the YAML")
        return []

    def _entries(self, path: Path, allowed: Sequence[str]) -> list[Path]:
        """Return the places of a list of models."""
        below = dict.fromkeys(("weight", "density", "gamma", "epsilon", "t", "value"), _BELOW)
        places = [(*path, number) for number in range(len(self._listed(path)))]
        for place in places:
            self._document.check_keys(place, allowed, below)
            if self._document.at((*place, "model")) is None:
                self._document.wrong(place, "names no model", "write `model: PATH`")
        return places

    def _range(self, path: Path, places: Sequence[Path]) -> tuple[int, int]:
        """Return the layers of a slice, which are the same in all of its models."""
        ranges = []
        for place in places:
            layers = self._document.at((*place, "layer_range"))
            if not (isinstance(layers, list) and len(layers) == 2 and all(isinstance(each, int) for each in layers)):
                self._document.wrong(place, "has no layer_range of two numbers", "write `layer_range: [0, 32]`")
            else:
                ranges.append(tuple(layers))
        if any(each != ranges[0] for each in ranges):
            message = "takes different layers of its models, which stacks layers; ties_ray merges models of one shape"
            self._document.wrong(path, message, "give all sources the same layer_range")
        start, stop = ranges[0] if ranges else (0, 1)
        return start, stop

    def _check_stack(self, blocks: Sequence[Block]) -> None:
        """Note slices that leave out, repeat or move layers."""
        end = 0
        for block in blocks:
            if block.start != end or block.stop is None or block.stop <= block.start:
                message = f"begins at layer {block.start}, where layer {end} is due: this stacks layers"
                self._document.wrong(block.path, message, "let slices follow one another, or stack them with mergekit")
            end = block.stop or 0
        layers = self._stack.num_layers
        if layers is None:
            self._notes.append(f"the slices end at layer {end}; nobody checked that the models have as many layers")
        elif layers != end:
            message = f"ends at layer {end}, and the base has {layers} layers"
            self._document.wrong(
                blocks[-1].path, message, f"let the slices end at {layers}, or cut layers with mergekit"
            )

    def _sources(
        self, blocks: Sequence[Block], rows: Sequence[Sequence[Path]]
    ) -> tuple[str | None, tuple[Source, ...]]:
        """Return the base, and the models with their places in each block, which must be the same models."""
        document = self._document
        named = document.at(("base_model",))
        base = None if named is None else Reference.of(document, ("base_model",), named)
        if base and base.adapter:
            document.wrong(
                ("base_model",), "has an adapter, and a base has none here", "merge the adapter into it first"
            )
        by_model: dict[Reference, list[Path]] = {}
        for places in rows:
            references = [Reference.of(document, place, document.at((*place, "model"))) for place in places]
            for reference, place in zip(references, places, strict=True):
                by_model.setdefault(reference, []).append(place)
        for reference, positions in by_model.items():
            if len(positions) != len(blocks):
                message = f"{reference.path} does not stand in every slice just once"
                document.wrong(positions[0], message, "list the same models in every slice")
        path = base.path if base else None
        home = path or next(iter(by_model)).path
        sources = (_source(reference, home, tuple(positions)) for reference, positions in by_model.items())
        return path, tuple(source._replace(is_base=source.is_base and path is not None) for source in sources)

    def _check_parameters(self, spec: Spec, blocks: Sequence[Block], rows: Sequence[Sequence[Path]]) -> None:
        """Note parameters that mergekit would ignore where they stand."""
        everywhere = (*spec.shared, *spec.of_models)
        for scope in dict.fromkeys(((), *(block.path for block in blocks))):
            self._document.check_keys((*scope, "parameters"), everywhere)
        upwards = dict.fromkeys(spec.shared, _UPWARDS)
        for place in (place for places in rows for place in places):
            self._document.check_keys((*place, "parameters"), spec.of_models, upwards)

    def _count(self, spec: Spec, base: str | None, sources: Sequence[Source]) -> None:
        document, name = self._document, self._document.at(("merge_method",))
        for place in (place for source in sources if source.is_base for place in source.places):
            if spec.base != "input" and document.at((*place, "parameters")):
                document.wrong((*place, "parameters"), "mergekit ignores those of the base_model", "remove them")
        if spec.base == "required" and base is None:
            document.wrong((), f"{name} needs a base_model", "add base_model")
        if spec.base == "input" and base is not None and not any(source.is_base for source in sources):
            message = f"{name} merges the base_model too, and it is not among the models"
            document.wrong(("base_model",), message, "list it under `models`, or leave base_model out")
        count = sum(1 for source in sources if spec.base == "input" or not source.is_base)
        if count < spec.least or (spec.most is not None and count > spec.most):
            number = f"{spec.least}" if spec.least == spec.most else f"{spec.least} or more"
            which = "models" if spec.base == "input" else "models beside the base_model"
            document.wrong((), f"{name} takes {number} {which}, not {count}", "list other models")

    def _output(self) -> Json:
        """Return the output but for its folder."""
        output: Json = {}
        document, dtype = self._document, self._document.at(("dtype",))
        for key in ("dtype", "out_dtype"):
            value = str(document.at((key,)) or DTYPES[0]).removeprefix("torch.")
            if value not in DTYPES:
                document.wrong((key,), f"is {value}, and ties_ray writes {', '.join(DTYPES)}", "choose one of them")
            elif document.at((key,)) is not None:
                output["dtype"] = value
        if dtype is not None:
            self._notes.append(f"dtype {dtype} is that of the output: ties_ray computes in fp32, and rounds once")
        self._chat_template(output)
        return output

    def _chat_template(self, output: Json) -> None:
        document = self._document
        template = document.at(("chat_template",))
        text = str(template).strip()
        if template is not None and text != AUTO and text not in TEMPLATES and "{" not in text:
            names = ", ".join(TEMPLATES)
            document.wrong(("chat_template",), f"{text!r} is no template", f"write auto, {names}, or Jinja")
        elif template is not None:
            output["chat_template"] = text


def _source(reference: Reference, base: str, places: tuple[Path, ...]) -> Source:
    """Return a model; an adapter of the base is a model by itself."""
    if reference.adapter is None:
        return Source({"path": reference.path}, reference.path == base, places)
    if reference.path == base:
        return Source({"path": reference.adapter}, is_base=False, places=places)
    return Source({"path": reference.path, "adapter": reference.adapter}, is_base=False, places=places)
