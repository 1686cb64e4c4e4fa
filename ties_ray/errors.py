"""The errors a user can meet, each with the exit code of the command line.

    MergeError
    |- RecipeError        2    the recipe is wrong
    |- InputError         3    inputs or permissions are missing, incompatible, not finite, or changed meanwhile
    |- InterruptedMerge   4    failed part-way; the same command continues
    |- UnavailableError   5    cluster or storage unreachable, throttled, or held by another run
    `- Cancelled        130/143  a signal ended the run

Anything else that leaves the command line is a defect of ours (exit 1).
"""

import re
from collections.abc import Iterable
from typing import ClassVar, Literal, NamedTuple

ErrorKind = Literal["recipe", "input", "interrupted", "unavailable", "cancelled", "defect"]


FRESH_THEN = "run it with --fresh then, as the output holds this merge half-done"
"""Follows a remedy that changes a recipe or an input after the run has begun: it is another merge from then on."""


class Problem(NamedTuple):
    """One thing that is wrong, said so that its reader can mend it."""

    where: str
    """The field, file, model or parameter: `models.3.weight`, `s3://m/7: layers.0.q.weight`."""
    what: str
    """What was found, and what was expected."""
    remedy: str = ""
    """What to do about it."""
    code: str = ""
    """A short name of the reason, where a report groups or a machine looks for it: `dora_transposed`."""

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        text = f"{text} [{self.code}]" if self.code else text
        return f"{text}; {self.remedy}" if self.remedy else text


def printable(text: str) -> str:
    """Return a text from somebody else's file with all that is not plainly visible in it escaped.

    A tensor may be called anything: a terminal's colours, text that runs backwards, half a character.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def enumerated(names: Iterable[str], most: int = 4) -> str:
    """Return the first few names, printable, and how many more there are."""
    every = [printable(name) for name in names]
    return ", ".join(every[:most]) + (f" and {len(every) - most} more" if len(every) > most else "")


def printable_lines(text: str) -> str:
    """Return a text that may have several lines, each of them printable."""
    return text if text.isprintable() else "\n".join(map(printable, text.split("\n")))


def _told(text: str) -> str:
    return printable_lines(shown(text))


_USER = r"[^/@\s]*@"
_PASSWORD = r"[^/@\s:]*:(?!\d+/)[^@\s]*@"
"""An AWS secret often holds a slash, which nobody quotes."""
_AZURE = r"(?:abfss?|wasbs?)://[^/@\s:]*@"
"""A container at an account."""
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
"""Characters of a message; of a longer one, as a server may send it, the rest is left out."""


def holds_secret(url: str) -> bool:
    """Return whether a URL holds a password, or a signed query (`?sig=`, `&X-Amz-Signature=`, `#access_token=`).

    A user alone is no secret: so is a container of Azure written.
    """
    if not re.match(r"[\w+.-]+://", url):
        return False
    fields = (part.partition("=") for part in re.split("[?&#;]", url)[1:])
    signed = any(is_field and "/" not in name and _SIGNED.search(name) for name, is_field, _ in fields)
    return signed or bool(_PASSWORD_IN_URL.match(url))


def shown(text: object) -> str:
    """Return a URI or another's message fit for a log: without the query of a URL, user, password or signature."""
    given = str(text)
    given = given if len(given) <= _LONGEST else given[:_LONGEST] + "..."
    given = re.sub(rf"(?<![\w+.-])(?!{_AZURE})([\w+.-]+://)(?:{_PASSWORD}|{_USER})", r"\1", given)
    given = _QUERY.sub(lambda url: f"{url[1]}?..." if url[2] else url[0], given)
    return _IN_TEXT.sub(r"\1...", given)


class MergeError(Exception):
    """A failure that a user can act on; holds every problem found, not only the first."""

    kind: ClassVar[ErrorKind] = "defect"
    exit_code: int = 1
    retryable: ClassVar[bool] = False
    shard: int | None = None
    """The shard that could not be done, where it is one shard's failure."""

    def __init__(self, problems: Problem | Iterable[Problem]) -> None:
        given = (problems,) if isinstance(problems, Problem) else problems
        self.problems = tuple(Problem(*map(_told, problem)) for problem in given)
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
    """The run failed part-way; what is done is kept, and the same command continues."""

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
