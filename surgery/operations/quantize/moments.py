"""What the inputs of a matrix are like: the sums over calibration tokens that rounding looks at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Moments:
    """Sums over the rows seen so far: `full` of x x^T [in, in] (None where not wanted), of x [in], and their number."""

    full: Tensor | None
    squares: Tensor
    sums: Tensor
    count: int = 0

    @classmethod
    def empty(cls, inputs: int, device: torch.device, *, full: bool) -> Moments:
        """No row seen."""
        zeros = torch.zeros(inputs, device=device)
        return cls(torch.zeros(inputs, inputs, device=device) if full else None, zeros, zeros.clone())

    def see(self, rows: Tensor) -> None:
        """Add inputs [..., in]."""
        flat = rows.reshape(-1, rows.shape[-1]).float()
        if self.full is not None:
            self.full.addmm_(flat.t(), flat)
        self.squares += torch.linalg.vector_norm(flat, dim=0).square()
        self.sums += flat.sum(0)
        self.count += len(flat)

    @property
    def known(self) -> Tensor:
        """The moments [in, in], or their diagonal [in] where that is all."""
        return self.squares if self.full is None else self.full

    @property
    def mean(self) -> Tensor:
        """The mean input [in]."""
        return self.sums / max(self.count, 1)
