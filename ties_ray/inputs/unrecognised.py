"""Why a folder is no model of a known format, and what the user can do about it."""

from collections.abc import Iterator, Sequence
from fnmatch import filter as matching

from ties_ray.errors import InputError, Problem, printable
from ties_ray.formats.lora import CONFIG as ADAPTER_CONFIG
from ties_ray.inputs.expand import Entry
from ties_ray.libraries.downloads import UNFINISHED
from ties_ray.libraries.library import MODEL_INDEX
from ties_ray.libraries.loaders import role
from ties_ray.libraries.weight_files import Candidate, candidates, is_weights, listed
from ties_ray.stores import Listing, Store, last_part

NAMES_SHOWN = 4
"""The most names that one message lists."""
_PICKLES = ("holds its weights as pickles, which can run code when opened", "save it as safetensors (save_pretrained)")
OTHER_FORMATS = {
    "*.gguf": ("holds GGUF files, which are made for inference", "give the original safetensors checkpoint"),
    **dict.fromkeys(("*.bin", "*.pt", "*.pth", "*.ckpt"), _PICKLES),
}
"""(problem, remedy) of a folder in another format, by a pattern of its files; the first match counts."""
TRAINING_STATES = {
    "pytorch_model_fsdp_*": (
        "holds the sharded state of a training with FSDP",
        "`accelerate merge-weights FOLDER OUTPUT` makes safetensors of it",
    ),
    "*.distcp": (
        "holds the sharded state of a distributed training, whose metadata is a pickle",
        "`accelerate merge-weights FOLDER OUTPUT` or torchtitan's convert_to_hf.py makes safetensors of it",
    ),
    "global_step*": (
        "holds the state of a training with DeepSpeed",
        "`python zero_to_fp32.py . OUTPUT --safe_serialization` in it makes safetensors of it",
    ),
}
"""(problem, remedy) of a training's state, by a pattern of its files and folders; the first match counts."""


def unrecognised(entry: Entry, listing: Listing, store: Store) -> Problem:
    """Return why a folder is no model, with the remedy."""
    names = [last_part(pin.uri) for pin in listing.files]
    folders = [last_part(uri) for uri in listing.folders if not last_part(uri).startswith(".")]
    where = f"{entry.place}: {entry.uri}"
    if MODEL_INDEX in names:
        return _pipeline(where, entry.uri, listing, store)
    other = _other_format(where, names, folders)
    if other:
        return other
    adapters = list(adapters_in(listing, store))
    if adapters and not any(map(is_weights, names)):
        shown = _first_names([last_part(uri) for uri in adapters])
        message = f"holds no adapter itself, but {len(adapters)} in its folders ({shown})"
        return Problem(where, message, f"write {adapters[0]} for one of them, or {entry.uri}/* for all", "nested")
    if names:
        return _without_weights(where, names, folders)
    if folders:
        return Problem(where, f"holds only folders ({_first_names(folders)})", "name one of them")
    if is_file(entry.uri, store):
        folder, _, name = entry.uri.rpartition("/")
        which = f": {{path: {folder or '.'}, file: {name}}}" if is_weights(name) else ""
        return Problem(where, "is a file", f"give the folder that holds it{which}")
    remedy = "check the path, and that it may be listed"
    if entry.of_glob:
        remedy += f"; an empty folder that a glob found: `not: [{last_part(entry.uri)}]`"
    return Problem(where, "there is nothing", remedy)


def no_candidate(entry: Entry, models: Sequence[Candidate]) -> Problem:
    """Return that the recipe chooses a model which the folder does not have."""
    asked = ", ".join(f"{key} {value!r}" for key, value in (("file", entry.file), ("variant", entry.variant)) if value)
    remedy = f"it has {listed(models)}" if models else "it holds no safetensors file"
    return Problem(f"{entry.place}: {entry.uri}", f"has no model, or several, of the {asked}", remedy, "candidates")


def adapters_in(listing: Listing, store: Store) -> Iterator[str]:
    """Yield the folders of a listing that hold an adapter of their own; a training's states are not listed."""
    for uri in listing.folders:
        own = not last_part(uri).startswith((".", "checkpoint-"))
        if own and any(last_part(pin.uri) == ADAPTER_CONFIG for pin in store.list(uri).files):
            yield uri


def is_file(uri: str, store: Store) -> bool:
    """Return whether a URI is a file that can be read."""
    try:
        store.head(uri, 1)
    except (FileNotFoundError, InputError):
        return False
    return True


def _other_format(where: str, names: Sequence[str], folders: Sequence[str]) -> Problem | None:
    for pattern, (message, remedy) in OTHER_FORMATS.items():
        if own := [name for name in matching(names, pattern) if role(name) != "training"]:
            return Problem(where, f"{message} ({_first_names(own)})", remedy)
    for pattern, (message, remedy) in TRAINING_STATES.items():
        if own := matching([*names, *folders], pattern):
            return Problem(where, f"{message} ({_first_names(own)})", remedy)
    return None


def _pipeline(where: str, uri: str, listing: Listing, store: Store) -> Problem:
    """Return that a folder is a pipeline of several models, and which of its folders are models."""
    parts = [
        last_part(folder)
        for folder in listing.folders
        if any(is_weights(last_part(pin.uri)) for pin in store.list(folder).files)
    ]
    single = candidates([last_part(pin.uri) for pin in listing.files])
    message = f"is a pipeline of diffusers; its models are {', '.join(parts) or 'not stored as safetensors'}"
    remedy = "save it as safetensors"
    if parts:
        remedy = (
            f"merge one of them, as in {uri}/{parts[0]}, for base and models, and put the output into a copy of the"
            " pipeline, in place of that folder"
        )
    if single:
        remedy += f"; or a single file beside them: {listed(single)}"
    return Problem(where, message, remedy, "pipeline")


def _without_weights(where: str, names: Sequence[str], folders: Sequence[str]) -> Problem:
    remedy = "give the folder with the model's weights"
    if folders:
        remedy += f"; it may be one of those inside ({_first_names(folders)})"
    if half := [name for name in names if name.endswith(UNFINISHED)]:
        remedy = f"complete the download: {_first_names(half)} is not finished"
    return Problem(where, f"holds no safetensors file ({_first_names(names)})", remedy)


def _first_names(names: Sequence[str]) -> str:
    return ", ".join(map(printable, names[:NAMES_SHOWN])) + ", ..." * (len(names) > NAMES_SHOWN)
