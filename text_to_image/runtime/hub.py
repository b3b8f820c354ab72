"""Asks the model hub: how long it is waited for, and what its refusals mean."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any

import huggingface_hub
from huggingface_hub.errors import OfflineModeIsEnabled

from runtime.errors import UserError, WorkError, advice_for, first_line

NOTICE_AFTER, GIVE_UP_AFTER = 10.0, 60.0  # seconds without any answer
TIMEOUT_VARIABLES = ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT")  # the hub's own, in seconds
AGAIN = "run the same command again"
NOT_REACHED = f"the hub cannot be reached; {AGAIN} where there is internet"
# The class of an exception in the chain of causes, and what it means.
REFUSALS = {
    "HubSilent": f"the hub does not answer; try later, or {AGAIN} where there is internet",
    "OfflineModeIsEnabled": "it is not in the download cache, and HF_HUB_OFFLINE is set",
    "GatedRepoError": "its page on the hub asks you to accept its licence first; then `hf auth login`",
    "RepositoryNotFoundError": "the hub has no repository of this name, or it is private: see that the name is right, "
    "then `hf auth login`",
    "RevisionNotFoundError": "the hub has the repository, but not this revision",
    "HFValidationError": "a name on the hub is owner/name; a sub-folder of one is no model of its own",
    "ConnectError": NOT_REACHED,  # httpx's
    "ConnectionError": NOT_REACHED,  # requests' and Python's own
    "TimeoutException": "the hub does not answer",
}
UNREACHED = {"ConnectError", "ConnectionError", "TimeoutException"}
# By the number that the hub answers with, where the class says no more.
STATUSES = {
    401: "not without a valid token; see that the name is right, make a token on the hub's page of settings, then "
    "`hf auth login`",
    403: "access is refused; accept the licence on its page on the hub with the account of your token "
    "(`hf auth whoami`), or ask for access",
    404: "the hub has nothing of this name; see that the name is right",
    429: f"too many requests; wait some minutes and {AGAIN} (with a token, `hf auth login`, more are allowed)",
}
SERVER_FAULT = f"the hub itself has a fault; wait some minutes and {AGAIN}"


class HubSilent(OfflineModeIsEnabled):
    """The hub has answered nothing for long. The libraries go on as if offline, with what is in the download cache."""


@contextmanager
def asking_hub(asked: str) -> Iterator[None]:
    """Within it the libraries ask the hub; what they raise becomes one line: `asked`, and why the hub refused.

    UserError where the name or the token may be wrong, WorkError where only waiting helps.
    """
    with waiting_for_hub() as patience:
        try:
            yield
        except (UserError, WorkError):
            raise
        except Exception as error:  # the hub's errors have no common class (OSError, ValueError, httpx's)
            if advice_for(error):  # a full disk is not the hub's fault
                raise
            # `datasets` drops the causes of its own error.
            raise hub_error(asked, patience.silence or error) from None


def refuse_missing_path(asked: str, name: str) -> None:
    """UserError where `name`, which is not there, can only be a path: no name on the hub begins so."""
    if name.startswith(("/", ".", "~")):
        raise UserError(f"{asked}: no such folder or file")


@contextmanager
def waiting_for_hub() -> Iterator["Patience"]:
    """Within it a hub that does not answer is reported after 10 s, and given up after 60 s with HubSilent.

    A timeout of the hub's own variables, where one is set, takes the place of the 60 s.
    """
    session = huggingface_hub.get_session()
    plain = session.send
    patience = Patience(plain, give_up_after(), NOTICE_AFTER)
    session.send = patience.send
    try:
        yield patience
    finally:
        session.send = plain


def give_up_after() -> float:
    """Seconds, from the environment."""
    asked = (getattr(huggingface_hub.constants, name) for name in TIMEOUT_VARIABLES if os.environ.get(name))
    return float(max(asked, default=GIVE_UP_AFTER))


class Patience:
    """Sends requests, and measures how long none of them is answered. Downloads that go on have no limit."""

    def __init__(self, send: Callable, give_up: float, notice: float):
        self._send, self._give_up, self._notice = send, give_up, notice
        self._silent_since: float | None = None
        self._said = False
        self.silence: HubSilent | None = None  # once the hub is given up
        self._lock = threading.Lock()

    def send(self, request: Any, **options: Any) -> Any:
        """The response, as the client's own `send` returns it. Uploads are sent as they are."""
        if request.method not in ("GET", "HEAD") and not request.url.path.endswith("/repos/create"):
            return self._send(request, **options)
        notice = self._start_waiting()
        _limit_timeouts(request, self._time_left())
        try:
            response = self._send(request, **options)
        except Exception as error:
            if self._time_left() <= 0.1:
                raise self._give_hub_up() from error
            raise
        finally:
            notice.cancel()
        self._silent_since = None
        return response

    def _start_waiting(self) -> threading.Timer:
        """Raises HubSilent where the time is up already: the libraries would ask five times more."""
        with self._lock:
            self._silent_since = self._silent_since or time.monotonic()
        if self._time_left() <= 0:
            raise self._give_hub_up()
        timer = threading.Timer(self._notice, self._say)
        timer.daemon = True
        timer.start()
        return timer

    def _give_hub_up(self) -> HubSilent:
        self.silence = HubSilent(f"the hub has not answered for {self._give_up:.0f} s")
        return self.silence

    def _time_left(self) -> float:
        since = self._silent_since  # another thread may have got an answer
        return self._give_up if since is None else since + self._give_up - time.monotonic()

    def _say(self) -> None:
        if self._said:
            return
        self._said = True
        print(
            f"the model hub has not answered for {self._notice:.0f} s; it is given up after {self._give_up:.0f} s "
            "(HF_HUB_OFFLINE=1 asks it nothing)",
            file=sys.stderr,
            flush=True,
        )


def _limit_timeouts(request: Any, seconds: float) -> None:
    """No wait of this request takes longer than `seconds`; the libraries ask for shorter ones, or for none."""
    timeouts = request.extensions.get("timeout", {})
    kinds = ("connect", "read", "write", "pool")
    limited = {kind: min(seconds, timeouts.get(kind) or seconds) for kind in kinds}
    request.extensions = {**request.extensions, "timeout": limited}


def hub_error(asked: str, error: Exception) -> UserError | WorkError:
    """The error to raise: `asked`, and why the hub refused."""
    kind = WorkError if is_passing(error) else UserError
    return kind(f"{asked}: {hub_error_reason(error)}")


def hub_error_reason(error: Exception) -> str:
    """Why the hub refused, by the chain of causes: its number and what to do; else the error's own first line."""
    # First what the hub said itself: `datasets` wraps that in a ConnectionError of its own.
    causes = sorted(_causes(error), key=lambda cause: _status(cause) is None and not isinstance(cause, HubSilent))
    return next((reason for cause in causes if (reason := _explain(cause))), first_line(error))


def _causes(error: Any) -> Iterator[Any]:
    """The error, what caused it, and what was being handled when it was raised: libraries use either."""
    waiting, seen = [error], []
    while waiting:
        error = waiting.pop(0)
        if error and error not in seen:
            seen.append(error)
            yield error
            waiting += [error.__cause__, error.__context__]


def is_passing(error: Exception) -> bool:
    """Whether waiting helps: the hub is silent or cannot be reached, has a fault, or counts too many requests."""
    if status := hub_status(error):
        return status == 429 or status >= 500
    names = {kind.__name__ for cause in _causes(error) for kind in type(cause).__mro__}
    return "HubSilent" in names or bool(names & UNREACHED) and not huggingface_hub.constants.HF_HUB_OFFLINE


def hub_status(error: Exception) -> int | None:
    """The number that the hub answered with; None where it did not answer, or was not the reason."""
    return next((status for cause in _causes(error) if (status := _status(cause))), None)


def _explain(cause: Any) -> str | None:
    classes, status = [kind.__name__ for kind in type(cause).__mro__], _status(cause)
    if UNREACHED & set(classes) and huggingface_hub.constants.HF_HUB_OFFLINE:
        classes = ["OfflineModeIsEnabled"]  # `datasets` drops it
    reason = next((REFUSALS[name] for name in classes if name in REFUSALS), None)
    if status is None:
        return reason
    if "RemoteEntryNotFoundError" in classes:
        reason = f"the hub has the repository, but no {PurePosixPath(cause.response.url.path).name} in it"
    fallback = SERVER_FAULT if status >= 500 else first_line(cause)
    return f"{status}: {reason or STATUSES.get(status, fallback)}"


def _status(cause: Any) -> int | None:
    return getattr(getattr(cause, "response", None), "status_code", None)
