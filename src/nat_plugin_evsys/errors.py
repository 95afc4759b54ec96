"""Every exception class of this package; none is defined elsewhere.

Exception
├── EvsysError                       shown to the user as it is: what failed, what was seen, what to type
│   ├── ConfigError                  a setting is wrong or does not fit another one (also a ValueError)
│   ├── DataError                    a Datum, dataset row or demonstration is malformed (also a ValueError)
│   │   ├── ShapedDistributionError  a call was sampled from another distribution than the learner's (top_p, penalties)
│   │   └── WireError                a protobuf message is malformed or too large
│   ├── ModelError                   a base model or tokenizer cannot be loaded, or lacks what was asked of it
│   ├── PromptTooLongError           prompt + max_tokens do not fit the context window (also a ValueError)
│   ├── CheckpointError              a checkpoint is missing, torn, or belongs to another model
│   ├── NonFiniteGradientError       an optimizer step was refused; weights and moments are as they were
│   ├── OutOfMemoryError             memory ran out where the engine could not make do with less (also a MemoryError)
│   ├── RunLostError                 a run's directory was deleted or moved while it ran
│   ├── NothingTrainedError          a run ended, and nothing was trained in it
│   ├── RolloutsFailedError          a batch of rollouts of which nothing can be learned; carries the first cause
│   ├── CollapseError                a run was stopped because its policy had collapsed
│   ├── JobError                     a training job failed; carries the first cause
│   ├── EngineClosedError            an operation was sent to an engine that has been closed
│   ├── ReplicaError                 a replica on a Ray cluster failed, or died too often in one call
│   ├── StoreError                   the server's store on disk could not write or read what was asked
│   ├── RestoreError                 the server cannot rebuild a model's state after a restart
│   ├── QueueFullError               too many operations wait already; nothing was stored, try again later
│   ├── UnsupportedError             another service's call that this engine does not offer (also a NotImplementedError)
│   ├── Refusal                      an HTTP request is answered with an error status
│   └── ServiceError                 a Tinker service failed or refused an operation; in its own words
│       ├── ServiceUnavailableError  it could not be reached, or not for longer than anybody waits
│       ├── ServiceLostError         it does not know the session, the model or the request (any more)
│       ├── ServiceDataError         it refused a Datum or a loss (also a DataError)
│       ├── ServiceGradientError     it refused a step on a gradient that is not finite (also a NonFiniteGradientError)
│       └── ServiceCheckpointError   it has no such checkpoint, or cannot load or save it (also a CheckpointError)
├── ApiError                         an OpenAI client's request is answered with an error status; caught by the routes
├── ClientGone                       nobody reads the answer any more; caught by the routes
├── OperationCancelled               inside an operation that nobody waits for any more; caught by its queue
├── RenderingStopped                 inside a chat template that took too long; caught in its thread
└── OperationAbandoned               inside an operation of a server that closes; caught by whoever runs it
"""

from collections.abc import Iterator
from typing import Any

_VISIBLE = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"} | {127: "␡"}
_VISIBLE |= {code: "�" for code in range(128, 160)}


class EvsysError(Exception):
    """Base of all errors of this package; the message is meant for the user."""


class ConfigError(EvsysError, ValueError):
    """A setting is wrong, or two settings do not fit each other."""


class DataError(EvsysError, ValueError):
    """A Datum, a dataset row or a demonstration is malformed."""


class ShapedDistributionError(DataError):
    """A call was sampled from a distribution that is not the learner's: cut (top_p) or shifted (penalties)."""

    def __init__(self, call: str, settings: dict[str, Any]) -> None:
        self.settings = settings
        named = ", ".join(f"{name} {value}" for name, value in settings.items())
        super().__init__(
            f"{call} was sampled with {named}: its probabilities are not those that the learner computes, so the "
            "ratios of the loss would be wrong from the first step; leave these out of the policy and of the "
            "workflow's requests. Any temperature is fine"
        )


class WireError(DataError):
    """A protobuf message is malformed or too large; the message says where."""


class ModelError(EvsysError):
    """A base model or its tokenizer cannot be loaded, or lacks what was asked of it."""


class PromptTooLongError(EvsysError, ValueError):
    """The prompt (plus the tokens asked for) does not fit the model's context window."""

    def __init__(self, prompt_tokens: int, max_tokens: int, context_length: int) -> None:
        self.prompt_tokens = prompt_tokens
        self.max_tokens = max_tokens
        self.context_length = context_length
        super().__init__(
            f"the prompt has {prompt_tokens} tokens and {max_tokens} more were asked for, "
            f"but the model's context length is {context_length}; shorten the prompt or lower max_tokens"
        )


class CheckpointError(EvsysError):
    """A checkpoint is missing, torn, or belongs to another base model."""


class NonFiniteGradientError(EvsysError):
    """The accumulated gradient is not finite; the step was refused and nothing changed."""


class OutOfMemoryError(EvsysError, MemoryError):
    """Memory ran out; the message says which settings need less."""


class RunLostError(EvsysError):
    """A run's directory was deleted, moved or replaced while the run was writing to it."""


class NothingTrainedError(EvsysError):
    """A run ended, and nothing was trained in it: there is no adapter to serve."""


class RolloutsFailedError(EvsysError):
    """Nothing can be learned or reported from a batch of rollouts; the message has the first cause."""


class CollapseError(EvsysError):
    """A run was stopped because its policy had collapsed, as ``on_collapse: stop`` asks."""


class JobError(EvsysError):
    """A training job failed; ``__cause__`` is the first error."""


class EngineClosedError(EvsysError):
    """The engine has been closed and takes no more operations."""


class ReplicaError(EvsysError):
    """A replica on a Ray cluster failed, or died too often in one call; nothing of the operation was kept."""


class StoreError(EvsysError):
    """The server's store on disk could not write or read what was asked; nothing of that write is kept."""


class RestoreError(EvsysError):
    """The server cannot rebuild a model's state from its saved state and the operations since."""


class QueueFullError(EvsysError):
    """Too many operations wait already. The new one was not stored; sending it again later is safe."""


class UnsupportedError(EvsysError, NotImplementedError):
    """A call or option of another service's API that this engine does not offer; the message says why."""


class Refusal(EvsysError):
    """An HTTP request that is answered with an error status.

    The Tinker SDK gives up at once at 400, 401, 403, 404, 405, 410, 413, 415 and 422; 429 and 503 it tries again.

    Attributes:
        status: HTTP status.
        headers: that go with it.
    """

    def __init__(self, status: int, message: str, *, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers or {}


class ServiceError(EvsysError):
    """A Tinker service, or a vLLM server, failed or refused an operation.

    Attributes:
        category: ``user`` (what was asked is wrong), ``server`` or ``unknown``.
        request_id: the service's id of the request, for its operator; None where there is none.
    """

    def __init__(self, message: str, *, category: str = "unknown", request_id: str | None = None) -> None:
        super().__init__(message)
        self.category = category
        self.request_id = request_id


class ServiceUnavailableError(ServiceError):
    """The service cannot be reached."""


class ServiceLostError(ServiceError):
    """The service does not know what an operation was about: a session, a model, a sampler or a request."""


class ServiceDataError(ServiceError, DataError):
    """The service refused a Datum or a loss."""


class ServiceGradientError(ServiceError, NonFiniteGradientError):
    """The service refused an optimizer step: the accumulated gradient is not finite."""


class ServiceCheckpointError(ServiceError, CheckpointError):
    """The service has no such checkpoint, or cannot load or save it."""


class ApiError(Exception):
    """A request of an OpenAI client is answered with an error status.

    Attributes:
        status: HTTP status.
        type, param, code: as in OpenAI's error object.
        retry: False tells the client not to try again where its status says otherwise.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry: bool = True,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.param = param
        self.code = code
        self.retry = retry


class ClientGone(Exception):
    """The client closed the connection; there is nobody to answer."""


class OperationCancelled(Exception):
    """Raised inside a running operation whose awaiting task was cancelled."""


class RenderingStopped(Exception):
    """Raised inside the rendering of a chat template that took too long."""


class OperationAbandoned(Exception):
    """Raised inside an operation that has to stop because the server closes; it stays unfinished in the store."""


def causes(error: BaseException | None, *, implicit: bool = False) -> Iterator[BaseException]:
    """An error, what it was raised from, and so on; ``implicit``: also what was being handled when it was raised.

    Ends where the chain comes back to itself: frameworks that keep an error and raise it again make such chains.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or (error.__context__ if implicit else None)


def visible(text: str) -> str:
    """``text`` with every control character except newline and tab replaced by a visible symbol."""
    return text.translate(_VISIBLE)


def one_line(exc: BaseException) -> str:
    """The exception's type and text on one line, cut at 300 characters."""
    text = visible(" ".join(str(exc).split()))
    return f"{type(exc).__name__}: {text[:300]}" if text else type(exc).__name__
