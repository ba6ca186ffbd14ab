"""An export's folder, uploaded to a model hub."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import LocalTokenNotFoundError

from ensemblelora.errors import OutputError, UsageError

__all__ = ["check_repository", "push_export"]

_NAME = re.compile(r"[\w.\-]{1,96}/[\w.\-]{1,96}")


def check_repository(repository: str) -> None:
    """Refuse what can't be a repository's name, before anything is made.

    Raises:
        UsageError: If it is not ``ORG/NAME``.
    """
    if not _NAME.fullmatch(repository):
        raise UsageError(f"push {repository!r}: expected ORG/NAME, of letters, digits, '-', '_' and '.'")


def push_export(folder: Path, repository: str, *, is_private: bool = True) -> str:
    """Upload an export, making the repository if it isn't there.

    Args:
        folder: Of :func:`ensemblelora.exporting.export_run`.
        repository: ``ORG/NAME``. The hub's address and the token are those that huggingface_hub is set up with.
        is_private: Whether a repository that is made is seen by its owners only.

    Returns:
        Where it lies.

    Raises:
        UsageError: If the name is none, or the hub wants another token than it got, if any.
        OutputError: If the hub can't be reached or refuses; the folder stays.
    """
    check_repository(repository)
    api = HfApi()
    try:
        made = api.create_repo(repository, repo_type="model", private=is_private, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=str(folder),
            repo_type="model",
            commit_message="Adapters exported by ensemblelora",
        )
    except Exception as error:  # whatever the client's transport raises comes as it is
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, LocalTokenNotFoundError) or status in (401, 403):
            told = "the hub takes it from none but those who may write there; sign in with: hf auth login"
            raise UsageError(f"push {repository}: {told}") from error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OutputError(f"push {repository}: {reason}; try again with: hf upload {repository} {folder}") from error
    return str(made)
