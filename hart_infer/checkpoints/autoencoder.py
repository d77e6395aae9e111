"""The autoencoder that HART and VAR share: its configuration keys, the released names of its tensors."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..errors import ConfigError
from .configs import BOOKKEEPING, Keys

AUTOENCODER_KEYS = Keys(
    fixed={
        "model_type": ("hart_autoencoder_with_disc", "hart_autoencoder"),
        "using_znorm": (False,),
        "quant_conv_ks": (3,),
        "quant_resi": (0.5,),
        "disable_quant_resi": (False,),
        "double_decoder": (False,),
        "default_qresi_counts": (0,),
    },
    ignored=BOOKKEEPING | frozenset("dropout beta levels hybrid freeze_codebook_for_hybrid test_mode".split()),
)

AUTOENCODER_SUFFIXES = (
    (r"(.*)\.nin_shortcut\.(.*)", r"\1.shortcut.\2"),
    (r"((?:encoder|decoder)\..*attn_\d+)\.proj_out\.(.*)", r"\1.proj.\2"),
)


def autoencoder_rules(prefix: str) -> tuple[tuple[str, str], ...]:
    """Return the rename rules of released names that begin with `prefix`."""
    start = re.escape(prefix)
    return (
        (rf"{start}(encoder|decoder)\.(down|up)\.(\d+)\.(block|attn)\.(\d+)\.(.*)", r"\1.\2_\3_\4_\5.\6"),
        (rf"{start}(encoder|decoder)\.(down|up)\.(\d+)\.((?:down|up)sample)\.(.*)", r"\1.\2_\3_\4.\5"),
        (rf"{start}(encoder|decoder)\.mid\.(\w+)\.(.*)", r"\1.mid_\2.\3"),
        (rf"{start}quantize\.embedding\.weight", r"quantizer.codebook.weight"),
        (rf"{start}quantize\.quant_resi\.(?:qresi_ls\.)?(\d+)\.(.*)", r"quantizer.phi.\1.\2"),
        (rf"{start}quantize\.quant_resi\.qresi\.(.*)", r"quantizer.phi.0.\1"),
    )


def check_sides(name: str, patch_nums: Sequence[int], v_patch_nums: Sequence[int]) -> None:
    """Raise ConfigError unless a transformer's sides are its autoencoder's."""
    if patch_nums != v_patch_nums:
        raise ConfigError(
            f"{name}: the transformer's patch_nums {list(patch_nums)} are not the autoencoder's v_patch_nums "
            f"{list(v_patch_nums)}; both must come from the same checkpoint."
        )
