"""Save a checkpoint folder, whole or not at all."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from ..errors import InputError, OutputError
from ..version import __version__
from .layouts import INDEX

VERSION_KEY = "_hart_infer_version"
CLASSES = "classes.json"  # names of the classes of a class-conditional model
TOKENIZER = "tokenizer.model"  # of SentencePiece
PARTS = (  # what a saved checkpoint may hold
    *("transformer", "autoencoder", "text_encoder", CLASSES),
    *("llm", "vision_tower", "depth_transformer", "mm_projector", TOKENIZER),
)
WritePart = Callable[[Path], None]  # writes a new folder or file


def save_checkpoint(path: Path, parts: Mapping[str, WritePart], index: Mapping[str, Any]) -> Path:
    """Write each of `parts`, and `index` as `model_index.json`, into `path`.

    They are written into a temporary folder beside `path`, which then takes its place. Returns the resolved path. A folder that
    holds anything else is never replaced. Raises OutputError.
    """
    path = check_destination(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        new = temporary / "new"
        new.mkdir()
        for name, write in parts.items():
            write(new / name)
        whole = {**index, VERSION_KEY: __version__, "parts": list(parts)}
        (new / INDEX).write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
        _open_to_others(new)
        replace_folder(new, path, aside=temporary / "old")
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"{path} can't be written ({reason}); free space or choose another folder.") from error
    finally:
        if temporary is not None and (path.exists() or not (temporary / "old").exists()):
            shutil.rmtree(temporary, ignore_errors=True)
    return path


def replace_folder(new: Path, path: Path, *, aside: Path) -> None:
    """Put the folder `new` in the place of `path`; the old folder ends at `new` (exchange) or `aside`.

    Where the system can exchange two names (Linux, macOS) there is a folder at `path` at every moment.
    """
    if not path.exists():
        new.rename(path)
        return
    if _exchange(new, path):
        return
    path.rename(aside)
    try:
        new.rename(path)
    except BaseException:
        aside.rename(path)
        raise


def _exchange(a: Path, b: Path) -> bool:
    """Exchange two names in one step; return False if the system or the file system can't."""
    if sys.platform == "win32":
        return False
    libc, names = ctypes.CDLL(None, use_errno=True), (os.fsencode(a), os.fsencode(b))
    try:
        if sys.platform == "darwin":
            return bool(libc.renamex_np(*names, 2) == 0)  # RENAME_SWAP
        here = -100  # AT_FDCWD
        return bool(libc.renameat2(here, names[0], here, names[1], 2) == 0)  # RENAME_EXCHANGE
    except AttributeError:  # an older C library
        return False


def _open_to_others(folder: Path) -> None:
    """Apply the umask's permissions to a folder and all in it: mkdtemp makes 0700 folders."""
    probe = folder / ".probe"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    searchable = mode | (mode & 0o444) >> 2
    folder.chmod(searchable)
    for entry in folder.rglob("*"):
        entry.chmod(searchable if entry.is_dir() else mode)


def write_module(
    module: nn.Module,
    config: Mapping[str, Any],
    folder: Path,
    *,
    max_shard_size: int | str,
    rename: Callable[[str], str] = str,
) -> None:
    """Write a module's `config.json` and its weights, as safetensors and by the names `rename(ours)`, into a new folder."""
    from huggingface_hub import save_torch_state_dict

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    plain: nn.Module = getattr(module, "_orig_mod", module)  # of torch.compile's wrapper
    state = {rename(name): tensor for name, tensor in plain.state_dict().items()}
    save_torch_state_dict(state, folder, max_shard_size=max_shard_size, metadata={"format": "pt"})


def check_shard_size(size: str) -> None:
    """Raise InputError for a size that huggingface_hub, which makes the shards, doesn't understand."""
    from huggingface_hub import split_torch_state_dict_into_shards

    try:
        split_torch_state_dict_into_shards({}, max_shard_size=size)
    except (ValueError, OverflowError) as error:
        raise InputError(f'max_shard_size must be a size such as "5GB" or "500MB", not {size!r}.') from error


def check_destination(path: Path) -> Path:
    """Resolve `path` and return it; raise OutputError if it can't be written or must not be replaced."""
    path = Path(os.path.realpath(path.expanduser()))
    try:
        _check_replaceable(path)
        existing = next(folder for folder in path.parents if folder.exists())
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"{path} can't be written ({error.strerror}); choose another folder.") from error
    reason = "Not a directory" if not existing.is_dir() else "Permission denied"
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise OutputError(f"{path} can't be written ({reason}: {existing}); choose another folder.")
    return path


def _check_replaceable(path: Path) -> None:
    """Raise OutputError unless `path` is absent, empty, or only a checkpoint saved by hart_infer."""
    if not path.exists():
        return
    if not path.is_dir():
        raise OutputError(f"{path} is a file; give a new or empty folder.")
    names = {entry.name for entry in path.iterdir()}
    if not names:
        return
    try:
        index = json.loads((path / INDEX).read_text(encoding="utf-8"))
        is_ours = VERSION_KEY in index
    except (OSError, ValueError, TypeError):
        is_ours = False
    if not is_ours:
        raise OutputError(f"{path} exists and is not a saved hart_infer checkpoint; give a new or empty folder.")
    others = sorted(names - {INDEX, *PARTS})
    if others:
        raise OutputError(f"{path} also holds {', '.join(others)}, which would be lost; give a new or empty folder.")
