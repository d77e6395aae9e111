"""Packed weights: the same bits, saved and copied as plain ones, and given back."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hart_infer import HartPipeline, InputError
from hart_infer.engine.packed import PackedLinear, packing_refusal
from hart_infer.models.parts.layers import Linear

CPU = torch.device("cpu")
REFUSED = packing_refusal(CPU, torch.bfloat16)
packs = pytest.mark.skipif(REFUSED is not None, reason=str(REFUSED))


@pytest.fixture
def own(hart_tiny: Path, text_tiny: Path) -> HartPipeline:
    pipe = HartPipeline.from_pretrained(hart_tiny, text_encoder=text_tiny, torch_dtype=torch.bfloat16, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe: HartPipeline) -> Tensor:
    latents: Tensor = pipe(["a cat", "b"], seed=3, output_type="latent").images
    return latents


def packed_parts(pipe: HartPipeline) -> int:
    return sum(isinstance(part, PackedLinear) for part in pipe.transformer.modules())


@packs
@pytest.mark.parametrize("rows", [1, 2, 7, 300, 600])
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_map_is_the_plain_one_bit_for_bit(rows: int, bias: bool) -> None:
    torch.manual_seed(rows)
    linear, x = Linear(96, 200, bias=bias).bfloat16().requires_grad_(False), torch.randn(2, rows, 96).bfloat16()
    packed = PackedLinear(linear)
    assert torch.equal(packed(x), linear(x))
    assert torch.equal(packed.weight, linear.weight)
    back = packed.unpacked()
    assert type(back) is Linear and torch.equal(back(x), linear(x)) and (back.bias is None) == (not bias)


@packs
def test_pictures_are_the_same_and_the_weights_come_back(own: HartPipeline) -> None:
    expected, before = drawn(own), {name: value.clone() for name, value in own.transformer.state_dict().items()}
    described = own.describe()
    own.enable_packed_weights()
    assert packed_parts(own) > 4 * own.transformer.depth
    assert torch.equal(drawn(own), expected)
    assert own.describe().replace(", packed", "") == described and ", packed" in own.describe()
    state = own.transformer.state_dict()
    assert state.keys() == before.keys() and all(torch.equal(state[name], value) for name, value in before.items())
    own.disable_packed_weights()
    assert packed_parts(own) == 0
    assert torch.equal(drawn(own), expected)
    assert {name for name, _ in own.transformer.named_parameters()} <= before.keys()


@packs
def test_what_is_packed_is_saved_copied_and_cast(own: HartPipeline, tmp_path: Path) -> None:
    expected = drawn(own)
    own.enable_packed_weights()
    own.save_pretrained(tmp_path / "saved")
    again = HartPipeline.from_pretrained(tmp_path / "saved", device="cpu")
    again.set_progress_bar_config(disable=True)
    for other in (again, copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
        assert torch.equal(drawn(other), expected)
    with pytest.raises(InputError, match=r"can't be moved or cast; call disable_packed_weights\(\)"):
        own.transformer.float()
    own.to(torch.float32)
    assert packed_parts(own) == 0 and own.transformer.dtype == torch.float32
    drawn(own)


@packs
def test_new_weights_are_not_mistaken_for_packed_ones(own: HartPipeline) -> None:
    own.enable_packed_weights()
    drawn(own)
    own.disable_packed_weights()
    with torch.no_grad():
        own.transformer.blocks[0].attn.qkv.weight.mul_(1.5)
    changed = drawn(own)
    own.enable_packed_weights()
    assert torch.equal(drawn(own), changed)


def test_where_there_is_nothing_to_gain_it_is_refused(pipe: HartPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="can't help here: it is for bfloat16 on a CPU, and this is float32 on cpu"):
        pipe.enable_packed_weights()
    assert packing_refusal(torch.device("cuda"), torch.bfloat16) is not None
    monkeypatch.setattr("hart_infer.engine.packed.instructions", frozenset)
    assert packing_refusal(CPU, torch.bfloat16) == "this CPU does not multiply in bfloat16"
