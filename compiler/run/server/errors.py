"""Errors in the form of OpenAI's API."""

from __future__ import annotations

from typing import Any

from moec.compiler.common.errors import MoecError, UsageError


class ApiError(Exception):
    """An error response.

    Args:
        status: The HTTP status.
        message: What is wrong, and what to do.
        param: The field of the request that is wrong, if any.
        code: Identifier of the error for programs.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def to_api_error(error: Exception) -> ApiError:
    """The error response for an exception."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, MoecError):
        text = f"{error.message}; {error.hint}" if error.hint else error.message
        return ApiError(400 if isinstance(error, UsageError) else 500, text)
    return ApiError(500, f"internal: {type(error).__name__}", code="internal_error")
