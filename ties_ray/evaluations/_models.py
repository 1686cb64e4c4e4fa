"""Loads models by transformers for the kinds of evaluation that need one."""

import functools
import gc
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import field_validator

from ties_ray.errors import InputError, Problem, enumerated, shown
from ties_ray.evaluations import Evaluation, Subject
from ties_ray.libraries.loaders import ADAPTER
from ties_ray.stores import absolute

if TYPE_CHECKING:
    import torch

INSTALL = "pip install 'ties-ray[evaluate]'"
CAUSAL = "AutoModelForCausalLM"
CLASSIFICATION = "AutoModelForSequenceClassification"


class LoadsModels(Evaluation):
    """An evaluation of a model that transformers loads."""

    device: str = "auto"
    """`cpu`, `cuda` or `cuda:N`. `auto`: a GPU where there is one."""
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    """Numbers in which the model computes. `auto`: those in which it is stored."""
    tokenizer: str = ""
    """Local folder of the tokenizer. Default: the model's own."""
    trust: bool = False
    """Whether code that lies in the model's folder may run."""

    @field_validator("tokenizer")
    @classmethod
    def _absolute_tokenizer(cls, value: str) -> str:
        return absolute(value) if value else ""


class Loader:
    """Loads models for one evaluation, and keeps the last one."""

    def __init__(self, settings: LoadsModels) -> None:
        self.settings = settings
        self._model: Any = None
        self._of: tuple[str, str, str] = ("", "", "")
        """The class, the kin and the id of the loaded model."""

    def model(self, subject: Subject, auto: str) -> Any:
        """Return the model of a subject in evaluation mode, by a class of transformers.

        Raises `InputError` where it can't be loaded, or lacks weights that the class needs.
        """
        key = (auto, subject.kin, subject.id)
        if self._model is not None and self._of == key:
            return self._model
        if self._model is not None and subject.kin and self._of[:2] == key[:2]:
            try:
                subject.load_into(self._model)
                self._of = key
                return self._model
            except InputError:
                pass  # its names are not those of the file: it is loaded anew
        self._model, self._of = None, ("", "", "")
        gc.collect()  # the last model's memory is needed for this one
        self._model, self._of = self._loaded(subject, auto), key
        return self._model

    def tokenizer(self, subject: Subject) -> Any:
        """Return the tokenizer of a subject. Raises `InputError` where there is none."""
        transformers = library()
        folder = self.settings.tokenizer or _folder_of_tokenizer(subject)
        try:
            return transformers.AutoTokenizer.from_pretrained(
                folder, trust_remote_code=self.settings.trust, local_files_only=True
            )
        except Exception as error:  # any library may read the files
            remedy = "name a folder that has one: `tokenizer`"
            raise InputError(Problem(subject.id, f"no tokenizer can be loaded: {brief(error)}", remedy)) from error

    def _loaded(self, subject: Subject, auto: str) -> Any:
        folder = subject.folder()
        adapter = Path(folder, ADAPTER).exists()
        model = self._opened(subject, subject.base_folder() if adapter else folder, auto)
        if adapter:
            model = _adapted(subject, model, folder)
        return model.to(device(self.settings.device)).eval()

    def _opened(self, subject: Subject, folder: str, auto: str) -> Any:
        transformers = library()
        dtype = self.settings.dtype
        try:
            model, info = getattr(transformers, auto).from_pretrained(
                folder, dtype=dtype, use_safetensors=True, local_files_only=True,
                trust_remote_code=self.settings.trust, output_loading_info=True,
            )  # fmt: skip
        except Exception as error:  # the code of any architecture may fail in its own way
            remedy = "`function` or `command` scores what transformers can't load"
            if not self.settings.trust and "trust_remote_code" in str(error):
                remedy = "write `trust: true` if that code may run here"
            message = f"{auto} can't load it: {brief(error)}"
            raise InputError(Problem(subject.id, message, remedy)) from error
        if missing := sorted(info["missing_keys"]):
            message = f"{auto} needs weights that are not there: {enumerated(missing)}"
            raise InputError(Problem(subject.id, message, "score it by an evaluation that fits the model"))
        return model


@functools.cache
def library() -> Any:
    """Return transformers, with its progress bars off. Raises `InputError` where it is not installed."""
    try:
        import transformers
    except ImportError as error:
        raise InputError(Problem("evaluate", f"needs transformers ({error})", INSTALL)) from error
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    return transformers


def device(asked: str) -> "torch.device":
    """Return the device of a name, `auto` for a GPU where there is one."""
    import torch

    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        made = torch.device(asked)
    except RuntimeError as error:
        raise InputError(Problem("device", brief(error), "write cpu, cuda, cuda:N or auto")) from error
    if made.type == "cuda" and not torch.cuda.is_available():
        raise InputError(Problem("device", f"{asked}: this process sees no GPU", "write cpu or auto"))
    return made


def _folder_of_tokenizer(subject: Subject) -> str:
    """Return the subject's folder; for an adapter without a tokenizer that of its base."""
    folder = subject.folder()
    is_adapter = Path(folder, ADAPTER).exists()
    return subject.base_folder() if is_adapter and not any(Path(folder).glob("tokenizer*")) else folder


def _adapted(subject: Subject, model: Any, folder: str) -> Any:
    """Return a model with an adapter of PEFT."""
    try:
        import peft
    except ImportError as error:
        raise InputError(Problem(subject.id, f"an adapter needs peft ({error})", "pip install peft")) from error
    if not Path(folder, "adapter_model.safetensors").exists():
        remedy = "store it as adapter_model.safetensors"
        raise InputError(Problem(subject.id, "its adapter is no safetensors file", remedy))
    try:
        return peft.PeftModel.from_pretrained(model, folder, local_files_only=True)
    except Exception as error:  # any kind of adapter may fail in its own way
        raise InputError(Problem(subject.id, f"peft can't load it: {brief(error)}")) from error


def named_base(folder: str) -> str:
    """Return the base that an adapter names in its config; empty where it names none."""
    from ties_ray.libraries import bounded

    try:
        config = bounded.loads(Path(folder, ADAPTER).read_bytes())
    except (OSError, ValueError, RecursionError):
        return ""
    base = config.get("base_model_name_or_path") if isinstance(config, Mapping) else None
    return base if isinstance(base, str) else ""


def brief(error: BaseException) -> str:
    """Return the first lines of a foreign error, without secrets."""
    text = " ".join(shown(error).split())
    return f"{type(error).__name__}: {text[:300]}"
