"""Signs by the clock of the service where this machine's clock differs: S3 refuses signatures of another time."""

import socket
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any

SKEWED = "RequestTimeTooSkewed"
"""The code of an answer to a signature that is too old or too new."""
_NAME, _AHEAD = "ties-ray-s3v4", "ties_ray_ahead"


class Clock:
    """How far the clock of one service is ahead of this machine's."""

    def __init__(self) -> None:
        self.ahead = 0.0
        """Seconds."""

    def follow(self, error: Exception) -> str:
        """Take the service's time from its answer; return a note that says how far this machine's clock is off.

        It is empty where the answer has no usable time.
        """
        response: Mapping[str, Any] = getattr(error, "response", {})
        sent = response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date", "")
        try:
            self.ahead = parsedate_to_datetime(sent).timestamp() - time.time()
        except (TypeError, ValueError):
            return ""
        side = "behind" if self.ahead > 0 else "ahead of"
        return f"the clock of {socket.gethostname()} is {abs(self.ahead):,.0f} s {side} the service's"

    def register(self, client: Any) -> None:
        """Let a client of botocore sign by this clock. botocore itself always signs by the machine's."""
        from botocore import auth
        from botocore.handlers import set_operation_specific_signer

        auth.AUTH_TYPE_MAPS.setdefault(_NAME, _signer(auth.S3SigV4Auth))

        def choose(signature_version: Any, **about: Any) -> Any:
            chosen = set_operation_specific_signer(**about) or signature_version
            if self.ahead and chosen == "s3v4":
                about["context"][_AHEAD] = self.ahead
                return _NAME
            return None

        client.meta.events.register_first("choose-signer.s3", choose)


def _signer(plain: type[Any]) -> type[Any]:
    """Return the signer of S3 with a time that the context of a request shifts."""

    class Shifted(plain):  # type: ignore[misc]
        def _modify_request_before_signing(self, request: Any) -> None:
            shifted = time.gmtime(time.time() + request.context[_AHEAD])
            request.context["timestamp"] = time.strftime("%Y%m%dT%H%M%SZ", shifted)
            super()._modify_request_before_signing(request)

    return Shifted
