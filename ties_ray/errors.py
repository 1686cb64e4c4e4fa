"""The errors that a user can meet, each with its exit code of the command line.

    MergeError
    |- RecipeError        2    the recipe is wrong
    |- InputError         3    inputs or permissions are missing, incompatible, not finite, or changed meanwhile
    |- InterruptedMerge   4    failed part-way; the same command continues
    |- UnavailableError   5    cluster or storage unreachable, throttled, or held by another run
    `- Cancelled        130/143  a signal ended the run

Any other exception is a defect of ours (exit code 1).
"""

import re
from collections.abc import Iterable
from typing import ClassVar, Literal, NamedTuple

ErrorKind = Literal["recipe", "input", "interrupted", "unavailable", "cancelled", "defect"]


FRESH_THEN = "run it with --fresh then, as the output holds this merge half-done"
"""End of a remedy that changes the recipe or an input of a run that has begun: the changed run is another merge."""


class Problem(NamedTuple):
    """One thing that is wrong, in words that let the reader mend it."""

    where: str
    """The field, file, model or parameter: `models.3.weight`, `s3://m/7: layers.0.q.weight`."""
    what: str
    """The fact, and the expectation: `has 3 rows, the base has 4`."""
    remedy: str = ""
    """What the reader can do about it."""
    code: str = ""
    """A short name of the reason, by which reports group and machines search: `dora_transposed`."""

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        text = f"{text} [{self.code}]" if self.code else text
        return f"{text}; {self.remedy}" if self.remedy else text


def printable(text: str) -> str:
    """Return a text from somebody else's file with all invisible characters escaped.

    The name of a tensor may hold a terminal's colours, text that runs backwards, or half a character.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def enumerated(names: Iterable[str], most: int = 4) -> str:
    """Return the first few names, printable, and how many more there are."""
    every = [printable(name) for name in names]
    return ", ".join(every[:most]) + (f" and {len(every) - most} more" if len(every) > most else "")


def printable_lines(text: str) -> str:
    """Return a text of several lines with each line printable."""
    return text if text.isprintable() else "\n".join(map(printable, text.split("\n")))


def _safe(text: str) -> str:
    return printable_lines(shown(text))


_USER = r"[^/@\s]*@"
_PASSWORD = r"[^/@\s:]*:(?!\d+/)[^@\s]*@"
"""A user and a password. The password may hold a slash, as an AWS secret often does."""
_AZURE = r"(?:abfss?|wasbs?)://[^/@\s:]*@"
"""A container of an Azure account, which is no user."""
USER_IN_URL = re.compile(rf"[\w+.-]+://(?:{_PASSWORD}|{_USER})")
_PASSWORD_IN_URL = re.compile(rf"[\w+.-]+://{_PASSWORD}")
_SIGNED = re.compile("sig|token|credential|secret|passw|pwd|auth|sas|key", re.IGNORECASE)
_QUERY = re.compile(r"(://[^\s?'\"]++)(\?(?=[^\s'\")>/]*=)[^\s'\")>]*)?")
_IN_TEXT = re.compile(
    r"((?:x-(?:amz|goog|ms)-[\w-]*|signature|credential|authorization|token|secret|passw(?:or)?d|\bpwd|\bsig"
    r"|(?:account|access|api)[_-]?key)[\"']?\s*[=:]\s*[\"']?)(?:(?:bearer|basic)\s+)?[^\s\"'&;]+",
    re.IGNORECASE,
)
_LONGEST = 20_000
"""Characters of a message. A server may send a longer one, whose rest is left out."""


def holds_secret(url: str) -> bool:
    """Return whether a URL holds a password, or a signed query (`?sig=`, `&X-Amz-Signature=`, `#access_token=`).

    A user alone is no secret. A container of Azure looks like one.
    """
    if not re.match(r"[\w+.-]+://", url):
        return False
    fields = (part.partition("=") for part in re.split("[?&#;]", url)[1:])
    signed = any(is_field and "/" not in name and _SIGNED.search(name) for name, is_field, _ in fields)
    return signed or bool(_PASSWORD_IN_URL.match(url))


def shown(text: object) -> str:
    """Return a URI or a foreign message without secrets: no user, password or signature, and no query of a URL."""
    line = str(text)
    line = line if len(line) <= _LONGEST else line[:_LONGEST] + "..."
    line = re.sub(rf"(?<![\w+.-])(?!{_AZURE})([\w+.-]+://)(?:{_PASSWORD}|{_USER})", r"\1", line)
    line = _QUERY.sub(lambda url: f"{url[1]}?..." if url[2] else url[0], line)
    return _IN_TEXT.sub(r"\1...", line)


class MergeError(Exception):
    """A failure that a user can act on. It holds every problem, not only the first."""

    kind: ClassVar[ErrorKind] = "defect"
    exit_code: int = 1
    """Exit code of the command line."""
    retryable: ClassVar[bool] = False
    """Whether the same command may succeed later."""
    shard: int | None = None
    """The shard that failed, where it is the failure of one shard."""

    def __init__(self, problems: Problem | Iterable[Problem]) -> None:
        problems = (problems,) if isinstance(problems, Problem) else problems
        self.problems = tuple(Problem(*map(_safe, problem)) for problem in problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def __reduce__(self) -> tuple[type["MergeError"], tuple[tuple[Problem, ...]]]:
        return type(self), (self.problems,)


class RecipeError(MergeError, ValueError):
    """The recipe asks for something that does not exist or contradicts itself."""

    kind = "recipe"
    exit_code = 2


class InputError(MergeError, ValueError):
    """An input or a permission is missing, incompatible, not finite, or changed since the plan was made."""

    kind = "input"
    exit_code = 3


class InterruptedMerge(MergeError, RuntimeError):
    """The run failed part-way. Finished shards are kept, and the same command continues."""

    kind = "interrupted"
    exit_code = 4
    retryable = True


class UnavailableError(MergeError, OSError):
    """The cluster or a store can't be reached, throttles, or is held by another run."""

    kind = "unavailable"
    exit_code = 5
    retryable = True


class Cancelled(MergeError):
    """A signal ended the run; the same command continues."""

    kind = "cancelled"
    exit_code = 130
    retryable = True
