"""Read the configurations of a released VILA-U checkpoint: one JSON file a part, nested, with many keys that do nothing.

A key whose value is null is absent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from ..models.llama import LlamaConfig
from ..models.parts.checks import require, require_one_of, require_positive
from ..models.vila_u.depth import DepthConfig
from ..models.vila_u.projector import projector_layers
from ..models.vila_u.siglip import SiglipConfig
from ..models.vila_u.vision import VisionConfig
from .configs import BOOKKEEPING, MAX_GUIDANCE, ConfigT, Keys, config_from_dict
from .llama import LLAMA_KEYS, read_decoder

Values = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a checkpoint says of prompts and pictures, by the released names."""

    tokenizer_model_max_length: int  # positions of a prompt, pictures included
    image_aspect_ratio: str = "resize"  # how a picture is made square: "resize" or "pad"
    num_video_frames: int = 8
    mm_use_vi_start_end: bool = True  # the tokenizer has <vi_start> and <vi_end>

    def __post_init__(self) -> None:
        """Raise ConfigError for values that nothing here computes."""
        require_one_of(self, image_aspect_ratio=("resize", "pad"))
        require_positive(self, num_video_frames=2**10, tokenizer_model_max_length=2**24)


@dataclass(frozen=True, kw_only=True)
class AnswerDefaults:
    """How text is drawn unless a call says otherwise: `generation_config.json`, by its names; without the file, Llama-2's."""

    do_sample: bool = True
    temperature: float = 0.6
    top_k: int = 50  # 0: all
    top_p: float = 0.9
    max_length: int = 4096  # tokens of an answer, counting a BOS that is never fed
    max_new_tokens: int = 0  # 0: as `max_length` says
    eos_token_id: tuple[int, ...] = (2,)

    def __post_init__(self) -> None:
        """Raise ConfigError for values that no call accepts."""
        require_positive(self, temperature=1e6, max_length=2**24)
        require(0 < self.top_p <= 1, f"top_p must be above 0 and at most 1, not {self.top_p}.")
        require(self.top_k >= 0, f"top_k must be 0 or more, not {self.top_k}.")
        require(self.max_new_tokens >= 0, f"max_new_tokens must be 0 or more, not {self.max_new_tokens}.")


@dataclass(frozen=True, kw_only=True)
class VilaUDefaults:
    """Default arguments of drawing: `defaults` in `model_index.json`, else those of the released code."""

    guidance_scale: float = 3.0
    top_k: int = 900
    top_p: float = 0.96

    def __post_init__(self) -> None:
        """Raise ConfigError for values that no call accepts."""
        guidance = self.guidance_scale
        require(0 <= guidance <= MAX_GUIDANCE, f"guidance_scale must be from 0 to {MAX_GUIDANCE:g}, not {guidance}.")
        require(self.top_k >= 0, f"top_k must be 0 or more, not {self.top_k}.")
        require(0 <= self.top_p <= 1, f"top_p must be from 0 to 1, not {self.top_p}.")


_TRAINING = frozenset(
    """
    model_dtype resume_path llm_cfg vision_tower_cfg mm_projector_cfg hidden_size mm_hidden_size mm_use_im_patch_token
    tune_language_model tune_vision_tower tune_mm_projector language_model_lr vision_tower_lr mm_projector_lr vision_resolution
    interpolate_mode drop_path_rate mm_vision_select_layer mm_vision_select_feature mm_projector vision_tower version
    freeze_backbone tokenizer_padding_side tokenizer_model_max_length model_max_length use_cache
    """.split()
)
ROOT_KEYS = Keys(fixed={"model_type": ("vila_u_llama",), "mm_use_im_start_end": (True,)}, ignored=BOOKKEEPING | _TRAINING)
SIGLIP_KEYS = Keys(
    fixed={"hidden_act": ("gelu_pytorch_tanh",), "layer_norm_eps": (1e-6,), "num_channels": (3,)},
    ignored=BOOKKEEPING | {"attention_dropout", "model_type", "vision_use_head"},
)
TOWER_KEYS = Keys(
    fixed={"model_type": ("rqvaesigliptransformer_model",)},
    ignored=BOOKKEEPING | {"hidden_size", "rqvaesiglip", "rqtransformer"},
)
QUANTIZER_KEYS = Keys(
    fixed={"bottleneck_type": ("rq",)},
    ignored=BOOKKEEPING
    | frozenset(
        """
        model_type ddconfig hidden_size loss_type checkpointing ckpt_path ignore_keys decay latent_loss_weight
        restart_unused_codes
        """.split()
    ),
)
DECODER_KEYS = Keys(
    fixed={
        "out_ch": (3,),
        "attn_type": ("vanilla",),
        "resamp_with_conv": (True,),
        "give_pre_end": (False,),
        "tanh_out": (False,),
        "use_linear_attn": (False,),
    },
    ignored=frozenset({"double_z", "in_channels", "dropout"}),
)
DEPTH_KEYS = Keys(
    fixed={"shared_cls_emb": (True,), "cumsum_depth_ctx": (True,)},
    ignored=BOOKKEEPING | {"model_type", "head", "body", "shared_tok_emb"},
)
HEAD_KEYS = Keys(
    fixed={"gelu": ("v1",), "attn_bias": (True,), "mlp_bias": (True,)},
    ignored=frozenset("block embed_dim attn_pdrop resid_pdrop".split()),
)
PROJECTOR_KEYS = Keys(fixed={"model_type": ("v2l_projector",)}, ignored=BOOKKEEPING)
ANSWER_KEYS = Keys(
    fixed={
        "num_beams": (1,),
        "num_beam_groups": (1,),
        "repetition_penalty": (1.0,),
        "encoder_repetition_penalty": (1.0,),
        "no_repeat_ngram_size": (0,),
        "encoder_no_repeat_ngram_size": (0,),
        "typical_p": (1.0,),
        "min_length": (0,),
        "min_new_tokens": (0,),
        "min_p": (0.0,),
        "epsilon_cutoff": (0.0,),
        "eta_cutoff": (0.0,),
        "penalty_alpha": (0.0,),
        "guidance_scale": (1.0,),
        "renormalize_logits": (False,),
    },
    ignored=frozenset(
        """
        _from_model_config transformers_version bos_token_id pad_token_id use_cache length_penalty early_stopping
        num_return_sequences output_attentions output_hidden_states output_scores return_dict_in_generate cache_implementation
        diversity_penalty decoder_start_token_id
        """.split()
    ),
)


@dataclass(frozen=True, kw_only=True)
class _Quantizer:
    """`rqvaesiglip` of the tower's config."""

    embed_dim: int
    n_embed: tuple[int, ...]
    latent_shape: tuple[int, ...]
    code_shape: tuple[int, ...]
    pretrained_model: str
    shared_codebook: bool = False
    decoder_latent_shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Raise ConfigError for grids that differ, which the released code never ran with."""
        for name in ("latent_shape", "code_shape"):
            shape = getattr(self, name)
            require(len(shape) == 3 and shape[0] == shape[1], f"{name} must be a square grid and a size, not {list(shape)}.")
        grids = self.latent_shape[:2], self.code_shape[:2]
        require(
            grids[0] == grids[1],
            f"latent_shape {list(self.latent_shape)} and code_shape {list(self.code_shape)} have different grids; every "
            "position has its codes.",
        )
        width = self.latent_shape[2]
        require(width == self.embed_dim, f"latent_shape has {width} channels, and embed_dim is {self.embed_dim}.")


@dataclass(frozen=True, kw_only=True)
class _Decoder:
    """`ddconfig`."""

    z_channels: int
    ch: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int
    attn_resolutions: tuple[int, ...]
    resolution: int


@dataclass(frozen=True, kw_only=True)
class _Depth:
    """`rqtransformer`."""

    block_size: tuple[int, ...]
    input_embed_dim_1: int
    input_embed_dim_2: int
    embed_dim: int
    vocab_size: int


@dataclass(frozen=True, kw_only=True)
class _Head:
    """`rqtransformer.head`, with `n_head` of its `block`."""

    n_layer: int
    n_head: int


@dataclass(frozen=True)
class Reader:
    """Reads the parts of one checkpoint; `strict` refuses unknown keys, of which there is else one warning a part."""

    name: str
    strict: bool = False

    def llama(self, values: Values) -> LlamaConfig:
        """Read `llm/config.json`, of any version of transformers."""
        return read_decoder(values, LLAMA_KEYS, origin=f"{self.name}: llm/config.json", strict=self.strict)

    def projector(self, values: Values) -> str:
        """Read `mm_projector/config.json`: the released `mm_projector_type`."""
        return self._read(_Projector, present(values), PROJECTOR_KEYS, "mm_projector/config.json").mm_projector_type

    def settings(self, root: Values, llm: Values) -> Settings:
        """Read `config.json`, and the longest prompt from the Llama's."""
        for part in ("llm", "vision_tower", "mm_projector"):
            named = root.get(f"{part}_cfg")
            self._require(
                not isinstance(named, str) or named.strip("./") == part,
                f"config.json: {part}_cfg names another checkpoint, {named!r}; copy it into {part}/ and write {part!r} there.",
            )
        root, llm = present(root), present(llm)
        length = llm.get("tokenizer_model_max_length", llm.get("model_max_length", llm.get("max_position_embeddings", 2048)))
        return self._read(Settings, {**root, "tokenizer_model_max_length": length}, ROOT_KEYS, "config.json")

    def siglip_name(self, tower: Values) -> str:
        """Return the id or folder that `vision_tower/config.json` names for SigLIP's sizes."""
        return self._quantizer(tower).pretrained_model

    def siglip(self, values: Values, origin: str) -> SiglipConfig:
        """Read a SigLIP's `config.json`, whole or of its vision half."""
        vision = values.get("vision_config", values)
        self._require(isinstance(vision, dict), f"{origin}: vision_config must be an object.")
        return self._read(SiglipConfig, _SIGLIP_DEFAULTS | present(vision), SIGLIP_KEYS, origin)

    def tower(self, values: Values, siglip: SiglipConfig) -> tuple[VisionConfig, DepthConfig]:
        """Read `vision_tower/config.json`: the tower and the depth transformer."""
        origin = "vision_tower/config.json"
        self._read(_Nothing, values, TOWER_KEYS, origin)
        quantizer = self._quantizer(values)
        nested = self._object(values, "rqvaesiglip", origin)
        decoder_values = present(self._object(nested, "ddconfig", f"{origin}: rqvaesiglip"))
        decoder = self._read(_Decoder, decoder_values, DECODER_KEYS, f"{origin}: rqvaesiglip.ddconfig")
        grid, depth = quantizer.code_shape[0], quantizer.code_shape[2]
        self._require(
            siglip.grid == grid,
            f"{origin}: the tower makes {siglip.grid} x {siglip.grid} positions of a picture of {siglip.image_size} pixels, in "
            f"patches of {siglip.patch_size}, and code_shape has {grid} x {grid}.",
        )
        self._require(
            siglip.hidden_size == quantizer.embed_dim,
            f"{origin}: SigLIP's hidden_size is {siglip.hidden_size}, and embed_dim {quantizer.embed_dim}.",
        )
        try:
            vision = VisionConfig(
                **vars(siglip),
                **vars(decoder),
                n_embed=quantizer.n_embed,
                depth=depth,
                shared_codebook=quantizer.shared_codebook,
                decoder_latent_shape=quantizer.decoder_latent_shape,
            )
        except ConfigError as error:
            raise ConfigError(f"{self.name}: {origin}: {error}") from error
        return vision, self._depth(values, quantizer.code_shape)

    def _depth(self, tower: Values, code_shape: tuple[int, ...]) -> DepthConfig:
        at = "vision_tower/config.json: rqtransformer"
        values = self._object(tower, "rqtransformer", "vision_tower/config.json")
        read = self._read(_Depth, present(values), DEPTH_KEYS, at)
        head = self._object(values, "head", at)
        block = self._object(head, "block", f"{at}.head")
        heads = self._read(_Head, present({**block, **head}), HEAD_KEYS, f"{at}.head")
        self._require(
            read.block_size == code_shape,
            f"{at}.block_size {list(read.block_size)} is not rqvaesiglip's code_shape {list(code_shape)}.",
        )
        try:
            return DepthConfig(
                num_slots=read.block_size[2],
                code_dim=read.input_embed_dim_1,
                hidden_size=read.input_embed_dim_2,
                embed_dim=read.embed_dim,
                num_layers=heads.n_layer,
                num_heads=heads.n_head,
                vocab_size=read.vocab_size,
            )
        except ConfigError as error:
            raise ConfigError(f"{self.name}: {at}: {error}") from error

    def _quantizer(self, tower: Values) -> _Quantizer:
        at = "vision_tower/config.json: rqvaesiglip"
        values = present(self._object(tower, "rqvaesiglip", "vision_tower/config.json"))
        if isinstance(values.get("n_embed"), int):
            values["n_embed"] = [values["n_embed"]]
        return self._read(_Quantizer, values, QUANTIZER_KEYS, at)

    def answers(self, values: Values) -> AnswerDefaults:
        """Read `llm/generation_config.json`; absent keys mean what transformers takes them for, but a limit of 20 tokens."""
        values = present(values)
        if isinstance(values.get("eos_token_id"), int):
            values["eos_token_id"] = [values["eos_token_id"]]
        absent = {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0}
        return self._read(AnswerDefaults, absent | values, ANSWER_KEYS, "llm/generation_config.json")

    def _object(self, values: Values, key: str, at: str) -> Values:
        found = values.get(key)
        if not isinstance(found, dict):
            raise ConfigError(f"{self.name}: {at}: {key} must be an object, not {found!r}.")
        return found

    def _read(self, kind: type[ConfigT], values: Values, keys: Keys, at: str) -> ConfigT:
        return config_from_dict(kind, values, keys, origin=f"{self.name}: {at}", strict=self.strict)

    def _require(self, condition: bool, message: str) -> None:
        require(condition, f"{self.name}: {message}")


def present(values: Values) -> dict[str, Any]:
    """Return the keys whose values are not null."""
    return {key: value for key, value in values.items() if value is not None}


@dataclass(frozen=True)
class _Nothing:
    """What is read of an object whose keys are checked only."""


@dataclass(frozen=True, kw_only=True)
class _Projector:
    """`mm_projector/config.json`."""

    mm_projector_type: str

    def __post_init__(self) -> None:
        """Raise ConfigError for an unknown kind."""
        projector_layers(self.mm_projector_type)


# What transformers takes for keys that SigLIP's vision_config lacks.
_SIGLIP_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
}
