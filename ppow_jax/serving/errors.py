"""Errors of the endpoint, in the form of the OpenAI API."""

import math
from typing import Any

BAD_REQUEST = "invalid_request_error"


class ApiError(Exception):
    """A request that is not answered. See the OpenAI API's error object for type, param and code.

    status: of HTTP. param: the field of the body that is wrong. retry_after: seconds after which another try may
    succeed.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = BAD_REQUEST,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.type, self.param, self.code = status, message, type, param, code
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The error object."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error}

    @property
    def headers(self) -> dict[str, str]:
        """HTTP headers of the reply."""
        return {} if self.retry_after is None else {"Retry-After": str(max(1, math.ceil(self.retry_after)))}


def invalid(param: str, rule: str, code: str | None = None) -> ApiError:
    """A field of the body that breaks a rule: 400."""
    return ApiError(400, f"{param}: {rule}", param=param, code=code)


def check(condition: bool, param: str, rule: str) -> None:
    """Raises `invalid(param, rule)` unless `condition`."""
    if not condition:
        raise invalid(param, rule)


def unknown_model(name: Any, served: str) -> ApiError:
    """A model that is not served here: 404."""
    message = f"The model {name!r} does not exist; this server has {served!r}"
    return ApiError(404, message, param="model", code="model_not_found")


def busy(retry_after: float) -> ApiError:
    """The queue is full: 429."""
    message = "The server has as many requests waiting as it accepts; try again later"
    return ApiError(429, message, type="rate_limit_error", code="queue_full", retry_after=retry_after)


def closing() -> ApiError:
    """The server shuts down: 503."""
    return ApiError(503, "The server is shutting down", type="server_error", code="shutting_down", retry_after=10)


def late(seconds: float) -> ApiError:
    """The request's time is over: 504."""
    return ApiError(504, f"The request took more than {seconds:g} seconds", type="timeout", code="time_limit")


def failed(message: str) -> ApiError:
    """The server's own fault: 500."""
    return ApiError(500, message, type="server_error")
