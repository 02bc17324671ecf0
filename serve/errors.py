"""Errors as OpenAI's clients expect them: `{"error": {message, type, param, code}}`."""

from typing import Any

from starlette.responses import JSONResponse

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable",
}


class ApiError(Exception):
    """An answer that is an error. The message names what is wrong and what would do."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers

    def body(self) -> dict[str, Any]:
        return {
            "error": {
                "message": str(self),
                "type": TYPES.get(self.status, "invalid_request_error"),
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, headers=self.headers)


def not_ready(reason: str) -> ApiError:
    return ApiError(503, reason, code="model_not_ready", headers={"Retry-After": "2"})


def overloaded(reason: str) -> ApiError:
    return ApiError(
        429,
        f"{reason}; try again in a second",
        code="rate_limit_exceeded",
        headers={"Retry-After": "1"},
    )
