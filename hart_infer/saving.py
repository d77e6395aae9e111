"""A pipeline to one clean folder, whole or not at all."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from .checkpoint import INDEX
from .errors import OutputError

if TYPE_CHECKING:
    from .config import AutoencoderConfig, TransformerConfig
    from .pipeline import HartPipeline


def save_pipeline(pipeline: HartPipeline, path: Path, *, max_shard_size: str) -> Path:
    """Write `transformer/`, `autoencoder/`, `text_encoder/` and `model_index.json` into `path`.

    They are written into a temporary folder beside `path`, which then takes its place. A folder of another kind is never
    replaced. Raises OutputError.
    """
    if path.is_file() or (path.is_dir() and any(path.iterdir()) and not (path / INDEX).exists()):
        raise OutputError(f"{path} exists and is not a saved hart_infer checkpoint; give a new or empty folder.")
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        temporary.chmod(0o755)
        _write(pipeline, temporary, max_shard_size)
        if path.exists():
            shutil.rmtree(path)
        temporary.rename(path)
    except OSError as error:
        raise OutputError(
            f"{path} can't be written ({error.strerror or error}); free space or choose another folder."
        ) from error
    finally:
        if temporary is not None and temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)
    return path


def _write(pipeline: HartPipeline, folder: Path, max_shard_size: str) -> None:
    from . import __version__

    parts = ["transformer", "autoencoder"]
    _write_part(pipeline.transformer, pipeline.transformer.config, folder / "transformer", max_shard_size)
    _write_part(pipeline.autoencoder, pipeline.autoencoder.config, folder / "autoencoder", max_shard_size)
    if pipeline.text_encoder is not None:
        parts.append("text_encoder")
        pipeline.text_encoder.save_pretrained(folder / "text_encoder", max_shard_size=max_shard_size)
    index = {"_class_name": "HartPipeline", "_hart_infer_version": __version__, "parts": parts}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_part(module: nn.Module, config: TransformerConfig | AutoencoderConfig, folder: Path, max_shard_size: str) -> None:
    from huggingface_hub import save_torch_state_dict

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n", encoding="utf-8")
    save_torch_state_dict(module.state_dict(), folder, max_shard_size=max_shard_size, metadata={"format": "pt"})
