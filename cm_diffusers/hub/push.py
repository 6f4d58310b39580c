"""Students to the Hub: card and files in one commit, tried again when the connection breaks."""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from cm_diffusers.hub.card import render_card

logger = logging.getLogger(__name__)

# What belongs to a student; checkpoints, logs and bad steps stay here.
PUBLISHED = [
    "README.md", "model_index.json", "training.json", "samples.png", "scheduler/*", "unet/*", "evaluation/*.json",
    "evaluation/*.md", "evaluation/*.png", "evaluation.jsonl",
]  # fmt: skip
# What the client's HTTP library raises, whichever that is, and what the system does.
TRANSPORT_ERRORS: tuple[type[Exception], ...] = (HfHubHTTPError.__bases__[0], OSError)
T = TypeVar("T")
TRIES = 4
FIRST_PAUSE = 1.0


class PushError(OSError):
    """A student that could not be pushed. What is here, and on the Hub, is as it was."""


def push_to_hub(
    folder: str | Path, repo_id: str, *, private: bool | None = None, token: str | None = None,
    revision: str | None = None, commit_message: str = "Upload student", create_pr: bool = False,
) -> str:  # fmt: skip
    """Publish a student: make the repository if there is none, render its card, and upload both in one commit.

    A README.md in the folder that was not rendered by this function is kept.

    Args:
        folder (`str` or `Path`): of the student, as a run or `ConsistencyPipeline.save_pretrained` wrote it.
        repo_id (`str`): `name`, `user/name` or `organisation/name`.
        private (`bool`, *optional*): of a new repository; the account's default when `None`.
        token (`str`, *optional*): one that may write; by default that of `hf auth login` or `HF_TOKEN`.
        revision (`str`, *optional*): the branch to commit to, made if there is none; the default one when `None`.
        commit_message (`str`): of the commit.
        create_pr (`bool`): open a pull request instead.

    Returns:
        `str`: the address of the commit.

    Raises:
        `ValueError`: if the folder holds no student, or `repo_id` is not a name that the Hub allows.
        [`PushError`]: if the Hub refuses or cannot be reached.
    """
    folder, api = Path(folder), HfApi(token=token)
    render_card(folder, repo_id)  # before anything is made: the folder holds a student
    try:
        repo_id = _trying(lambda: api.create_repo(repo_id, private=private, exist_ok=True).repo_id)
        if revision is not None:
            _trying(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))
        with tempfile.TemporaryDirectory() as staging:
            gather(folder, Path(staging), repo_id)
            commit: CommitInfo = _trying(
                lambda: api.upload_folder(
                    repo_id=repo_id, folder_path=staging, commit_message=commit_message, revision=revision,
                    create_pr=create_pr,
                )
            )  # fmt: skip
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no name of a repository: {error}") from error
    except TRANSPORT_ERRORS as error:
        raise PushError(_explained(error, repo_id)) from error
    return str(commit.pr_url if create_pr else commit.commit_url)


def gather(folder: Path, staging: Path, repo_id: str) -> None:
    """Copy what belongs to the student, with its card."""
    for pattern in PUBLISHED:
        for file in folder.glob(pattern):
            if file.is_file():
                place = staging / file.relative_to(folder)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(file, place)
    card, own = render_card(folder, repo_id), folder / "README.md"
    if not own.exists():
        card.save(staging / "README.md")


def _trying(call: Callable[[], T]) -> T:
    """The result of `call`, tried again, after longer and longer pauses, while the connection or the Hub fails."""
    for attempt in range(TRIES):
        try:
            return call()
        except TRANSPORT_ERRORS as error:
            if (_status(error) or 500) < 500 or attempt == TRIES - 1:
                raise
            pause = FIRST_PAUSE * 2**attempt
            logger.warning("The Hub did not answer (%s); trying again in %.0f s.", error, pause)
            time.sleep(pause)
    raise AssertionError  # not reached


def _status(error: Exception) -> int | None:
    """The Hub's answer, if there was one; a missing token is as good as a refused one."""
    if isinstance(error, LocalTokenNotFoundError):
        return 401
    return int(error.response.status_code) if isinstance(error, HfHubHTTPError) else None


def _explained(error: Exception, repo_id: str) -> str:
    status, said = _status(error), (str(error).splitlines() or [type(error).__name__])[0]
    if status == 401:
        return f"The Hub does not know who pushes to {repo_id}: `hf auth login`, or pass a token that may. ({said})"
    if status == 403:
        return f"This token may not write to {repo_id}: it has to be one with write access. ({said})"
    if status == 404:
        return f"The Hub has no {repo_id} that this token may see. ({said})"
    if status is None:
        return f"The Hub cannot be reached, tried {TRIES} times. Nothing is lost: push again. ({said})"
    return f"The Hub refused {repo_id}: {said}"
