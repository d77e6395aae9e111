"""What hart-mini and var-mini are: every size of their parts."""

from __future__ import annotations

from hart_infer.checkpoints.hart import Defaults
from hart_infer.checkpoints.var import VarDefaults
from hart_infer.models.hart import HartConfig
from hart_infer.models.parts.autoencoder import AutoencoderConfig
from hart_infer.models.var import VarConfig

PATCH_NUMS = (1, 2, 4, 6, 10, 16)
CONTEXT_TOKENS = 24

AUTOENCODER = AutoencoderConfig(
    v_patch_nums=PATCH_NUMS,
    vocab_size=4096,
    z_channels=16,
    ch=16,
    ch_mult=(1, 2, 4, 6),
    norm_groups=8,
    quantizer_type="var_hybrid",
)
TRANSFORMER = HartConfig(
    patch_nums=PATCH_NUMS,
    context_token=CONTEXT_TOKENS,
    context_dim=256,
    embed_dim=320,
    num_heads=10,
    depth=5,
    mlp_type="llama",
    sep_aln_pooling_mode="avg",
    use_timestep_embed=True,
    use_context_norm=True,
    diff_width=192,
    diff_depth=3,
)

DEFAULTS = Defaults(guidance_scale=0.0, top_p=0.3, residual_temperature=0.0, use_system_prompt=False)
VAR_DEFAULTS = VarDefaults(guidance_scale=1.0, top_k=0, top_p=0.8)
VAR_STYLES = ("twemoji",)  # a class is a subject in any of these
VAR_GROUPS = ("Animals & Nature", "Food & Drink", "Travel & Places", "Activities")  # of the subjects


def var_config(num_classes: int) -> VarConfig:
    """var-mini, on the same scales."""
    return VarConfig(patch_nums=PATCH_NUMS, num_classes=num_classes, embed_dim=160, num_heads=5, depth=4, shared_aln=True)
