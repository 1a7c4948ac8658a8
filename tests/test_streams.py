"""Room for collectives beside matrix products: a switch of torch, which is put back."""

from __future__ import annotations

import pytest
import torch

from moe.streams import SPARED_MULTIPROCESSORS, room_for_collectives

carveout = torch._C._get_sm_carveout_experimental


def test_room_is_made_and_given_back() -> None:
    before = carveout()
    with room_for_collectives():
        assert carveout() == SPARED_MULTIPROCESSORS
        with pytest.raises(ValueError, match="inside"), room_for_collectives():
            raise ValueError("inside")
        assert carveout() == SPARED_MULTIPROCESSORS
    assert carveout() == before != SPARED_MULTIPROCESSORS


def test_a_torch_without_the_switch_makes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C, "_set_sm_carveout_experimental")
    with room_for_collectives():
        assert carveout() != SPARED_MULTIPROCESSORS
