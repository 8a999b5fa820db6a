"""Models on the hub: found by name, fetched without anything that could run, and put there."""

from __future__ import annotations

import re
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from re2tal.runs.folder import CONFIG_NAME, MODEL_NAME
from re2tal.runs.model_folder import FILES

NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
"""OWNER/NAME"""


def find_model(name: Path | str, *, revision: str | None = None) -> Path:
    """The folder of a model: a local one as it is given, or one of the hub, OWNER/NAME, in the hub's cache.

    A name whose first part is a folder here is a local path, so a misspelt run folder is never looked for on the hub.
    Only the four files of a model are fetched. ValueError where the hub has no such model, or cannot be reached.
    """
    path, text = Path(name), Path(name).as_posix()
    # A name that looks like a path here is never asked of the hub.
    if path.exists() or not NAME.fullmatch(text) or path.parent.exists():
        return path
    try:
        # Only the four files, none of which can hold code.
        folder = Path(huggingface_hub.snapshot_download(text, revision=revision, allow_patterns=list(FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        kind = "is not on the hub, or is private" if isinstance(error, RepositoryNotFoundError) else "cannot be fetched"
        raise ValueError(
            f"{text} is no folder here, and {kind}: {_first_line(error)}; check the name, or give a model folder"
        ) from None
    for needed in (CONFIG_NAME, MODEL_NAME):
        if not (folder / needed).is_file():
            raise ValueError(f"{text} on the hub has no {needed}, so it is no model of re2tal; give another one")
    return folder


def push_folder(
    folder: Path, name: str, *, private: bool | None, token: str | None, revision: str | None, message: str
) -> str:
    """Put the files of a model folder on the hub as OWNER/NAME, which is made if need be; the address of the commit."""
    api = huggingface_hub.HfApi(token=token)
    try:
        made = api.create_repo(name, private=private, exist_ok=True).repo_id
        done = api.upload_folder(
            repo_id=made, folder_path=folder, revision=revision, commit_message=message, allow_patterns=list(FILES)
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ValueError(
            f"{name} cannot be put on the hub: {_first_line(error)}; log in with `hf auth login`, or give a token that "
            "may write"
        ) from None
    return str(done.commit_url)


def _first_line(error: Exception) -> str:
    # The hub's errors are pages of text with addresses of requests in them.
    return (str(error).strip() or type(error).__name__).splitlines()[0]
