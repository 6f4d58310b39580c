"""A run's student on the Hub: at the end, and while it trains."""

from __future__ import annotations

import logging
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from cm_diffusers.hub.push import PushError, check_access, gather, push_to_hub
from cm_diffusers.training.config import ConsistencyConfig

logger = logging.getLogger(__name__)


class Publisher:
    """Pushes the student in a run's `output_dir`. Used by one process.

    Args:
        config ([`ConsistencyConfig`]): the run's.
    """

    def __init__(self, config: ConsistencyConfig) -> None:
        self.config, self.folder = config, Path(config.output_dir)
        self.repo_id = config.hub_repository
        self._pool = ThreadPoolExecutor(1)
        self._under_way: Future[None] | None = None

    def check(self) -> None:
        """See before the run that it can push.

        Raises:
            `ValueError`: if the repository's name is not one that the Hub allows.
            [`~cm_diffusers.hub.push.PushError`]: if there is no token that may write.
        """
        if self.config.hub_strategy == "checkpoint" and not self.config.checkpoint_steps:
            logger.warning("`hub_strategy: checkpoint` pushes at the end alone: `checkpoint_steps` is 0.")
        check_access(self.repo_id, self.config.hub_token)

    def push(self, **options: Any) -> str:
        """Push now, after what is under way. Returns the address of the commit.

        Raises:
            [`~cm_diffusers.hub.push.PushError`]: saying how to push it later.
        """
        if self._under_way is not None:
            wait([self._under_way])
        options = {**self._options("End of training"), **options}
        try:
            address = push_to_hub(self.folder, **options)
        except (OSError, ValueError) as error:
            later = f"cm-diffusers push {self.folder} {options['repo_id']}"
            raise PushError(f"{error} The student is saved: push it with `{later}`.") from error
        logger.info("Pushed to %s.", address)
        return address

    def push_meanwhile(self, step: int) -> None:
        """Push what is saved now while training goes on; skipped while an earlier push is under way.

        What goes wrong is a warning: the run goes on.
        """
        if self._under_way is not None and not self._under_way.done():
            logger.info("Step %d is not pushed: an earlier one is still on its way.", step)
            return
        try:
            with ExitStack() as stack:
                staging = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                # Copied at once: the run may save again before the upload has read all files.
                gather(self.folder, staging)
                self._under_way = self._pool.submit(self._push_staged, staging, step, stack.pop_all())
        except Exception as error:
            _warn(step, error)

    def _push_staged(self, staging: Path, step: int, cleanup: ExitStack) -> None:
        try:
            with cleanup:
                push_to_hub(staging, **self._options(f"Step {step}"))
        except Exception as error:
            _warn(step, error)

    def _options(self, message: str) -> dict[str, Any]:
        config = self.config
        return {
            "repo_id": self.repo_id, "private": config.hub_private_repo, "token": config.hub_token,
            "revision": config.hub_revision, "commit_message": message,
        }  # fmt: skip


def _warn(step: int, error: Exception) -> None:
    logger.warning("The student of step %d is not pushed: %s", step, error)
