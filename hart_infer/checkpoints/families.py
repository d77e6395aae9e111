"""Tell which family a checkpoint is of from its files, and read its configuration without its weights."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Literal

from ..errors import CheckpointNotFoundError, ConfigError
from . import hart, var, vila_u
from .configs import read_json
from .hart import HartCheckpoint
from .hub import HUB, HubOptions, Repository
from .layouts import INDEX, RELEASED_MODEL, open_source
from .var import VarCheckpoint
from .vila_u import VilaUCheckpoint

Family = Literal["HART", "VAR", "VILA-U"]
Checkpoint = HartCheckpoint | VarCheckpoint | VilaUCheckpoint
CLASS_NAMES: dict[str, Family] = {  # `_class_name` in `model_index.json`
    "HartPipeline": "HART",
    "VarPipeline": "VAR",
    "VilaUPipeline": "VILA-U",
}
RELEASED: dict[Family, str] = {  # ids on the Hub
    "HART": RELEASED_MODEL,
    "VAR": "FoundationVision/var",
    "VILA-U": "mit-han-lab/vila-u-7b-256",
}
MARKERS = (*hart.LAYOUTS, *vila_u.MARKERS)


def find_family(repo_or_path: str | Path, hub: HubOptions = HUB) -> Family:
    """Return the family of a checkpoint in a folder or on the Hub, of which at most `model_index.json` is downloaded.

    Raises CheckpointNotFoundError if it is of none, or not there, and ConfigError if its index names another pipeline.
    """
    source = open_source(repo_or_path, MARKERS, hub)
    if INDEX not in source.names:
        family = released_family(source.names)
        if family is None:
            raise CheckpointNotFoundError(
                f"{source.title} holds no checkpoint of HART, VAR or VILA-U: neither {INDEX} nor llm/config.json nor a "
                "var_*.pth is in it. Give a Hub id or the checkpoint's folder."
            )
        return family
    name = read_json(source.fetch([INDEX]) / INDEX).get("_class_name", "HartPipeline")
    if not isinstance(name, str) or name not in CLASS_NAMES:
        *others, last = CLASS_NAMES
        raise ConfigError(f"{source.title} is a checkpoint of {name!r}, not of {', '.join(others)} or {last}.")
    return CLASS_NAMES[name]


def released_family(names: Collection[str]) -> Family | None:
    """Return the family whose released layout has files of these names; None if no family's has."""
    if vila_u.is_vila_u(names):
        return "VILA-U"
    if "llm/config.json" in names:
        return "HART"
    return "VAR" if var.is_var(names) else None


def inspect_checkpoint(
    repo_or_path: str | Path, *, use_ema: bool = True, variant: str | None = None, hub: HubOptions = HUB
) -> Checkpoint:
    """Read a checkpoint's configuration without downloading weights; `use_ema` is HART's.

    File lists are empty if the weights are not local. VAR's configuration is read from them: CheckpointNotFoundError if they
    are not. Raises as `find_family` and the family's `find_checkpoint` do, too.
    """
    family = find_family(repo_or_path, hub)
    if family == "HART":
        return hart.inspect_checkpoint(repo_or_path, use_ema=use_ema, variant=variant, hub=hub)
    if family == "VILA-U":
        return vila_u.inspect_checkpoint(repo_or_path, variant=variant, hub=hub)
    source = open_source(repo_or_path, (INDEX,), hub)
    if isinstance(source, Repository):
        hub = replace(hub, local_files_only=True)
        if not _has_weights(source, variant, hub):
            raise CheckpointNotFoundError(
                f"{source.title} is a VAR model whose weights are not on this machine, and what it is can only be read from "
                "them; download them first, for example by drawing a picture."
            )
    return var.find_checkpoint(repo_or_path, variant=variant, hub=hub)


def _has_weights(source: Repository, variant: str | None, cache: HubOptions) -> bool:
    """Return whether the cache has a transformer's weights, those of `variant` if it is given."""
    try:
        cached = Repository.open(source.id, cache).names
    except CheckpointNotFoundError:
        return False
    if INDEX in source.names:
        return any(name.startswith("transformer/model") for name in cached)
    return var.is_var(cached) if variant is None else f"var_{variant}.pth" in cached
