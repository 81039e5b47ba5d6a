"""What transformers has fed to one KVCache: columns, which of them were pads, and the forward that is open."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from kvstrata.hf.step import Forward

UNPATCHED = "model is not patched: call kvstrata.patch(model)"


class Feed:
    """The facts that the layers of a cache share.

    columns: padded positions fed so far, one number per cache.
    valid: bool [B, columns] of the CPU, kept once a pad was seen; None while every column was a real token.
    forward: the open forward, or None.
    """

    def __init__(self, set_recording: Callable[[bool], None]) -> None:
        self.columns = 0
        self.valid: torch.Tensor | None = None
        self.forward: Forward | None = None
        self.recording = False
        self.broken = False
        self._set_recording = set_recording

    def note(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Hand k, v [B, H, T, D] of `layer` to the open forward. RuntimeError when none is open."""
        if self.forward is None:
            raise RuntimeError(UNPATCHED)
        return self.forward.note(layer, k, v)

    def touch(self) -> None:
        """A recurrent state changes in this forward: it cannot be rolled back any more."""
        if self.forward is None:
            raise RuntimeError(UNPATCHED)
        self.forward.irreversible = True

    def columns_of(self, layer: int) -> int:
        """Columns as `layer` sees them: the open forward counts once the layer was updated in it."""
        if self.forward is not None and layer in self.forward.noted:
            return self.columns + self.forward.length
        return self.columns

    def record(self, on: bool) -> None:
        """Switch the recording of the past on or off, here and in the core."""
        if on != self.recording:
            self.recording = on
            self._set_recording(on)

    def admit(
        self, mask: torch.Tensor | None, batch: int, length: int, positions: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Check the inputs of a forward of `length` columns; bool [B, T] of its real tokens, of the CPU, None if all are.

        ValueError with expected and actual: no tokens; a mask that is not [B, columns + T]; a mask whose stored
        columns changed; without a mask, positions that do not go on where the cache ends.
        """
        if length == 0:
            raise ValueError(
                f"the forward has no tokens (T = 0) and {self.columns} columns are cached: pass the ids that are not "
                "cached yet with the full-length mask, or all ids; reset() starts anew"
            )
        if mask is None:
            self._check_unmasked(length, positions)
            return None
        expected = (batch, self.columns + length)
        if tuple(mask.shape) != expected:
            raise ValueError(
                f"attention_mask must be [B, cached columns + T] = {list(expected)}, got {list(mask.shape)}: "
                f"{self.columns} columns are cached and {length} are new; reset() starts anew"
            )
        mask = mask.bool().cpu()  # from a device at once: all that follows would wait for it
        self._check_past(mask[:, : self.columns])
        new = mask[:, self.columns :]
        return None if bool(new.all()) else new

    def _check_unmasked(self, length: int, positions: torch.Tensor | None) -> None:
        if self.valid is not None:
            raise ValueError(
                f"the {self.columns} cached columns hold padding: attention_mask [B, {self.columns + length}] is "
                "required, got None"
            )
        if length > 1 and positions is not None and positions.dim() == 2:
            first = positions[:, 0]
            if bool((first != self.columns).any()):
                raise ValueError(
                    f"position_ids must start at the {self.columns} cached columns when there is no attention_mask, "
                    f"got {first.tolist()}; reset() starts anew"
                )

    def _check_past(self, past: torch.Tensor) -> None:
        same = past.all() if self.valid is None else (past == self.valid).all()
        if not bool(same):
            stored = self.columns if self.valid is None else self.valid.sum(1).tolist()
            raise ValueError(
                "attention_mask of the cached columns changed: expected real tokens per row "
                f"{stored}, got {past.sum(1).tolist()}; reset() starts anew"
            )

    def extend(self, new: torch.Tensor | None, batch: int, length: int) -> None:
        """Commit `length` columns with validity `new` (bool [B, T], None: all real)."""
        if new is not None or self.valid is not None:
            old = torch.ones(batch, self.columns, dtype=torch.bool) if self.valid is None else self.valid
            new = torch.ones(batch, length, dtype=torch.bool) if new is None else new
            self.valid = torch.cat([old, new], dim=1)
        self.columns += length

    def real_in_last(self, columns: int, batch: int) -> list[int]:
        """Real tokens of each row among the last `columns` columns."""
        if self.valid is None:
            return [columns] * batch
        return [int(n) for n in self.valid[:, self.columns - columns :].sum(1).tolist()]

    def withdraw(self, columns: int) -> None:
        """Forget the last `columns` columns."""
        self.columns -= columns
        if self.valid is not None:
            self.valid = self.valid[:, : self.columns]

    def select(self, index: list[int]) -> None:
        """Row i continues row index[i]."""
        if self.valid is not None:
            self.valid = self.valid[torch.tensor(index, dtype=torch.long)]

    def clear(self) -> None:
        """Nothing was fed."""
        self.columns, self.valid, self.broken = 0, None, False

    def copy_to(self, other: Feed) -> None:
        """Give another cache's feed these columns."""
        other.columns, other.broken = self.columns, self.broken
        other.valid = None if self.valid is None else self.valid.clone()
        other.record(self.recording)

    def __deepcopy__(self, memo: dict[int, Any]) -> Feed:
        raise TypeError("a feed belongs to one KVCache: copy.deepcopy the cache")
