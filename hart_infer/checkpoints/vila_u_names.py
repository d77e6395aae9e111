"""The released names of VILA-U's tensors: which are read, and what they are called here."""

from __future__ import annotations

from ..models.llama import LlamaConfig
from ..models.vila_u.projector import MAX_LAYERS
from ..models.vila_u.vision import VisionConfig
from .autoencoder import AUTOENCODER_SUFFIXES, autoencoder_rules
from .llama import decoder_rules
from .weights import RenameTable

TOWER_NAMES = r"rqvaesiglip\..*"  # in the file that the tower and the depth transformer share
DEPTH_NAMES = r"rqtransformer\..*"
_SIGLIP = r"rqvaesiglip\.siglip_model\.vision_model\."
_QKV = tuple(enumerate("qkv"))


def renames(llama: LlamaConfig, vision: VisionConfig) -> RenameTable:
    """Return the table of the released names of all parts: the Llama, the tower, the depth transformer, the projector."""
    rules = [
        (r"lm_head\.weight", r"lm_head.weight"),
        *decoder_rules(llama, r"model\."),
        (r"layers\.(weight|bias)", r"layers.0.\1"),
        *((rf"layers\.{2 * i}\.(weight|bias)", rf"layers.{i}.\1") for i in range(MAX_LAYERS)),
        (rf"{_SIGLIP}embeddings\.patch_embedding\.(.*)", r"encoder.patch_embed.\1"),
        (rf"{_SIGLIP}embeddings\.position_embedding\.(.*)", r"encoder.position_embed.\1"),
        (rf"{_SIGLIP}(encoder\.layers\.\d+)\.layer_norm([12])\.(.*)", r"\1.norm\2.\3"),
        (rf"{_SIGLIP}(encoder\.layers\.\d+)\.self_attn\.out_proj\.(.*)", r"\1.attn.proj.\2"),
        *((rf"{_SIGLIP}(encoder\.layers\.\d+)\.self_attn\.{x}_proj\.(.*)", rf"\1.attn.qkv.\2[{i}]") for i, x in _QKV),
        (rf"{_SIGLIP}(encoder\.layers\.\d+\.mlp\..*)", r"\1"),
        (r"rqvaesiglip\.(quantizer\..*|post_quant_conv\..*)", r"\1"),
        *autoencoder_rules("rqvaesiglip."),
        (r"rqvaesiglip\.(decoder\..*)", r"\1"),
        (r"rqtransformer\.in_mlp_1\.(.*)", r"code_embed.\1"),
        (r"rqtransformer\.in_mlp_2\.(.*)", r"hidden_embed.\1"),
        (r"rqtransformer\.pos_emb_d", r"slot_embed"),
        (r"rqtransformer\.head_transformer\.(blocks\.\d+)\.ln1\.(.*)", r"\1.attn_norm.\2"),
        (r"rqtransformer\.head_transformer\.(blocks\.\d+)\.ln2\.(.*)", r"\1.mlp_norm.\2"),
        (r"rqtransformer\.head_transformer\.(blocks\.\d+)\.mlp\.0\.(.*)", r"\1.fc1.\2"),
        (r"rqtransformer\.head_transformer\.(blocks\.\d+)\.mlp\.2\.(.*)", r"\1.fc2.\2"),
        (r"rqtransformer\.head_transformer\.(blocks\.\d+\.attn\.proj\..*)", r"\1"),
        *(
            (rf"rqtransformer\.head_transformer\.(blocks\.\d+)\.attn\.{x}\.(.*)", rf"\1.attn.qkv.\2[{i}]")
            for i, x in enumerate(("query", "key", "value"))
        ),
        (r"rqtransformer\.classifier_mlp\.layer_norm\.(.*)", r"norm.\1"),
        (r"rqtransformer\.classifier_mlp\.linear\.(.*)", r"classifier.\1"),
    ]  # fmt: skip
    return RenameTable(
        rules,
        then=[*AUTOENCODER_SUFFIXES, *((rf"(decoder\..*attn_\d+)\.{x}\.(.*)", rf"\1.qkv.\2[{i}]") for i, x in _QKV)],
        dropped="|".join(_never_read(vision)),
        batched=r"slot_embed",
    )


def _never_read(vision: VisionConfig) -> list[str]:
    """Return patterns of the released names that inference has no use for."""
    return [
        r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
        r"rqvaesiglip\.(siglip_model\.)?logit_(scale|bias)",
        r"rqvaesiglip\.siglip_model\.text_model\..*",
        rf"{_SIGLIP}(head|post_layernorm)\..*",
        rf"{_SIGLIP}embeddings\.position_ids",
        rf"{_SIGLIP}encoder\.layers\.{vision.num_hidden_layers - 1}\..*",
        r"rqvaesiglip\.quantizer\.codebooks\.\d+\.(cluster_size_ema|embed_ema)",
        *([r"rqvaesiglip\.quantizer\.codebooks\.[1-9]\d*\.weight"] if vision.shared_codebook else []),  # copies of the first
    ]
