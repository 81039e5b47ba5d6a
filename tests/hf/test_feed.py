"""What is fed to a KVCache: a mask on a device is read once per forward."""

from __future__ import annotations

import pytest
import torch

from kvstrata.hf.feed import Feed


class Remote(torch.Tensor):
    """A tensor whose numbers the host waits for: counted where it asks for all, refused where it asks for one."""

    waits = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.cpu:
            cls.waits += 1
            return args[0].as_subclass(torch.Tensor)
        assert func not in (torch.Tensor.__bool__, torch.Tensor.item, torch.Tensor.tolist), f"{func} waits"
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("pads", [0, 2])
def test_a_mask_is_waited_for_once(pads):
    feed = Feed(lambda on: None)
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[1, :pads] = 0
    for step in range(3):
        before = Remote.waits
        given = torch.cat([mask, torch.ones(2, step, dtype=torch.long)], 1)
        length = 5 if step == 0 else 1
        new = feed.admit(given.as_subclass(Remote), 2, length, None)
        assert Remote.waits == before + 1
        assert (new is None) == (step > 0 or pads == 0)
        assert type(new) in (type(None), torch.Tensor)
        feed.extend(new, 2, length)
    assert feed.real_in_last(7, 2) == [7, 7 - pads]
    with pytest.raises(ValueError, match="cached columns changed"):
        feed.admit(torch.zeros(2, 8), 2, 1, None)
