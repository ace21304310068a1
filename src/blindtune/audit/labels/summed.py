"""Sums gradients over adapters, which undoes the mixing of adapters.

∂L/∂h_i = W_i ⊙ ∂L/∂h' (P3EFT, eq. 3), and the n weights of a dimension sum to one (eq. 5). So Σ_i ∂L/∂h_i = ∂L/∂h' for
every W.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from blindtune.audit.channel_id import SUMMED, ChannelId, ChannelKind
from blindtune.audit.labels.registry import observes_shares
from blindtune.audit.observe import Features


@observes_shares("sum over adapters", observes="any share", needs=())
def summed(shares: Features) -> dict[ChannelId, NDArray[np.floating]]:
    """Returns the sum `(B, d)` over n ≥ 2 adapters of each of the shares `(m, n, B, d)`."""
    m, n = shares.shape[:2]
    if n < 2:
        return {}
    return {
        ChannelId(ChannelKind.GRADIENT, modifier=SUMMED, share=j if m > 1 else None): share.sum(0)
        for j, share in enumerate(shares)
    }
