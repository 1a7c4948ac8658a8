"""The measure that the contract judges by can tell wrong from right."""

from __future__ import annotations

import math

import pytest
import torch

from tests.comparing import relative_error


def test_relative_error() -> None:
    expected = torch.tensor([3.0, 4.0])
    assert relative_error(expected, expected) == 0
    assert relative_error(torch.tensor([3.0, 4.5]), expected) == pytest.approx(0.1)
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_error(torch.tensor([0.0, 1e-30]), torch.zeros(2)) == math.inf
    assert relative_error(torch.tensor([math.nan, 4.0]), expected) == math.inf
    assert relative_error(expected, torch.tensor([math.nan, 4.0])) == math.inf
    with pytest.raises(AssertionError, match=r"\(2,\) against \(1, 2\)"):
        relative_error(expected, expected.unsqueeze(0))
