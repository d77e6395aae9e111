"""Download only the needed files of a Hugging Face repository; fall back to the cache when the Hub can't be reached."""

from __future__ import annotations

import errno
import glob
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import CheckpointNotFoundError, HartError, OutputError

PAUSES = (0.5, 1, 2, 4)  # seconds before each further attempt at a download
ELSEWHERE = "point cache_dir (HF_HOME for the command line) at"
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EFBIG}
_TRANSIENT_STATUS = {408, 429}
logger = logging.getLogger(__name__)


def file_names(root: Path) -> list[str]:
    """Return the names of the files in a folder, one level of subfolders, and those of `model/`, relative to it."""
    patterns = ("*", "*/*", "model/*/*")
    return [file.relative_to(root).as_posix() for pattern in patterns for file in root.glob(pattern) if file.is_file()]


@dataclass(frozen=True)
class HubOptions:
    """Arguments of requests to the Hub, by huggingface_hub's names."""

    revision: str | None = None
    cache_dir: str | Path | None = None
    token: str | bool | None = None
    local_files_only: bool = False

    def arguments(self) -> dict[str, Any]:
        """Return keyword arguments for huggingface_hub's downloads."""
        return {"revision": self.revision, "cache_dir": self.cache_dir, "token": self.token}


HUB = HubOptions()  # huggingface_hub's defaults


@dataclass(frozen=True)
class Repository:
    """A repository on the Hub or, if only the cache is used, its cached files."""

    id: str
    names: list[str]  # of all its files, or of those in the cache
    options: HubOptions
    commit: str | None = None  # at which `names` were listed
    cached: Path | None = None  # the snapshot's folder, if only the cache is used
    reason: str = ""  # why only the cache is used

    @classmethod
    def open(cls, repo: str, options: HubOptions) -> Repository:
        """List a repository's files. Raises CheckpointNotFoundError if neither the Hub nor the cache has it."""
        from huggingface_hub import HfApi

        if options.local_files_only:
            return cls._from_cache(repo, options, "local_files_only is set")
        try:
            info = HfApi().model_info(repo, revision=options.revision, token=options.token, timeout=30)
        except _transfer_errors() as error:
            if refusal := _refusal(error, repo, options):
                raise refusal from error
            return cls._from_cache(repo, options, _reason(error), error)
        return cls(repo, [sibling.rfilename for sibling in info.siblings or []], options, info.sha)

    @classmethod
    def _from_cache(cls, repo: str, options: HubOptions, reason: str, error: BaseException | None = None) -> Repository:
        root = _snapshot(repo, options)
        if root is None:
            raise CheckpointNotFoundError(
                f"{repo} is not in the local cache and {reason}; connect, download it elsewhere and pass the folder, or "
                f"{ELSEWHERE} a copy."
            ) from error
        return cls(repo, file_names(root), options, cached=root, reason=reason)

    @property
    def title(self) -> str:
        """Return its name for messages; it says if only the cache is used."""
        return f"{self.id} in the local cache ({self.reason})" if self.cached else self.id

    def fetch(self, names: Iterable[str]) -> Path:
        """Download `names` to the cache; return the snapshot's folder.

        Interrupted transfers resume, and failures that may pass are retried after PAUSES. Raises CheckpointNotFoundError, or
        OutputError if the cache can't be written.
        """
        names = list(names)
        if self.cached is not None:
            return self._complete(self.cached, names, self.reason)
        try:
            root = self._download(names, self.options)
            if root.name != self.commit:  # the revision has moved on since it was listed
                root = self._download(names, replace(self.options, revision=self.commit))
        except _transfer_errors() as error:
            if refusal := _refusal(error, self.id, self.options):
                raise refusal from error
            return self._complete(_snapshot(self.id, self.options), names, _reason(error), error)
        return self._complete(root, names, "not all of it arrived")

    def _download(self, names: list[str], options: HubOptions) -> Path:
        from huggingface_hub import snapshot_download

        patterns = [glob.escape(name) for name in names]
        for pause in PAUSES:
            try:
                return Path(snapshot_download(self.id, allow_patterns=patterns, **options.arguments()))
            except _transfer_errors() as error:
                if not _may_pass(error):
                    raise
                logger.warning("Download of %s was interrupted (%s); trying again.", self.id, type(error).__name__)
                time.sleep(pause)
        return Path(snapshot_download(self.id, allow_patterns=patterns, **options.arguments()))

    def _complete(self, root: Path | None, names: list[str], reason: str, error: BaseException | None = None) -> Path:
        missing = [name for name in names if root is None or not (root / name).exists()]
        if root is None or missing:
            raise CheckpointNotFoundError(
                f"{self.id} is not complete in the local cache ({', '.join(missing)} missing) and {reason}; connect, download "
                f"it elsewhere and pass the folder, or {ELSEWHERE} a copy."
            ) from error
        return root


def _snapshot(repo: str, options: HubOptions) -> Path | None:
    """Return the folder of a revision's cached files without asking the Hub; None if there is none."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, allow_patterns=[], local_files_only=True, **options.arguments()))
    except (OSError, ValueError):
        return None


def _transfer_errors() -> tuple[type[BaseException], ...]:
    """Return the exceptions of a failed request.

    HfHubHTTPError.__mro__[1] is the error class of huggingface_hub's HTTP client: requests, httpx or httpx2, by its version.
    """
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    return (HfHubHTTPError.__mro__[1], OSError, HFValidationError)


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _may_pass(error: BaseException) -> bool:
    """Return whether a transfer that failed with this error is worth another attempt."""
    status = _status(error)
    if status is not None:
        return status >= 500 or status in _TRANSIENT_STATUS
    return getattr(error, "errno", None) not in _DISK_ERRORS


def _reason(error: BaseException) -> str:
    status = _status(error)
    if status == 401:
        return "the Hub does not accept the token (401)"
    if status is not None:
        return f"the Hub answers with an error ({status})"
    return f"the Hub can't be reached ({type(error.__cause__ or error).__name__})"


def _refusal(error: BaseException, repo: str, options: HubOptions) -> HartError | None:
    """Return the error for a failure that the cache can't make up for; None for others, such as connection problems."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalTokenNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, HFValidationError):
        return CheckpointNotFoundError(f"{repo!r} is not a valid Hub id: {error}")
    if isinstance(error, LocalTokenNotFoundError):
        return CheckpointNotFoundError(f"token=True, but no token is stored for {repo}: log in with `hf auth login`.")
    if isinstance(error, GatedRepoError):
        return CheckpointNotFoundError(
            f"{repo} is gated: ask for access on its page, then pass token=... or log in with `hf auth login`."
        )
    if isinstance(error, RevisionNotFoundError):
        return CheckpointNotFoundError(f"{repo} has no revision {options.revision!r}; check the name.")
    if isinstance(error, RepositoryNotFoundError):
        return CheckpointNotFoundError(
            f"{repo} is neither a folder here nor a repository on the Hub that you can read; check the spelling, or pass "
            "token=... if it is private."
        )
    if getattr(error, "errno", None) in _DISK_ERRORS:
        return OutputError(f"{repo} can't be stored in the local cache ({error}); free space, or {ELSEWHERE} another disk.")
    return None
