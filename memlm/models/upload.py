"""Folders that go to the Hub in one commit."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
)

from memlm.errors import UserError
from memlm.models.card import CARD_FILE, is_own_card


def push_folder(
    repo_id: str,
    write: Callable[[Path], None],
    message: str = "Upload model",
    description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Fill a new folder with `write` and upload it in one commit.

    A card that a user wrote on the Hub stays as it is.

    Args:
        repo_id: owner/name; the repository is made where there is none.
        write: is called with the folder, which is deleted in the end.
        message, description: of the commit.
        private: whether a new repository is private; None = as the owner's are by default.
        token: of a user who may write there; None = the one of `hf auth login` or HF_TOKEN.
        revision: a branch; it is made where there is none. None = main.
        create_pr: propose the commit instead of making it.

    Returns:
        The address of the commit.

    Raises:
        UserError: when there is no token, or the Hub cannot be reached or refuses.
    """
    if token is False or not (token if isinstance(token, str) else get_token()):
        raise UserError(
            f"{repo_id}: there is no token for the Hub; run `hf auth login` or set HF_TOKEN"
        )
    api = HfApi(token=token, library_name="memlm")
    with _one_line(repo_id):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        own_card = _has_own_card(api, repo_id, revision)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        # Of an upload that failed, and of a card that the Hub finds fault with.
        with _one_line(repo_id, RuntimeError, ValueError):
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=message,
                commit_description=description,
                revision=revision,
                create_pr=create_pr,
                ignore_patterns=[CARD_FILE] if own_card else None,
            )


@contextlib.contextmanager
def _one_line(repo_id: str, *further: type[Exception]) -> Iterator[None]:
    """Turn what the Hub refuses into a UserError."""
    refusals = (HTTPError, HFValidationError, LocalTokenNotFoundError, ConnectionError, *further)
    try:
        yield
    except refusals as error:
        told = error if type(error) is ValueError else error.__cause__ or error
        reason = " ".join(str(told).split()) or type(error).__name__
        raise UserError(f"{repo_id}: the Hub did not take it ({reason})") from error


def _has_own_card(api: HfApi, repo_id: str, revision: str | None) -> bool:
    """Whether the repository has a card that a user wrote."""
    try:
        path = api.hf_hub_download(repo_id, CARD_FILE, revision=revision)
    except EntryNotFoundError:
        return False
    return not is_own_card(ModelCard.load(path, ignore_metadata_errors=True).content)
