"""Students to the Hub: card and files in one commit, tried again when the connection breaks."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from cm_diffusers.hub.card import is_rendered, render_card
from cm_diffusers.pipelines.loading import ADAPTERS
from cm_diffusers.pipelines.stored import TRANSPORT_ERRORS

logger = logging.getLogger(__name__)

# What belongs to a student; checkpoints, logs and bad steps stay here.
PUBLISHED = [
    "README.md", "model_index.json", "training.json", "samples.png", "scheduler/*", "unet/*", "evaluation/*.json",
    "evaluation/*.md", "evaluation/*.png", "evaluation.jsonl", "evaluation.json",
    # Of students that make images of text.
    ADAPTERS, "vae/*", "text_encoder/*", "text_encoder_2/*", "tokenizer/*", "tokenizer_2/*", "safety_checker/*",
    "feature_extractor/*", "image_encoder/*",
]  # fmt: skip
# Where these libraries write down the place that a part was once loaded from.
PLACES = ("_name_or_path", "name_or_path")
# The client puts what fails with large files into a RuntimeError.
CALL_ERRORS: tuple[type[Exception], ...] = (*TRANSPORT_ERRORS, RuntimeError)
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

    A README.md in the folder that is a person's own is kept; one that this function rendered is rendered anew.

    Args:
        folder (`str` or `Path`): of the student, as a run or the `save_pretrained` of its pipeline wrote it.
        repo_id (`str`): `name`, `user/name` or `organisation/name`.
        private (`bool`, *optional*): of a new repository; the account's default when `None`. With `True`, nothing is
            pushed to a public one.
        token (`str`, *optional*): one that may write; by default that of `hf auth login` or `HF_TOKEN`.
        revision (`str`, *optional*): the branch to commit to, made if there is none; the default one when `None`.
        commit_message (`str`): of the commit.
        create_pr (`bool`): open a pull request instead.

    Returns:
        `str`: the address of the commit.

    Raises:
        `ValueError`: if the folder holds no student, or `repo_id` is not a name that the Hub allows.
        `OSError`: if there is no room for a copy of the student.
        [`PushError`]: if the Hub refuses or cannot be reached.
    """
    folder, api = Path(folder), HfApi(token=token)
    check_name(repo_id)
    render_card(folder, repo_id)  # before anything is made: the folder holds a student
    with tempfile.TemporaryDirectory() as staging:
        gather(folder, Path(staging))
        repo_id = _ask(repo_id, lambda: api.create_repo(repo_id, private=private, exist_ok=True).repo_id)
        if private and _ask(repo_id, lambda: api.model_info(repo_id).private) is False:
            raise PushError(f"{repo_id} is public, and the push is to be private: make it private, or take another.")
        if revision is not None:
            _ask(repo_id, lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))
        card = Path(staging) / "README.md"
        if not card.exists() or is_rendered(card):
            render_card(staging, repo_id).save(card)
        commit: CommitInfo = _ask(
            repo_id,
            lambda: api.upload_folder(
                repo_id=repo_id, folder_path=staging, commit_message=commit_message, revision=revision,
                create_pr=create_pr,
            ),
        )  # fmt: skip
    return str(commit.pr_url if create_pr else commit.commit_url)


def check_name(repo_id: str) -> None:
    """Refuse names that the Hub does not allow.

    Raises:
        `ValueError`: saying why.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no name of a repository: {error}") from error


def check_access(repo_id: str, token: str | None = None) -> None:
    """See that there is a token that may write, before there is anything to push. A Hub that is away is a warning.

    Args:
        repo_id (`str`): `name`, `user/name` or `organisation/name`.
        token (`str`, *optional*): by default that of `hf auth login` or `HF_TOKEN`.

    Raises:
        `ValueError`: if `repo_id` is not a name that the Hub allows.
        [`PushError`]: if there is no token, the Hub does not know it, or it may only read.
    """
    check_name(repo_id)
    try:
        account = _trying(lambda: HfApi(token=token).whoami())
    except TRANSPORT_ERRORS as error:
        if _passes(error):
            logger.warning("Whether %s can be pushed to is not known: %s", repo_id, _explained(error, repo_id))
            return
        raise PushError(_explained(error, repo_id)) from error
    if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise PushError(f"This token may not write to {repo_id}: it has to be one with write access.")


def gather(folder: Path, staging: Path) -> None:
    """Copy what belongs to the student, without the places that its parts were once loaded from."""
    for pattern in PUBLISHED:
        for file in folder.glob(pattern):
            if file.is_file():
                place = staging / file.relative_to(folder)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(file, place)
    for place in (staging / "model_index.json", *staging.glob("*/*config.json")):
        config = json.loads(place.read_text(encoding="utf-8")) if place.exists() else {}
        found = [config.pop(name, None) for name in PLACES]
        if any(found):
            place.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _ask(repo_id: str, call: Callable[[], T]) -> T:
    """The result of `call`, a request about a repository; its failure as a [`PushError`]."""
    try:
        return _trying(call)
    except TRANSPORT_ERRORS as error:
        raise PushError(_explained(error, repo_id)) from error


def _trying(call: Callable[[], T]) -> T:
    """The result of `call`, tried again, after longer and longer pauses, while the connection or the Hub fails."""
    for attempt in range(TRIES):
        try:
            return call()
        except CALL_ERRORS as error:
            failure = _failure(error)
            if failure is None:
                raise
            if not _passes(failure) or attempt == TRIES - 1:
                raise failure from None
            pause = FIRST_PAUSE * 2**attempt
            logger.warning("The Hub did not answer (%s); trying again in %.0f s.", failure, pause)
            time.sleep(pause)
    raise AssertionError  # not reached


def _failure(error: BaseException | None) -> Exception | None:
    """The failure on the way that an error is or comes from, if it does."""
    while error is not None and not isinstance(error, TRANSPORT_ERRORS):
        error = error.__cause__
    return error


def _passes(failure: Exception) -> bool:
    """Whether it may go better later: no answer, too many requests, or a fault of the Hub's."""
    status = _status(failure)
    return status is None or status == 429 or status >= 500


def _status(error: Exception) -> int | None:
    """The Hub's answer, if there was one; a missing token is as good as a refused one."""
    if isinstance(error, LocalTokenNotFoundError):
        return 401
    response = getattr(error, "response", None)  # the client's errors are not all of one class
    return None if response is None else int(response.status_code)


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
