"""Every error dsv4c raises on purpose.

    Dsv4cError                  has a `message` and a `hint`; never raised itself
    ├── InputError              the user's input is at fault; the CLI exits with 2
    │   ├── ConfigError         unknown preset, target or option value; a bad config.json
    │   ├── CheckpointError     a checkpoint tensor or file is missing, extra, misshapen or corrupt
    │   ├── ArtifactError       an artifact is corrupt, or of another version, target or model
    │   └── RequestError        one HTTP request is at fault; carries the status and the parameter
    ├── CompileError            the compiler cannot proceed; the CLI exits with 2
    │   ├── RaiseError          a module region is not what its logical op says
    │   ├── PassError           a pass broke its contract (facts, rewrites, order)
    │   └── ScheduleError       no schedule accepts an op, or one failed to build
    └── EngineError             the engine cannot serve: a fault of ours; the CLI exits with 1
        ├── LinkError           a link between router and worker is broken, or says what is not understood
        ├── RunnerBroken        the device is lost: nothing can be computed any more
        ├── TransferError       the state of a request could not be moved; its prompt is computed again instead
        │   ├── PeerGone        the other side has died, or closed
        │   ├── LeaseLost       what was exported is no longer there: expired, let go, failed or overwritten
        │   ├── TransferTimeout nothing moved for as long as the deadline
        │   └── HandleError     a handle is malformed, or made for another layout, model or prompt
        └── ContractError       a step broke what its artifact promises; found by `--debug-contracts`

Messages are lower case without a final period and put names in backticks; the hint says the way out.
"""

from __future__ import annotations


class Dsv4cError(Exception):
    """Base of all deliberate errors: one sentence, and one hint that says the way out."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


class InputError(Dsv4cError):
    """The user's input is at fault."""

    exit_code = 2


class ConfigError(InputError):
    """Unknown preset, target or option value, or a bad config.json."""


class CheckpointError(InputError):
    """A checkpoint tensor or file is missing, extra, misshapen or corrupt."""


class ArtifactError(InputError):
    """An artifact is corrupt, or made for another format version, target or model."""


class RequestError(InputError):
    """One request is at fault; the server answers with `status` and goes on serving the others.

    `status` is an HTTP status (400, 404, 413, 422, 503), `param` the offending field, `code` a stable word.
    """

    def __init__(
        self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None, hint: str = ""
    ) -> None:
        super().__init__(message, hint=hint)
        self.status = status
        self.param = param
        self.code = code


class CompileError(Dsv4cError):
    """The compiler cannot proceed."""

    exit_code = 2


class RaiseError(CompileError):
    """A module region is not what its logical op says."""


class PassError(CompileError):
    """A pass broke its contract: a false fact, a wrong rewrite count, an unsolvable order."""


class ScheduleError(CompileError):
    """No schedule accepts an op, or a schedule failed to build."""


class EngineError(Dsv4cError):
    """The engine cannot serve."""


class LinkError(EngineError):
    """A link between the router and a worker is broken or closed, or says what cannot be understood."""


class RunnerBroken(EngineError):
    """What computes the steps never will again: the engine fails every request, and takes no more."""


class TransferError(EngineError):
    """State of a request could not be moved between two engines; whoever wanted it computes the prompt itself."""


class PeerGone(TransferError):
    """The other side of a transfer has died or closed."""


class LeaseLost(TransferError):
    """What a handle stands for is no longer there: it expired, was let go, or its request failed."""


class TransferTimeout(TransferError):
    """Neither a byte nor the ledger moved for as long as the deadline."""


class HandleError(TransferError):
    """A handle is malformed, or was made for another layout, model or prompt. Nothing was moved."""


class ContractError(EngineError):
    """A step, or a kernel, broke what the artifact promises; raised where contracts are checked alone."""
