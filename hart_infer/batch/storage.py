"""The folder that a run writes into: on disk, or in an object store. A file appears under its name only when it is complete."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from ..errors import HartError, InputError, OutputError
from ..images.files import PARTIAL, check_writable, whole_file, write_failure
from .lock import LOCK, acquire, release

# Object stores, which show an upload only when it is complete, and what fsspec needs to reach them.
STORES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "memory": "fsspec"}


class Storage(Protocol):
    """A folder; names are relative to it, with / between folders. Its methods raise OutputError, or InputError for reading."""

    title: str

    def alone(self) -> AbstractContextManager[None]:
        """Keep other runs out of the folder for a while, where that can be done. Raises InputError if one is in it."""
        ...

    def whole(self, name: str) -> AbstractContextManager[BinaryIO]:
        """Yield a file to write, which gets its name if the block ends without an exception, and else is gone."""
        ...

    def read(self, names: Iterable[str]) -> list[bytes]:
        """Return the contents of files, in order."""
        ...

    def names(self, folder: str) -> list[str]:
        """Return the sorted names of the complete files in a folder, which may be missing."""
        ...

    def remove(self, names: Iterable[str]) -> None:
        """Remove files, of which some may be gone."""
        ...

    def tidy(self, folder: str) -> None:
        """Remove what killed writers have left in a folder. Only when nobody writes into it."""
        ...


def open_storage(out: str) -> Storage:
    """Return the storage of a local folder, which may be missing yet, or of a URL such as s3://bucket/folder.

    Raises InputError for a URL that can't be reached from here, and OutputError for a folder that can't be written.
    """
    scheme, separator, rest = out.partition("://")
    if not separator or scheme == "file":
        folder = LocalStorage(Path(os.path.expanduser(rest if separator else out)).absolute())
        folder.check()
        return folder
    return RemoteStorage(out.rstrip("/"))


def read_file(path: str) -> bytes:
    """Return the content of a local file or of a URL. Raises InputError."""
    if "://" in path:
        folder, _, name = path.rpartition("/")
        return RemoteStorage(folder).read([name])[0]
    return LocalStorage(Path()).read([path])[0]


class LocalStorage:
    """A folder on a disk."""

    def __init__(self, folder: Path) -> None:
        self.title = str(folder)
        self._folder = folder

    def check(self) -> None:
        """Raise OutputError if nothing can be written here."""
        check_writable([self._folder / "probe"], check=lambda path: None)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold a lock."""
        try:
            held = acquire(self._folder)
        except BlockingIOError as error:
            raise InputError(f"Another run writes into {self.title}; wait for it, or give another folder.") from error
        except OSError as error:
            raise write_failure(self._folder / LOCK, error) from error
        try:
            yield
        finally:
            release(held, self._folder)

    def whole(self, name: str) -> AbstractContextManager[BinaryIO]:
        """Write to a temporary name in the same folder, then rename."""
        return self._whole(self._folder / name)

    @contextmanager
    def _whole(self, path: Path) -> Iterator[BinaryIO]:
        try:
            with whole_file(path, overwrite=True) as file:
                yield file
        except HartError:
            raise
        except OSError as error:
            raise write_failure(path, error) from error

    def read(self, names: Iterable[str]) -> list[bytes]:
        """Return the contents of files."""
        contents = []
        for name in names:
            try:
                contents.append((self._folder / os.path.expanduser(name)).read_bytes())
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or str(error)
                raise InputError(f"{name} cannot be read: {reason.lower()}.") from error
        return contents

    def names(self, folder: str) -> list[str]:
        """Return the names of the files."""
        root = self._folder / folder
        try:
            found = [path.name for path in root.iterdir() if not path.is_dir()]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise write_failure(root, error) from error
        prefix = f"{folder}/" if folder else ""
        return sorted(prefix + name for name in found if not PARTIAL.fullmatch(name))

    def remove(self, names: Iterable[str]) -> None:
        """Remove files."""
        for name in names:
            try:
                (self._folder / name).unlink(missing_ok=True)
            except OSError as error:
                raise write_failure(self._folder / name, error) from error

    def tidy(self, folder: str) -> None:
        """Remove temporary files."""
        for path in (self._folder / folder).glob(".*"):
            if PARTIAL.fullmatch(path.name):
                path.unlink(missing_ok=True)


class RemoteStorage:
    """A folder in an object store, reached by fsspec."""

    def __init__(self, url: str) -> None:
        self.title = url
        scheme, _, folder = url.partition("://")
        if scheme not in STORES:
            raise InputError(f"{url} is neither a folder nor a URL of an object store ({', '.join(STORES)}).")
        self._folder = folder
        self._files = _file_system(scheme)

    def _path(self, name: str) -> str:
        return f"{self._folder}/{name}" if name else self._folder

    def alone(self) -> AbstractContextManager[None]:
        """Do nothing: object stores have no locks."""
        return nullcontext()

    @contextmanager
    def whole(self, name: str) -> Iterator[BinaryIO]:
        """Write to a temporary file here, then upload it."""
        with tempfile.TemporaryDirectory(prefix="hart-") as folder:
            path = Path(folder) / "file"
            with open(path, "xb") as file:
                yield file
            with self._errors(name):
                self._files.put_file(str(path), self._path(name))

    def read(self, names: Iterable[str]) -> list[bytes]:
        """Return the contents of files, which are fetched together."""
        paths = [self._path(name) for name in names]
        try:
            whole = [None] * len(paths)
            return list(self._files.cat_ranges(paths, whole, whole, on_error="raise"))
        except Exception as error:  # every store has exceptions of its own
            raise InputError(f"{self.title} cannot be read: {_sentence(error)}") from error

    def names(self, folder: str) -> list[str]:
        """Return the names of the files."""
        with self._errors(folder):
            self._files.invalidate_cache()
            try:
                found = self._files.ls(self._path(folder), detail=True)
            except FileNotFoundError:
                return []
        prefix = f"{folder}/" if folder else ""
        return sorted(prefix + entry["name"].rpartition("/")[2] for entry in found if entry["type"] == "file")

    def remove(self, names: Iterable[str]) -> None:
        """Remove files."""
        for name in names:
            with self._errors(name):
                try:
                    self._files.rm_file(self._path(name))
                except FileNotFoundError:
                    continue

    def tidy(self, folder: str) -> None:
        """Do nothing: an upload that was cut off shows nowhere."""

    @contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # every store has exceptions of its own
            raise OutputError(f"{self.title}/{name} cannot be reached: {_sentence(error)}") from error


def _file_system(scheme: str) -> Any:
    try:
        import fsspec

        return fsspec.filesystem(scheme)
    except ImportError as error:
        raise InputError(f"{scheme}:// needs {STORES[scheme]}: pip install {STORES[scheme]}.") from error
    except Exception as error:  # no credentials, for example
        raise InputError(f"{scheme}:// cannot be reached: {_sentence(error)}") from error


def _sentence(error: Exception) -> str:
    return f"{(str(error) or type(error).__name__).strip().rstrip('.')}."
