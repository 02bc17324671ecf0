"""A matrix gives the same product however it is kept."""

from __future__ import annotations

import pytest
import torch

from model.engine import Core
from model.engine.weights import FEW, Dense, Int8, settle
from tests.tiny_models import transformer


def dense(rows: int = 48, columns: int = 32) -> tuple[torch.Tensor, Dense]:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    return weight, Dense(weight)


@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 7, 40])
def test_both_products_are_the_plain_one(single: bool, rows: int) -> None:
    weight, matrix = dense()
    if matrix.open:
        matrix.settle(single)
    x = torch.randn(rows, 32, generator=torch.Generator().manual_seed(rows))
    y = torch.ones(rows, 48)
    torch.testing.assert_close(matrix(x), x @ weight.T)
    torch.testing.assert_close(matrix.add_to(y, x), 1 + x @ weight.T)


@pytest.mark.parametrize("inputs", [20, 32, 40])  # torch's kernel takes multiples of 16 only
@pytest.mark.parametrize("rows", [1, 5, FEW + 1])
def test_integers_multiply_rows_of_any_length(rows: int, inputs: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(52, inputs, generator=generator)
    x = torch.randn(rows, inputs, generator=generator).bfloat16()
    y = Int8(weight, torch.bfloat16)(x)
    torch.testing.assert_close(y.float(), x.float() @ weight.T, rtol=0.05, atol=0.2)


def test_a_trial_leaves_one_choice_for_all_matrices() -> None:
    matrices = [dense(rows)[1] for rows in (48, 64)]
    settle(matrices)
    (single,) = {matrix.single for matrix in matrices}
    assert all(matrix.transposed.numel() > 0 or not single for matrix in matrices)
    assert all(matrix.packed is not None or single for matrix in matrices)


def test_a_deterministic_engine_chooses_nothing_by_time() -> None:
    runner = Core(transformer(), None, slots=1, deterministic=True).runner
    kept = [matrix for layer in runner.layers for matrix in layer.matrices]
    dense_ones = [matrix for matrix in [*kept, runner.output] if isinstance(matrix, Dense)]
    assert len(dense_ones) == len(kept) + 1
    assert not any(matrix.single and matrix.packed is not None for matrix in dense_ones)
