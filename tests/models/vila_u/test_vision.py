"""VILA-U's vision tower: what the recorded data can't catch."""

from __future__ import annotations

import math
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hart_infer.errors import ConfigError
from hart_infer.models.parts.autoencoder import AttentionBlock
from hart_infer.models.vila_u.siglip import SIGLIP_CONFIGS
from hart_infer.models.vila_u.vision import ResidualQuantizer, VisionConfig, VisionTower

CONFIG = VisionConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    image_size=20,
    patch_size=6,  # 2 pixels are left over
    n_embed=(40,),
    depth=4,
    z_channels=16,
    ch=32,
    ch_mult=(1, 1, 2),
    num_res_blocks=1,
    attn_resolutions=(3,),
    resolution=12,
)
RELEASED_DECODER = {"ch": 128, "ch_mult": (1, 1, 2, 2, 4), "num_res_blocks": 2, "attn_resolutions": (16,), "resolution": 256}


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def build(config: VisionConfig, dtype: torch.dtype = torch.float32) -> VisionTower:
    torch.manual_seed(0)
    return VisionTower(config).to(dtype).eval()


def quantizer_of(*codebooks: Tensor, depth: int | None = None) -> ResidualQuantizer:
    """A quantizer of these codebooks [K, C], one for all depths if `depth` is given, and padding rows of zeros."""
    sizes = [len(codebook) for codebook in codebooks] * (depth or 1)
    quantizer = ResidualQuantizer(sizes, codebooks[0].shape[1], shared=depth is not None)
    for module, codebook in zip(quantizer.codebooks, codebooks, strict=True):
        module.weight.data = torch.cat([codebook, torch.zeros_like(codebook[:1])])
    return quantizer


def random_pixels(config: VisionConfig = CONFIG, batch: int = 2) -> Tensor:
    size = config.image_size
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def random_codes(config: VisionConfig) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    each = [torch.randint(size, (2, config.grid, config.grid), generator=generator) for size in config.vocab_sizes]
    return torch.stack(each, dim=-1)


# --- the encoder


def layer_norm(x: Tensor, weights: dict[str, Tensor], name: str, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return normed * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def plain_encoder(tower: VisionTower, pixels: Tensor, eps: float) -> Tensor:
    """The page's SigLIP once more, plainly, in fp64, with the layers that the tower holds."""
    weights = {name: tensor.double() for name, tensor in tower.encoder.state_dict().items()}
    patch, heads = tower.config.patch_size, tower.config.num_attention_heads

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    patches = pixels.double().unfold(2, patch, patch).unfold(3, patch, patch)  # [B, 3, g, g, patch, patch]
    x = torch.einsum("bcyxij,ocij->byxo", patches, weights["patch_embed.weight"]) + weights["patch_embed.bias"]
    x = x.flatten(1, 2) + weights["position_embed.weight"]
    for i in range(tower.config.num_hidden_layers - 1):
        name = f"layers.{i}"
        qkv = linear(layer_norm(x, weights, f"{name}.norm1", eps), f"{name}.attn.qkv")
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
        attended = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v
        x = x + linear(attended.transpose(1, 2).flatten(2), f"{name}.attn.proj")
        inner = linear(layer_norm(x, weights, f"{name}.norm2", eps), f"{name}.mlp.fc1")
        gelu = 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
        x = x + linear(gelu, f"{name}.mlp.fc2")
    return x


def small_encoder() -> VisionTower:
    """A tower whose patches and positions are so small that the eps of the first norm counts."""
    tower = build(CONFIG)
    for parameter in (*tower.encoder.patch_embed.parameters(), *tower.encoder.position_embed.parameters()):
        parameter.mul_(1e-3)
    return tower


def test_layer_norms_have_an_eps_of_1e_6():
    tower = small_encoder()
    hidden = tower.hidden(random_pixels()).flatten(1, 2).double()
    torch.testing.assert_close(hidden, plain_encoder(tower, random_pixels(), 1e-6), rtol=1e-4, atol=1e-6)
    for other in (1e-5, 1e-7):
        assert (hidden - plain_encoder(tower, random_pixels(), other)).abs().max() > 1e-3 * hidden.abs().max()


def test_the_last_layer_is_not_built():
    assert len(build(CONFIG).encoder.layers) == CONFIG.num_hidden_layers - 1


def test_pixels_that_fill_no_patch_are_left_out():
    tower, pixels = build(CONFIG), random_pixels()
    changed = pixels.clone()
    changed[..., 18:] = 0
    changed[..., 18:, :] = 0
    assert torch.equal(tower.hidden(changed), tower.hidden(pixels))
    assert tower.hidden(pixels).shape == (2, 3, 3, 32)


# --- the quantizer


def test_the_padding_row_is_never_a_code():
    """Where the row behind the last code is the nearest by far."""
    quantizer = quantizer_of(torch.eye(6) * 100, depth=3)
    target = torch.full((1, 2, 2, 6), 0.25)
    quantizer.codebooks[0].weight.data[6] = target[0, 0, 0]
    assert (quantizer.encode(target) < 6).all()
    with pytest.raises(IndexError):
        quantizer.rows(torch.tensor([6]), 0)


def test_of_equally_near_codes_the_first_wins():
    """Small integers, so that distances are exact: equal rows, and different rows equally far."""
    codebook = torch.tensor([[9.0, 9.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [-1.0, 0.0]])
    hidden = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]], [[1.0, 1.0], [-1.0, 1.0]]]])
    assert quantizer_of(codebook).encode(hidden)[..., 0].tolist() == [[[1, 1], [1, 2]]]


def test_each_depth_codes_what_the_ones_before_left():
    quantizer = quantizer_of(torch.randn(40, 8, generator=torch.Generator().manual_seed(0)), depth=5)
    hidden = torch.randn(2, 3, 3, 8, generator=torch.Generator().manual_seed(1))
    codes = quantizer.encode(hidden)
    rest = hidden.double()
    for depth in range(5):
        rows = quantizer.codebook(depth).double()
        assert torch.equal(codes[..., depth], torch.cdist(rest.flatten(0, 2), rows).argmin(-1).view(2, 3, 3))
        rest = rest - rows[codes[..., depth]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_residuals_are_fp32_in_half_precision(dtype):
    """Rounded to bf16 after each depth, as released, they lead to other codes now and then."""
    tower = build(replace(CONFIG, n_embed=(200,), depth=8), dtype)
    hidden = torch.randn(4, 3, 3, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    codes = tower.quantizer.encode(hidden)
    rest, rounded, differ = hidden.double(), hidden, 0
    rows = tower.quantizer.codebook(0).double()
    for depth in range(8):
        nearest = torch.cdist(rest.flatten(0, 2), rows).argmin(-1).view(4, 3, 3)
        assert torch.equal(codes[..., depth], nearest)
        rest = rest - rows[nearest]
        nearest = torch.cdist(rounded.double().flatten(0, 2), rows).argmin(-1).view(4, 3, 3)
        differ += int((nearest != codes[..., depth]).sum())
        rounded = rounded - rows[nearest].to(dtype)
    assert dtype == torch.float16 or differ > 0


def test_each_depth_has_its_own_number_of_codes():
    config = replace(CONFIG, n_embed=(40, 7, 12, 3), shared_codebook=False)
    tower = build(config)
    assert [len(codebook.weight) for codebook in tower.quantizer.codebooks] == [41, 8, 13, 4]
    codes, features = tower.encode(random_pixels())
    assert [int(codes[..., depth].max()) < size for depth, size in enumerate(config.vocab_sizes)] == [True] * 4
    expected = sum(tower.quantizer.codebooks[depth].weight[codes[..., depth]] for depth in range(4))
    torch.testing.assert_close(features, expected)


def test_a_picture_s_codes_do_not_depend_on_its_batch():
    quantizer = quantizer_of(torch.randn(40, 8), depth=5)
    hidden = torch.randn(3, 5, 5, 8)
    assert torch.equal(quantizer.encode(hidden)[1:2], quantizer.encode(hidden[1:2]))


# --- the decoder


def attentions(tower: VisionTower) -> list[str]:
    return [name for name, module in tower.decoder.named_children() if isinstance(module, AttentionBlock)]


@pytest.mark.parametrize("latent", [(), (6, 6), (12, 12)])
def test_attention_goes_by_the_nominal_side(latent):
    """By the sides 3, 6, 12 that `resolution` 12 gives the levels 2, 1, 0, whatever the latent's are."""
    tower = build(replace(CONFIG, decoder_latent_shape=latent))
    assert attentions(tower) == ["mid_attn_1", "up_2_attn_0", "up_2_attn_1"]
    tower = build(replace(CONFIG, decoder_latent_shape=latent, attn_resolutions=(6, 24)))
    assert attentions(tower) == ["mid_attn_1", "up_1_attn_0", "up_1_attn_1"]
    assert attentions(build(replace(CONFIG, attn_resolutions=()))) == ["mid_attn_1"]
    side = (latent or (3,))[0] * 4
    assert tower.decode(torch.randn(2, 3, 3, 32)).shape == (2, 3, side, side)
    assert tower.config.picture_shape == (side, side)


def test_a_latent_of_the_released_384_tower_keeps_the_lowest_level_s_attention():
    siglip = asdict(SIGLIP_CONFIGS["google/siglip-so400m-patch14-384"])
    config = VisionConfig(**siglip, **RELEASED_DECODER, n_embed=(16384,), depth=16, decoder_latent_shape=(24, 24))
    assert (config.code_shape, config.picture_shape, config.attention_levels) == ((27, 27, 16), (384, 384), (4,))


def test_features_are_resized_before_the_first_convolution():
    """Bilinearly, corners not aligned, without antialiasing: against the weights of the two nearest cells."""
    tower = build(replace(CONFIG, decoder_latent_shape=(2, 2)))
    features = torch.randn(1, 3, 3, 32)
    centres = torch.tensor([[0.75, 0.25, 0.0], [0.0, 0.25, 0.75]])  # cells 0.25 and 1.75
    resized = torch.einsum("yi,xj,bijc->bcyx", centres, centres, features)
    pixels = tower.decoder(tower.post_quant_conv(resized))
    torch.testing.assert_close(tower.decode(features), pixels, rtol=1e-4, atol=1e-5)


def test_pixels_are_not_clamped():
    tower = build(CONFIG)
    tower.decoder.conv_out.bias.data.fill_(7)
    assert tower.decode(torch.randn(1, 3, 3, 32)).min() > 1


def test_bf16_is_near_fp32():
    tower = build(CONFIG)
    features = torch.randn(2, 3, 3, 32, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    exact, hidden = tower.decode(features), tower.hidden(random_pixels())
    tower.bfloat16()
    pixels, rounded = tower.decode(features.bfloat16()), tower.hidden(random_pixels())
    assert (pixels.dtype, rounded.dtype) == (torch.float32, torch.bfloat16)
    codes, embedded = tower.encode(random_pixels())
    assert (codes.dtype, embedded.dtype) == (torch.int64, torch.bfloat16)
    for ours, theirs in ((pixels, exact), (rounded.float(), hidden)):
        assert (ours - theirs).square().mean() <= 0.03**2 * theirs.square().mean()


# --- sizes


def test_released_sizes():
    """Of the 256 tower, in millions: as vila-u.md counts what inference uses."""
    config = VisionConfig(
        **asdict(SIGLIP_CONFIGS["google/siglip-large-patch16-256"]), **RELEASED_DECODER, n_embed=(16384,), depth=4
    )
    assert (config.code_shape, config.picture_shape) == ((16, 16, 4), (256, 256))
    with torch.device("meta"):
        tower = VisionTower(config)
    counts = [
        sum(parameter.numel() for parameter in module.parameters()) / 1e6
        for module in (tower.encoder, tower.quantizer, tower.decoder)
    ]
    assert [round(count, 1) for count in counts] == [pytest.approx(291, abs=1), 16.8, pytest.approx(42, abs=1)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 5}, "hidden_size 32 must split into num_attention_heads 5"),
        ({"image_size": 5}, "image_size 5 must hold 1 to"),
        ({"image_size": 2**14, "patch_size": 1}, "image_size 16384 must hold 1 to"),
        ({"hidden_size": 0}, "hidden_size must be positive"),
        ({"depth": 10**6}, "depth must be at most 64"),
        ({"n_embed": (40, 40, 40, 40)}, "n_embed must have one entry, as shared_codebook is set, not 4"),
        ({"n_embed": (40, 40), "shared_codebook": False}, "n_embed must have one entry or depth 4, not 2"),
        ({"n_embed": (0,)}, "n_embed must have entries from 1 to"),
        ({"n_embed": ()}, "n_embed must have one entry"),
        ({"n_embed": (2**40,)}, "n_embed must have entries from 1 to"),
        ({"decoder_latent_shape": (4,)}, "decoder_latent_shape must be a height and a width"),
        ({"decoder_latent_shape": (4, 0)}, "decoder_latent_shape must have entries from 1"),
        ({"ch_mult": ()}, "ch_mult must have 1 to 8 entries"),
        ({"ch_mult": (1, 65)}, "ch_mult must have entries from 1 to 64"),
        ({"ch": 48}, "ch must be a multiple of 32"),
        ({"resolution": 14}, "resolution must be a multiple of 4, not 14"),
        ({"attn_resolutions": (0,)}, "attn_resolutions must have entries from 1"),
        ({"attn_resolutions": (1,) * 65}, "attn_resolutions must have at most 64 entries"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        replace(CONFIG, **change)
