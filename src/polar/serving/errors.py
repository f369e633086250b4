"""Refusals and failures: one JSON shape for all of them, which clients of OpenAI, vLLM and SGLang know.

{"error": {"message": "input[3]: ...", "type": "BadRequestError", "param": "input[3]", "code": 400}}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from http import HTTPStatus

from starlette.responses import Response

from polar.core.errors import reason

TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    408: "RequestTimeoutError",
    413: "RequestTooLargeError",
    422: "UnprocessableEntityError",
    429: "RateLimitError",
    500: "InternalServerError",
    502: "BadGatewayError",
    503: "ServiceUnavailableError",
}


class RefusalError(Exception):
    """A request gets no reward.

    Args:
        status: HTTP status.
        message: One line: what, where, what was expected, what to do.
        param: The field of the request that is to blame.
        headers: Further headers of the answer.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.headers = status, " ".join(message.split()), param, headers

    def response(self) -> Response:
        """Return the answer to send."""
        kind = TYPES.get(self.status, HTTPStatus(self.status).phrase.title().replace(" ", "") + "Error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.status}
        # ASCII, since a message may quote what is not valid Unicode.
        content = json.dumps({"error": error}).encode("ascii")
        return Response(content, self.status, self.headers, media_type="application/json")


class NoRewardError(Exception):
    """One input of a valid request has no reward, because computing it failed."""

    def __init__(self, number: int, error: Exception) -> None:
        why = "it is not a finite number" if isinstance(error, FloatingPointError) else reason(error)
        super().__init__(f"no reward: {why}")
        self.number = number
        """Index of the input, counted over the whole request."""
