"""Exactly the needed files of a repository on the Hugging Face Hub, from the cache when the Hub can't be reached."""

from __future__ import annotations

import glob
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from .errors import CheckpointNotFoundError

PlanT = TypeVar("PlanT")
DOWNLOAD_ATTEMPTS = 5
logger = logging.getLogger(__name__)


def file_names(root: Path) -> list[str]:
    """Names of the files in a folder and in its folders, relative to it."""
    return [file.relative_to(root).as_posix() for pattern in ("*", "*/*") for file in root.glob(pattern) if file.is_file()]


def download(
    repo: str,
    choose: Callable[[Iterable[str]], PlanT],
    files: Callable[[PlanT], list[str]],
    *,
    revision: str | None,
    cache_dir: str | Path | None,
    token: str | bool | None,
    local_files_only: bool,
) -> tuple[Path, PlanT]:
    """List `repo`, let `choose` plan on the names, and download `files` of the plan; returns the folder and the plan.

    An interrupted transfer is taken up where it stopped. When the Hub can't be reached the cached files serve.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    where: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "token": token}
    if local_files_only:
        return _from_cache(repo, choose, files, where, "local_files_only was set")
    try:
        info = HfApi().model_info(repo, revision=revision, token=token, timeout=30)
        plan = choose([sibling.rfilename for sibling in info.siblings or []])
        return _fetch(repo, files(plan), where), plan
    except HFValidationError as error:
        raise CheckpointNotFoundError(f"{repo!r} is not a valid Hub id: {error}") from error
    except GatedRepoError as error:
        raise CheckpointNotFoundError(
            f"{repo} is gated: ask for access on its page, then pass token=... or log in with `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointNotFoundError(f"{repo} has no revision {revision!r}; check the name.") from error
    except RepositoryNotFoundError as error:
        raise CheckpointNotFoundError(
            f"{repo} is neither a folder here nor a repository on the Hub that you can read; check the spelling, or pass "
            "token=... if it is private."
        ) from error
    except _transport_errors() as error:
        return _from_cache(repo, choose, files, where, f"the Hub can't be reached ({type(error).__name__})")


def _transport_errors() -> tuple[type[BaseException], ...]:
    """What a failed transfer raises: huggingface_hub's HTTP client has changed twice, its base error with it."""
    from huggingface_hub.errors import HfHubHTTPError

    return (HfHubHTTPError.__mro__[1], OSError)


def _fetch(repo: str, names: list[str], where: dict[str, Any]) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [glob.escape(name) for name in names]
    for attempt in range(1, DOWNLOAD_ATTEMPTS + 1):
        try:
            root = Path(snapshot_download(repo, allow_patterns=patterns, **where))
            break
        except _transport_errors() as error:
            if attempt == DOWNLOAD_ATTEMPTS:
                raise
            logger.warning("Download of %s was interrupted (%s); resuming.", repo, type(error).__name__)
    missing = [name for name in names if not (root / name).exists()]
    if missing:
        raise OSError(f"{', '.join(missing)} did not arrive")
    return root


def _from_cache(
    repo: str,
    choose: Callable[[Iterable[str]], PlanT],
    files: Callable[[PlanT], list[str]],
    where: dict[str, Any],
    reason: str,
) -> tuple[Path, PlanT]:
    from huggingface_hub import try_to_load_from_cache

    lookup = {"revision": where["revision"], "cache_dir": where["cache_dir"]}
    found = [try_to_load_from_cache(repo, name, **lookup) for name in ("model_index.json", "llm/config.json")]
    roots = [Path(path).parents[depth] for depth, path in enumerate(found) if isinstance(path, str)]
    if roots:
        plan = choose(file_names(roots[0]))
        if all((roots[0] / name).exists() for name in files(plan)):
            return roots[0], plan
    raise CheckpointNotFoundError(
        f"{repo} is not complete in the local cache and {reason}; connect, download it elsewhere and pass the folder, or set "
        "cache_dir."
    )
