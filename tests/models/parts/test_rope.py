"""The rotary embedding that is not quite a rotation."""

from __future__ import annotations

import math

import pytest
import torch

from hart_infer.models.parts.rope import Table, context_table, image_tables
from hart_infer.ops.rope import rope

DIM = 16
SIDE, LAST_SIDE = 3, 8


def image_table(side: int, *arguments) -> Table:
    return image_tables([side], *arguments)[0]


def test_two_angles_per_pair():
    """Element i < d/2 turns by the row angle, its partner i + d/2 by the column angle, both with frequency i mod d/4."""
    shift = 5
    x = torch.randn(1, 1, SIDE * SIDE, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cos, sin = image_table(SIDE, LAST_SIDE, torch.tensor([shift]), DIM, torch.float64)
    rotated = rope(x, cos, sin)
    half = DIM // 2
    for token in range(SIDE * SIDE):
        row, column = (index / SIDE * LAST_SIDE + shift for index in divmod(token, SIDE))
        for i in range(half):
            frequency = 10000 ** (-4 * (i % (DIM // 4)) / DIM)
            a, b = x[0, 0, token, i], x[0, 0, token, i + half]
            first = a * math.cos(row * frequency) - b * math.sin(row * frequency)
            second = b * math.cos(column * frequency) + a * math.sin(column * frequency)
            # Angles up to 15 in fp32.
            assert rotated[0, 0, token, i] == pytest.approx(first.item(), abs=1e-5)
            assert rotated[0, 0, token, i + half] == pytest.approx(second.item(), abs=1e-5)


def test_it_is_not_a_rotation():
    """Lengths change wherever row and column differ; a kernel that assumes one angle per pair would keep them."""
    x = torch.ones(1, 1, SIDE * SIDE, DIM)
    lengths = rope(x, *image_table(SIDE, LAST_SIDE, torch.tensor([0]), DIM, torch.float32)).norm(dim=-1)[0, 0]
    kept = torch.isclose(lengths, x.norm(dim=-1)[0, 0], rtol=1e-4)
    assert kept.view(SIDE, SIDE).equal(torch.eye(SIDE, dtype=torch.bool))


def test_context_angles_are_one_dimensional():
    """-1, a left-padding position, turns backwards."""
    cos, sin = context_table(torch.tensor([[-1, 0, 7]]), DIM, torch.float64)
    for column, position in enumerate((-1, 0, 7)):
        for i in range(DIM):
            angle = position * 10000 ** (-2 * (i % (DIM // 2)) / DIM)
            assert cos[0, 0, column, i] == pytest.approx(math.cos(angle), abs=1e-6)
            assert sin[0, 0, column, i] == pytest.approx(math.sin(angle), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cos_and_sin_are_rounded_from_fp32(dtype):
    """Angles in half precision would be off by whole turns at the far end of the grid."""
    position = torch.tensor([299])
    exact = image_table(64, 64, position, DIM, torch.float32)
    rounded = image_table(64, 64, position, DIM, dtype)
    for wide, narrow in zip(exact, rounded, strict=True):
        assert narrow.dtype == dtype
        assert narrow.equal(wide.to(dtype))


def test_rows_have_their_own_shift():
    """The guidance halves differ: the unconditional one's last position is 0."""
    both = image_table(SIDE, LAST_SIDE, torch.tensor([9, 0]), DIM, torch.float32)
    for row, position in enumerate((9, 0)):
        alone = image_table(SIDE, LAST_SIDE, torch.tensor([position]), DIM, torch.float32)
        assert all(part[row].equal(single[0]) for part, single in zip(both, alone, strict=True))
    assert not both[0][0].equal(both[0][1])


def test_scales_computed_together_are_what_each_is_alone():
    arguments = (LAST_SIDE, torch.tensor([9, 0]), DIM, torch.bfloat16)
    together = image_tables([1, 2, 3, 8], *arguments)
    assert [cos.shape for cos, _ in together] == [(2, 1, side * side, DIM) for side in (1, 2, 3, 8)]
    for side, (cos, sin) in zip((1, 2, 3, 8), together, strict=True):
        alone = image_table(side, *arguments)
        assert cos.equal(alone[0]) and sin.equal(alone[1])
