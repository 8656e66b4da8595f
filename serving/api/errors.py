"""Errors that a client sees.

ServingError
├── BadRequestError          400  the body is no JSON or msgpack
├── BrokenBodyError          400  the body ended before it was whole
├── BodyTooLargeError        413  more bytes than allowed
├── UnsupportedMediaError    415  neither JSON nor msgpack
├── InvalidRequestError      422  JSON of the wrong shape or type, or too many candidates
├── UnauthorizedError        401  no API key, or one that is not known
├── ForbiddenError           403  one that may not do this
├── ErasedUserError          409  the user was erased
├── SlowBodyError            408  the body did not arrive in time
├── StoreAwayError           503  the online store did not take events
├── OverloadedError          503  too many requests are under way
└── NotReadyError            503  no bundle is loaded, the store is away or empty, or the server stops

What a person at the command line can mend (feature_repo.errors.ExpectedError):
`command.PortTakenError`, `refresh.NoStateError`, `refresh.RefusedError`.
"""

from __future__ import annotations


class ServingError(Exception):
    """Base of all; `status` is the HTTP status and `kind` the machine-readable reason."""

    status = 500
    kind = "internal"


class BadRequestError(ServingError):
    """The body is no JSON."""

    status = 400
    kind = "bad_json"


class BrokenBodyError(ServingError):
    """The body ended before it was whole."""

    status = 400
    kind = "broken_body"


class BodyTooLargeError(ServingError):
    """The body has more bytes than the server reads."""

    status = 413
    kind = "body_too_large"


class UnsupportedMediaError(ServingError):
    """The body is said to be something other than JSON."""

    status = 415
    kind = "unsupported_media_type"


class InvalidRequestError(ServingError):
    """The JSON has the wrong shape, type or size."""

    status = 422
    kind = "invalid_request"


class NotReadyError(ServingError):
    """The server cannot rank: it has no bundle."""

    status = 503
    kind = "not_ready"


class UnauthorizedError(ServingError):
    """There is no API key, or one that is not known."""

    status = 401
    kind = "unauthorized"


class ForbiddenError(ServingError):
    """The caller may not do this."""

    status = 403
    kind = "forbidden"


class SlowBodyError(ServingError):
    """The body did not arrive in its time."""

    status = 408
    kind = "slow_body"


class OverloadedError(ServingError):
    """More requests are under way than are taken on."""

    status = 503
    kind = "overloaded"


class ErasedUserError(ServingError):
    """The user was erased, and nothing may be kept of them."""

    status = 409
    kind = "erased_user"


class StoreAwayError(ServingError):
    """The online store did not take events."""

    status = 503
    kind = "store_unavailable"
