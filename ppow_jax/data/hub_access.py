"""The Hugging Face hub, asked once and briefly before its libraries are: they repeat failing requests for long.

Without an answer the libraries run in their offline mode: they find what was downloaded before, or fail at once.
"""

import contextlib
import functools
import os
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator

WAIT = 2.0  # seconds for the hub's answer


@functools.cache
def failure(endpoint: str, wait: float = WAIT) -> str:
    """Reason why the hub at this address does not answer; empty if it does, with whatever status."""
    found: list[str] = []
    # looking up an address has no time limit of its own
    thread = threading.Thread(target=lambda: found.append(_ask(endpoint, wait)), daemon=True)
    thread.start()
    thread.join(wait)
    return found[0] if found else f"no answer within {wait:g} s"


def _ask(endpoint: str, wait: float) -> str:
    request = urllib.request.Request(endpoint, method="HEAD", headers={"User-Agent": "ppow_jax"})
    try:
        with urllib.request.urlopen(request, timeout=wait):
            return ""
    except urllib.error.HTTPError:
        return ""  # it answers
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return getattr(reason, "strerror", None) or str(reason) or type(reason).__name__


@contextlib.contextmanager
def offline_if_unreachable() -> Iterator[str]:
    """Sets the offline mode of the hub's libraries inside, unless the hub answers; gives the reason, or "".

    With HF_HUB_OFFLINE set, nothing is asked: they are in that mode anyway, and say so themselves.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        yield ""
        return
    endpoint = os.environ.get("HF_ENDPOINT") or constants.ENDPOINT
    reason = failure(endpoint)
    if not reason:
        yield ""
        return
    _set_offline(True)
    try:
        yield f"the hub {endpoint} cannot be reached ({reason})"
    finally:
        _set_offline(False)


def _set_offline(offline: bool) -> None:
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = offline
    if config := sys.modules.get("datasets.config"):
        config.HF_HUB_OFFLINE = offline  # type: ignore[attr-defined]
