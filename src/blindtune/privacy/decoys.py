"""Decoys: label-independent variance that hides the small label direction in an adapter's shift.

Everything in a shift h(x, θ_i) − h(x, 0) was put there by training, so without care its largest direction is the
label. A decoy makes each adapter also write functions of the *text* that have nothing to do with the labels into a
few secret directions, with more variance than the label direction has. The functions are random combinations of
the leading principal components of the frozen features, orthogonal to the difference of the class means. They grow over
the run, so that the shift between any two checkpoints is dominated by them too. The client knows the directions and
removes them from the mixed output before its head reads it.

The functions are pushed through a tanh, so that their distributions are more two-humped than the label direction's:
an attacker who looks for the direction that separates the texts into two groups finds a decoy.

Some decoys are shared: all adapters write the same function, each in a direction of its own. Otherwise the label would
be the only thing that the adapters have in common, and canonical correlation of two shifts would find it.

This is ours, not the paper's. It hides the label from attacks on the largest direction of variance (spectral, k-means,
norm), on the most two-humped one, and on what adapters have in common. It does not remove the label from smaller
directions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from blindtune.privacy.randomness import SecureGenerator


@dataclass(frozen=True)
class Decoys:
    """k decoy functions for each of n adapters.

    Attributes:
        directions: secret orthonormal directions, `(n, d, k)`.
        mean, scale: of the frozen features, `(d,)`; what `remove` and `distance` standardise with.
        readout: `(n, d, k)`: the functions are F_i(x) = gain_i tanh(saturation · (h(x, 0) − mean) readout_i), of unit
            variance; without the tanh where saturation is 0.
        saturation: a scalar.
        gain: `(n, k)`.
        spread: total standard deviation of the frozen features, the unit of amplitudes.
    """

    directions: Tensor
    mean: Tensor
    scale: Tensor
    readout: Tensor
    saturation: Tensor
    gain: Tensor
    spread: Tensor

    def targets(self, frozen: Tensor) -> Tensor:
        """F_i(x) for frozen features `(B, d)`: `(n, B, k)`."""
        return self.gain.unsqueeze(1) * _saturate(
            torch.einsum("bd,ndk->nbk", frozen - self.mean, self.readout), self.saturation
        )

    def penalty(self, shifts: Tensor, frozen: Tensor, amplitude: float) -> Tensor:
        """Mean squared distance of the shifts' decoy coordinates from amplitude · F_i(x).

        Args:
            shifts: `(n, B, d)`.
            amplitude: wanted standard deviation of all k decoys together, in units of `spread`.
        Returns:
            A scalar, differentiable in the shifts.
        """
        k = self.directions.shape[-1]
        coordinates = torch.einsum("nbd,ndk->nbk", shifts, self.directions) * (math.sqrt(k) / self.spread)
        return (coordinates - amplitude * self.targets(frozen)).pow(2).mean()

    def remove(self, mixed: Tensor, weights: Tensor) -> Tensor:
        """The mixed output `(B, d)` without what decoys put there: projected off all W_i ⊙ r_ik."""
        spanned = (weights / self.scale).unsqueeze(-1) * self.directions  # (n, d, k), in standardised coordinates
        basis = torch.linalg.qr(spanned.permute(1, 0, 2).flatten(1)).Q  # (d, n k)
        standard = (mixed - self.mean) / self.scale
        return self.mean + self.scale * (standard - (standard @ basis) @ basis.T)

    def distance(self, features: Tensor, reference: Tensor) -> Tensor:
        """Mean squared distance of features `(B, d)` from others, in standard deviations of the frozen features."""
        return ((features - reference) / self.scale).pow(2).mean()

    def state(self) -> dict[str, Tensor]:
        return {
            "directions": self.directions,
            "mean": self.mean,
            "scale": self.scale,
            "readout": self.readout,
            "saturation": self.saturation,
            "gain": self.gain,
            "spread": self.spread,
        }


def decoy_functions(n: int, k: int, shared: int) -> int:
    """Different functions among k decoys of each of n adapters."""
    return shared + n * (k - shared)


def draw_decoys(
    frozen: Tensor,
    labels: Tensor,
    n: int,
    k: int,
    *,
    shared: int = 2,
    saturation: float = 1.5,
    components: int = 10,
    generator: SecureGenerator,
) -> Decoys:
    """Random decoys for features `(N, d)` with class indices `(N,)`.

    Args:
        n, k: adapters, and decoys for each of them.
        shared: how many of the k functions are the same for all adapters.
        saturation: factor inside the tanh, for a function of unit variance; 0 for linear functions.
        components: principal components of the features that decoys are functions of.
    Raises:
        ValueError: fewer principal components than decoys and classes need.
    """
    mean = frozen.mean(0)
    centred = (frozen - mean).double()
    components = min(components, *centred.shape)
    _, singular, directions = torch.linalg.svd(centred, full_matrices=False)
    components = min(components, int((singular > 1e-6 * singular[0]).sum()))
    whiten = directions[:components].T * (math.sqrt(len(frozen)) / singular[:components])  # (d, c)
    white = centred @ whiten  # (N, c), unit variance
    means = torch.stack([white[labels == label].mean(0) for label in labels.unique()])
    between = (means - means.mean(0)).T  # (c, K), rank K - 1
    needed = decoy_functions(n, k, shared)
    if components < between.shape[1] - 1 + needed:
        raise ValueError(f"{needed} decoys and {between.shape[1]} classes need more than {components} components.")
    label_basis = torch.linalg.svd(between, full_matrices=False)[0][:, : between.shape[1] - 1]
    random = generator.normal(components, needed)
    combinations = torch.linalg.qr(torch.cat([label_basis, random], dim=1)).Q[:, label_basis.shape[1] :]
    functions = whiten @ combinations  # (d, needed): the shared ones, then each adapter's own
    own = functions[:, shared:].reshape(len(functions), n, k - shared).transpose(0, 1)
    readout = torch.cat([functions[:, :shared].expand(n, -1, -1), own], dim=2)  # (n, d, k)
    secret = torch.linalg.qr(generator.normal(n, frozen.shape[1], k)).Q
    spread = centred.pow(2).sum(1).mean().sqrt()
    deviation = centred.std(0)
    scale = deviation.clamp_min(0.2 * float(deviation.median())).float()  # a dead dimension must not explode
    within = torch.tensor(saturation)
    values = _saturate(torch.einsum("bd,ndk->nbk", centred, readout), within)
    return Decoys(
        directions=secret.float(),
        mean=mean,
        scale=scale,
        readout=readout.float().contiguous(),
        saturation=within,
        gain=(1 / values.std(1)).float(),
        spread=spread.float(),
    )


def _saturate(values: Tensor, saturation: Tensor) -> Tensor:
    return torch.tanh(saturation * values) if float(saturation) > 0 else values
