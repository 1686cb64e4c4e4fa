"""Refuses options of stores that hold a secret."""

import re
from collections.abc import Mapping

from ties_ray.errors import USER_IN_URL

_SECRET = re.compile(
    r"secret|token|passw|passphrase|credential|signature|authorization|cookie|connection_?string"
    r"|(api|access|account|private|sas|shared)_?key|^(key|auth|sas|user|username)$"
)


def refuse_secrets(options: object) -> object:
    """Return `given`, the options of a store, unless a key or a URL in it looks like a credential: then ValueError.

    What stands in a recipe ends up in plans, logs and Ray's arguments.
    """
    if isinstance(options, Mapping):
        for key, value in options.items():
            if value is not None and not isinstance(value, bool) and _SECRET.search(str(key).lower()):
                raise ValueError(
                    f"{key!r} looks like a secret, and a recipe never holds one: credentials come from the environment,"
                    " a profile or a role"
                )
            refuse_secrets(value)
    elif isinstance(options, list | tuple):
        for value in options:
            refuse_secrets(value)
    elif isinstance(options, str) and USER_IN_URL.match(options):
        raise ValueError("a URL with a user or password in it is a secret, and a recipe never holds one")
    return options
