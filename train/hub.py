"""Asking the Hugging Face Hub with patience.

Errors of the network and of a server in trouble are tried again, with pauses that double. Others are not: they end in a `HubError`, with
what the Hub said and what to do. The token is that of `HF_TOKEN` or `hf auth login`; it is never printed.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import huggingface_hub
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled, RepositoryNotFoundError, RevisionNotFoundError
from loguru import logger

AGAIN = {408, 429, 500, 502, 503, 504}  # answers after which the same question may get another one
ADVICE = {
    401: "the token is not valid, or no longer: log in with `hf auth login`, or set HF_TOKEN",
    403: "the token may not do that: check the owner in the name, and that the token has permission to write",
    409: "it was changed by somebody else at the same time: look at it, and run again",
    412: "it was changed by somebody else at the same time: look at it, and run again",
}

GO_ON = "What arrived stays there: run the same command again to go on"

Answer = TypeVar("Answer")


class HubError(ValueError):
    """The Hub did not do it: what it said, and what to do."""


@dataclass(frozen=True)
class Hub:
    """A Hub, and who we are there."""

    api: HfApi
    token: str
    user: str
    pauses_s: Sequence[float] = (1, 2, 4, 8, 16)  # between tries: one try more than pauses
    sleep: Callable[[float], None] = time.sleep

    def full_name(self, repository: str) -> str:
        """`owner/name`; a name alone is ours."""
        return repository if "/" in repository else f"{self.user}/{repository}"

    def ask(self, what: str, question: Callable[[], Answer]) -> Answer:
        """The answer, asked for again after errors that pass.

        **Arguments:**

        - `what`: the thing asked about, for messages.

        **Raises:** `HubError`; `RepositoryNotFoundError` and `RevisionNotFoundError` as they come, for those are answers.
        """
        for tried, pause in enumerate([*self.pauses_s, None], 1):
            try:
                return question()
            except (RepositoryNotFoundError, RevisionNotFoundError):
                raise
            except (HTTPError, OSError, RuntimeError, ValueError) as error:
                if pause is None or not passes(error):
                    _refuse(f"{what} at {self.api.endpoint}", error, tried)
                logger.warning(f"{what}: {said(error)}; trying again in {pause:g} s ({tried} of {len(self.pauses_s)})")
                self.sleep(pause)
        raise AssertionError("the last try answers or raises")


def open_hub(endpoint: str | None = None, **patience: Any) -> Hub:
    """The Hub, once it has said whose token we hold.

    **Arguments:**

    - `endpoint`: its address; `None` is that of `HF_ENDPOINT`, else https://huggingface.co.
    - `patience`: `pauses_s` and `sleep` of `Hub`.

    **Raises:** `HubError` without a token, with one that is refused, and where the Hub cannot be reached.
    """
    token = huggingface_hub.get_token()
    if token is None:
        raise HubError("no token of the Hub: log in with `hf auth login`, or set HF_TOKEN, to one that may write")
    api = HfApi(endpoint=endpoint, token=token, library_name="zmaj-lm")
    return Hub(api, token, Hub(api, token, "", **patience).ask("who we are", api.whoami)["name"], **patience)


def passes(error: BaseException) -> bool:
    """Whether it may be gone at the next try: the network, a server in trouble, an answer that is no JSON."""
    cause = _cause(error)
    if isinstance(cause, HfHubHTTPError):
        return cause.response.status_code in AGAIN
    return isinstance(cause, HTTPError | json.JSONDecodeError)


def said(error: BaseException) -> str:
    """What went wrong, in a line."""
    cause = _cause(error)
    words = getattr(cause, "server_message", None) or f"{cause}" or type(cause).__name__
    words = " ".join(words.split())
    return f"status {cause.response.status_code}: {words}" if isinstance(cause, HfHubHTTPError) else words


def _cause(error: BaseException) -> BaseException:
    """The library wraps what went wrong with one file in a RuntimeError."""
    return error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error


def _refuse(what: str, error: BaseException, tried: int) -> NoReturn:
    cause = _cause(error)
    status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
    if isinstance(cause, OfflineModeIsEnabled):
        words = "HF_HUB_OFFLINE is set: unset it to push, or say --dry-run"
    elif status in ADVICE:
        words = f"{ADVICE[status]} ({said(error)})"
    elif passes(error):
        words = f"{said(error)}, {tried} times. {GO_ON}"
    elif "xet" in said(error).lower():  # it has tried again itself
        words = f"{said(error)}. {GO_ON}; for a Hub without Xet storage set HF_HUB_DISABLE_XET=1"
    else:
        words = said(error)
    raise HubError(f"{what}: {words}") from error
