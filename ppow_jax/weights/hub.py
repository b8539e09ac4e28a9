"""Drafters to and from the Hugging Face hub, with every failure in one line and within seconds.

HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE are read by huggingface_hub itself, as by every program that uses it.
"""

import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ppow_jax import files
from ppow_jax.errors import UserError
from ppow_jax.flags import require
from ppow_jax.weights import summary
from ppow_jax.weights.huggingface import CONFIG, WEIGHTS, read_json

log = logging.getLogger(__name__)
WAIT = 5.0  # seconds for a first answer of the hub, before anything is sent
WANTED = ["*.json", "*.safetensors", "*.bin", "README.md", "LICENSE*"]  # files of a drafter
OURS = [CONFIG, WEIGHTS, "README.md"]
PUSH = "--push_to_hub="  # the flag that uploads, in errors


def check_name(flag: str, name: str) -> None:
    """Raises UserError, naming the flag, unless a text is OWNER/NAME as the hub has them."""
    part = r"[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9])?"
    good = re.fullmatch(f"{part}/{part}", name) is not None and "--" not in name and ".." not in name
    require(good, f"{flag}{name}: must be OWNER/NAME, of letters, digits and single - _ . between them")


def check_token(flag: str, name: str) -> str:
    """The user's token. Raises UserError if there is none, or if the hub's library is not installed."""
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(f"{flag}{name}: needs the package huggingface_hub: pip install huggingface_hub") from None
    token = huggingface_hub.get_token()
    where = "make one that may write at https://huggingface.co/settings/tokens, then HF_TOKEN=... or `hf auth login`"
    require(bool(token), f"{flag}{name}: there is no token for the hub; {where}")
    return token


def check_upload(name: str) -> None:
    """Raises UserError for what can be known before anything is sent: the name, and that there is a token."""
    check_name(PUSH, name)
    check_token(PUSH, name)


def push(directory: Path, name: str, *, private: bool = False) -> str:
    """Uploads a drafter, its config, weights and card, as one commit -> the address of the model on the hub.

    The repository is created if it does not exist. Files of it that the drafter does not have stay as they are.

    Raises:
      UserError: without a token or the right to write, for a hub that cannot be reached or refuses the files.
    """
    check_name(PUSH, name)
    token = check_token(PUSH, name)
    import huggingface_hub

    api = huggingface_hub.HfApi(token=token)
    with _one_line(f"{PUSH}{name}", api.endpoint):
        _reach(api.endpoint)
        url = api.create_repo(name, private=private, exist_ok=True)
        message = "Upload an EAGLE-3 drafter"
        api.upload_folder(repo_id=name, folder_path=directory, allow_patterns=OURS, commit_message=message)
    return str(url)


def fetch(name: str, directory: Path, revision: str | None = None) -> Path:
    """Downloads a drafter from the hub into `directory`, which appears only once it is complete and one was found.

    Raises:
      UserError: for a model that does not exist or may not be read, a hub that cannot be reached, or a model that is
        no drafter.
    """
    import huggingface_hub

    check_name("", name)
    api = huggingface_hub.HfApi()

    def download(place: Path) -> None:
        with _one_line(name, api.endpoint):
            _reach(api.endpoint)
            huggingface_hub.snapshot_download(
                name, revision=revision, local_dir=place, allow_patterns=WANTED, endpoint=api.endpoint
            )
        shutil.rmtree(place / ".cache", ignore_errors=True)
        require((place / CONFIG).is_file(), f"{name}: is no drafter: it has no {CONFIG}")
        found = summary.is_drafter(read_json(place / CONFIG))
        require(found, f"{name}: is no drafter: its {CONFIG} describes another kind of model")

    files.writable_directory(directory.parent)
    try:
        files.replace_directory(directory, download)
    finally:
        shutil.rmtree(directory.with_name(f".{directory.name}.new"), ignore_errors=True)
    return directory


def _reach(endpoint: str) -> None:
    """Asks the hub for anything, once: its library repeats failing requests for half a minute."""
    from huggingface_hub.utils import get_session

    get_session().head(endpoint, timeout=WAIT)


@contextmanager
def _one_line(what: str, endpoint: str) -> Iterator[None]:
    """Turns every error of the hub's library into a UserError that says what to do.

    Its progress bars are off: an error would end up on the line of one.
    """
    from huggingface_hub import errors
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    disable_progress_bars()
    try:
        yield
    except UserError:
        raise
    except errors.OfflineModeIsEnabled:
        raise UserError(f"{what}: HF_HUB_OFFLINE is set: the hub is not asked for anything") from None
    except errors.GatedRepoError:
        raise UserError(f"{what}: is gated: ask for access at {endpoint}, and set HF_TOKEN") from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{what}: the model has no such revision") from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"{what}: the hub has no such model, or it is private and the token may not read it") from None
    except errors.HfHubHTTPError as error:
        raise UserError(f"{what}: {_refusal(error)}") from None
    except Exception as error:  # errors of its HTTP library, of the system and of the hub share no class
        cause = error.__cause__ if type(error) is RuntimeError and error.__cause__ else error
        if isinstance(cause, errors.HfHubHTTPError):
            raise UserError(f"{what}: {_refusal(cause)}") from None
        reason = (str(cause).strip().splitlines() or [""])[0][:200]
        raise UserError(f"{what}: the hub {endpoint} does not answer ({type(cause).__name__}: {reason})") from None
    finally:
        enable_progress_bars()


def _refusal(error: Any) -> str:
    """Explains an HTTP status to the user."""
    status = getattr(error.response, "status_code", None)
    if status == 401:
        return "the hub does not know the token (401): make a new one, then HF_TOKEN=... or `hf auth login`"
    if status == 403:
        return "the token has no right to write there (403): use one that may write, and a name that is yours"
    said = (str(getattr(error, "server_message", None) or error).strip().splitlines() or [""])[0][:200]
    return f"the hub refused ({status}): {said}"
