"""A Hugging Face checkpoint: `model.safetensors`, or shards under an index, with names as in its `config.json`."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ties_ray.errors import Problem, enumerated
from ties_ray.formats import Contents, Folder, Format, Question, Rules, account
from ties_ray.formats import _checkpoint_files as files_of
from ties_ray.formats._checkpoint_model import Checked, check_model, refused_dtypes
from ties_ray.formats._checkpoint_names import ModelNames, ties
from ties_ray.kernels import Encoded
from ties_ray.libraries import quantised
from ties_ray.libraries.conversions import kinds_of
from ties_ray.libraries.library import CONFIGS, library_of
from ties_ray.libraries.ties import ties_of
from ties_ray.libraries.weight_files import ADAPTER, STEMS, candidates, is_index, is_shard, is_vector, is_weights, usual
from ties_ray.safetensors import DTYPE_BITS, MERGEABLE, TensorInfo
from ties_ray.stores import last_part
from ties_ray.tensors import COPIES, Parameter, Read, Source, TensorRef, exclusion

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "config.json"
_TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


CONSOLIDATE = "save it with enable_consolidation=True (HuggingFaceStorageWriter)"
"""The remedy where parts of tensors can't be read."""


class StoredTensors(NamedTuple):
    """The tensors of a folder's model."""

    files: tuple[str, ...]
    """The weight files, to which the objects of places are indices."""
    tensors: Mapping[str, TensorRef]
    source: Callable[[tuple[TensorRef, ...]], Source | None] = Source
    """Makes the source of elements that lie end to end at places of `tensors`, or at parts of them."""
    aside: tuple[tuple[str, int], ...] = ()
    """(reason, elements) of each tensor that does not belong to the model."""


class Checkpoint(Format):
    """A model stored whole; its delta is its own value minus the base's."""

    name = "checkpoint"
    on_any_device = True

    def recognises(self, names: Sequence[str]) -> bool:
        """Return whether there are safetensors files that are not an adapter's.

        A whole model stays one beside an `adapter_config.json` that somebody left there. Masks with their vector are
        none.
        """
        if any(map(is_vector, names)):
            return False
        whole = [name for name in names if not is_shard(name)]
        stems = {candidate.stem for candidate in candidates(whole)} - {ADAPTER}
        adapter = "adapter_config.json" in names
        return f"{ADAPTER}.safetensors" not in names and bool(stems & set(STEMS) if adapter else stems)

    def wanted(self, names: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the weights and texts of the model; all weights, where an index says which are the model's."""
        models = candidates(names)
        model = usual(models)
        weights = model.files if model else ()
        if model.index if model else any(each.index for each in models):
            weights = tuple(name for name in names if is_weights(name))
        return weights, tuple(name for name in names if name in CONFIGS or is_index(name))

    def weight_files(self, folder: Folder) -> tuple[str, ...]:
        """Return the files that the index names, or the one file; none where that is unclear."""
        problems: list[Problem] = []
        names = files_of.weight_files(folder, problems, [])
        return () if problems else tuple(names)

    def questions(self, folder: Folder, base: Mapping[str, Parameter] | None, rules: Rules) -> tuple[Question, ...]:
        """Ask whether tensors that a config may tie are one value or two, and whether integers are the base's."""
        problems: list[Problem] = []
        config = files_of.json_object(folder, CONFIG, problems)
        stored = self.stored(folder, problems, []).tensors
        if problems:
            return ()
        if base is None:
            return tuple(Question(alias, kept, "model") for alias, kept in _base_ties(stored, config))
        names = ModelNames(stored, config, base)
        return (
            *(Question(alias, kept, "model") for alias, kept in names.pairs()),
            *(Question(mine, name, "base") for name, mine in names.copied(base, rules).items()),
        )

    def stored(self, folder: Folder, problems: list[Problem], notes: list[str]) -> StoredTensors:
        """Return the model's tensors; problems and notes are added to the lists."""
        files = files_of.weight_files(folder, problems, notes)
        stored = files_of.stored_tensors(folder, files, problems)
        names = files_of.bare_names(stored)
        if wrapped := [name for name, bare in names.items() if name != bare]:
            notes.append(f"names of a wrapper in training lose its words: {enumerated(wrapped)}")
        return StoredTensors(tuple(files), {names[name]: ref for name, ref in stored.items()})

    def places(self, folder: Folder) -> dict[str, tuple[str, TensorInfo]]:
        """Return the places of tensors by their names without wrappers."""
        places = super().places(folder)
        names = files_of.bare_names(places)
        return {names[name]: place for name, place in places.items()}

    def same(self, folder: Folder) -> set[tuple[str, str]]:
        """Return the pairs of names whose tensors have the same bytes, as the answers say."""
        return {(question.mine, question.other) for question, same in folder.answers.items() if same}

    def read(self, folder: Folder, base: Mapping[str, Parameter] | None, rules: Rules) -> Contents:
        """Return every tensor of the base, or one source for each merged parameter that the model stores."""
        problems: list[Problem] = []
        notes: list[str] = []
        config = files_of.json_object(folder, CONFIG, problems)
        own = self.stored(folder, problems, notes)
        stored = own.tensors
        library = library_of([last_part(pin.uri) for pin in folder.files], own.files, config)
        pins = {last_part(pin.uri): pin for pin in folder.files}
        leftovers, wrong = _quantised(stored, config, list(pins), rules)
        problems += [Problem(folder.uri, message, remedy, "quantised") for message, remedy in wrong]
        if problems:
            return Contents(problems=tuple(problems))
        same = self.same(folder)
        if base is None:
            checked = _check_base(stored, config, rules, same)
        else:
            checked = check_model(stored, config, base, rules, same)
        problems += [Problem(folder.uri, message, remedy) for message, remedy in checked.problems]
        sources = {name: own.source(refs) for name, refs in checked.tensors.items()}
        if divided := [name for name, source in sources.items() if source is None]:
            message = f"stores {enumerated(divided)} in parts that divide rows of a fused tensor"
            problems.append(Problem(folder.uri, message, CONSOLIDATE))
        if problems:
            return Contents(problems=tuple(problems))
        if leftovers:
            notes.append(f"{', '.join(leftovers)} in {CONFIG} is left over: no weight is quantised")
        return Contents(
            tuple(pins[name] for name in own.files),
            {name: source for name, source in sources.items() if source},
            notes=tuple(f"{folder.uri}: {note}" for note in (*notes, *checked.notes)),
            extra_rows=checked.extra_rows,
            untied=checked.untied,
            excluded=checked.excluded,
            library=library,
            account=account(
                sum(math.prod(ref.shape) for ref in stored.values()) + sum(elements for _, elements in own.aside),
                (*checked.fates, *own.aside),
            ),
            leftovers=leftovers,
        )

    def reads(self, source: Source, start: int, stop: int) -> tuple[Read, ...]:
        """Return the range of the elements in each tensor that has some of them; none where there are no elements."""
        reads: list[Read] = []
        first = 0
        for tensor in source.tensors:
            width = DTYPE_BITS[tensor.dtype] // 8
            low, high = max(start - first, 0), min(stop - first, math.prod(tensor.shape))
            if low < high:
                reads.append(Read(tensor.object, tensor.start + low * width, tensor.start + high * width))
            first += math.prod(tensor.shape)
        return tuple(reads)

    def encoded(self, source: Source, start: int, stop: int, buffers: Sequence["Tensor"]) -> Encoded:
        """Return the model's values as stored, without a copy where one buffer holds them and is aligned.

        The slice is shorter where the model lacks rows.
        """
        import torch  # here, so that planning does not wait for it

        dtype: torch.dtype = getattr(torch, _TORCH_NAMES[source.tensors[0].dtype])
        if not buffers:  # an empty slice, or one of rows that the model lacks
            return Encoded(torch.empty(0, dtype=dtype))
        return Encoded(viewed(buffers, source.tensors[0].dtype))


def viewed(buffers: Sequence["Tensor"], dtype: str) -> "Tensor":
    """Return bytes (1-D uint8 each, end to end) as numbers, without a copy where one buffer holds them aligned.

    What is not merged is given as integers of the same width.
    """
    import torch  # here, so that planning does not wait for it

    torch_dtype: torch.dtype = getattr(torch, _TORCH_NAMES.get(dtype, f"int{DTYPE_BITS[dtype]}"))
    buffer = buffers[0] if len(buffers) == 1 else torch.cat(list(buffers))
    if buffer.storage_offset() % torch_dtype.itemsize or buffer.data_ptr() % torch_dtype.itemsize:
        buffer = buffer.clone()
    return buffer.view(torch_dtype)


def _check_base(
    stored: Mapping[str, TensorRef], config: Mapping[str, Any], rules: Rules, same: Collection[tuple[str, str]]
) -> Checked:
    tensors: dict[str, tuple[TensorRef, ...]] = {name: (ref,) for name, ref in stored.items()}
    notes: list[str] = []
    untied: dict[str, str] = {}
    for alias, kept in _base_ties(stored, config):
        if (alias, kept) in same:
            del tensors[alias]
            notes.append(f"{alias} is tied to {kept}: merged once, not written again")
        else:
            untied[alias] = kept
            notes.append(f"{alias} differs from {kept}, to which config.json ties it: a parameter of its own")
    problems = [] if tensors else [("holds no tensors", "")]
    merged = {name: ref for name, ref in stored.items() if not _is_copied_whole(name, ref, rules)}
    problems += refused_dtypes(merged, stored)
    fates = [
        ("tied" if name not in tensors else "merged" if _is_merged(name, ref, rules) else "equal", math.prod(ref.shape))
        for name, ref in stored.items()
    ]
    return Checked(tensors, problems, notes, fates, untied=untied)


def _is_merged(name: str, ref: TensorRef, rules: Rules) -> bool:
    return ref.dtype in MERGEABLE and not rules.excludes(name)


def _is_copied_whole(name: str, ref: TensorRef, rules: Rules) -> bool:
    """Return whether a tensor of the base is copied whatever its dtype: excluded, and made of whole bytes."""
    return rules.excludes(name) and DTYPE_BITS[ref.dtype] % 8 == 0


def _quantised(
    stored: Mapping[str, TensorRef], config: Mapping[str, Any], files: Collection[str], rules: Rules
) -> tuple[tuple[str, ...], list[tuple[str, str]]]:
    """Return (keys of config.json that announce quantised weights where there are none, problems with remedies)."""
    tensors = {name: (ref.dtype, ref.shape) for name, ref in stored.items()}
    excluded = {name for name in stored if rules.excludes(name)}
    announced = quantised.announced(config, files)
    reason = f" ({announced})" if announced else ""
    wrong = [
        (
            f"{message}{reason}: {enumerated(names)}",
            quantised.REMEDY
            if is_known_method
            else f"{quantised.REMEDY}; where these are no weights, {exclusion(names, stored, COPIES)}",
        )
        for message, names, is_known_method in quantised.refusals(tensors, excluded)
    ]
    return () if quantised.packed(tensors) else quantised.keys(config), wrong


def _base_ties(stored: Mapping[str, TensorRef], config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (alias, name that is kept) of tensors that are stored twice if the config's ties hold."""
    if not ties(config):
        return []
    pairs = ties_of(stored, kinds_of(config))
    return [(tie.alias, tie.kept) for tie in pairs if stored[tie.alias].shape == stored[tie.kept].shape]
