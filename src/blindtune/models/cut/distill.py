"""Distills a trunk into an emulator, on public text (Xiao et al. 2023, Offsite-Tuning).

    tokens ──▶ bottom ──▶ s_A ──▶ emulator ──▶ ŝ_B ──▶ top ──▶ logits
                                  trunk ─────▶ s_B

    loss = cross entropy of the next tokens + 30 · mean ||ŝ_B − s_B||² / ||s_B||²

Only the emulator's blocks are trained; bottom, trunk and top are the pretrained ones.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from blindtune.errors import ConfigError
from blindtune.models import CutModel, FrozenBackbone, Part, Tokens
from blindtune.models.cut.manifest import Losses
from blindtune.models.cut.parts import pack, padding_mask

MSE_WEIGHT = 30.0
CLIP_NORM = 1.0
"""Largest norm of a step's gradient."""
WARMUP = 0.1
"""Fraction of the steps over which the learning rate rises; then it falls along a cosine to a tenth."""


@dataclass(frozen=True)
class DistillStep:
    """The metrics of one optimizer step."""

    step: int
    """The step's number, from 1."""
    loss: float
    lm_loss: float
    """Cross entropy of the next tokens, in nats."""
    mse: float
    """Mean relative squared error at the trunk's output, before it is weighted."""
    tokens: int
    seconds: float


def distill(
    backbone: FrozenBackbone, emulator: Part, batches: Iterable[Tokens], *, steps: int, lr: float
) -> Generator[DistillStep]:
    """Trains the emulator in place with AdamW, on one batch in each step, and freezes it again at the end.

    Args:
        backbone: the cut model from which the emulator was made, on the same device.
        emulator: in float32; the backbone may have another dtype.
        batches: public text, at least as many batches as steps.
        lr: highest learning rate.
    Raises:
        ConfigError: the model isn't cut, there are too few batches, or the loss is no longer finite.
        SequenceTooLong: a batch is longer than the model allows.
    """
    _check_cut(backbone)
    optimizer = torch.optim.AdamW(emulator.parameters(), lr=lr, weight_decay=0.0)
    remaining = iter(batches)
    emulator.requires_grad_(True)
    try:
        for step in range(steps):
            start = time.perf_counter()
            tokens = next(remaining, None)
            if tokens is None:
                raise ConfigError(f"There are batches for {step} of {steps} steps.", remedy="Give more public text.")
            for group in optimizer.param_groups:
                group["lr"] = lr * _schedule(step, steps)
            lm_losses, errors = _losses(backbone, emulator, tokens)
            lm_loss, mse = lm_losses.sum() / max(1, len(lm_losses)), errors.mean()
            loss = lm_loss + MSE_WEIGHT * mse
            if not math.isfinite(loss.item()):
                raise ConfigError(f"The loss of step {step + 1} is {loss.item()}.", remedy="Lower --lr.")
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(emulator.parameters(), CLIP_NORM)
            optimizer.step()
            seconds = time.perf_counter() - start
            count = int(tokens.lengths.sum())
            yield DistillStep(step + 1, loss.item(), lm_loss.item(), mse.item(), count, seconds)
    finally:
        optimizer.zero_grad()
        emulator.requires_grad_(False)


def evaluate(backbone: FrozenBackbone, middle: Part, batches: Iterable[Tokens]) -> Losses:
    """Returns the losses on these batches with `middle` between the pretrained bottom and top.

    Args:
        middle: an emulator, or the trunk itself for the losses of the full model.
    Raises:
        ConfigError: the model isn't cut, or there is no token to predict.
    """
    lm_sum = mse_sum = 0.0
    predicted = rows = 0
    with torch.no_grad():
        for tokens in batches:
            lm_losses, errors = _losses(backbone, middle, tokens)
            lm_sum, predicted = lm_sum + float(lm_losses.double().sum()), predicted + len(lm_losses)
            mse_sum, rows = mse_sum + float(errors.double().sum()), rows + len(errors)
    if not predicted:
        raise ConfigError("There is no token to predict in the held-out text.", remedy="Give more public text.")
    return Losses(lm_loss=lm_sum / predicted, mse=mse_sum / rows)


def _losses(backbone: FrozenBackbone, middle: Part, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Returns the next tokens' cross entropies `(N − B,)` and relative squared errors at the trunk's output `(N,)`."""
    cut_model = _check_cut(backbone)
    backbone.check_tokens(tokens)
    bottom, trunk, top = (cut_model.parts[name] for name in ("bottom", "trunk", "top"))
    parameter = next(trunk.parameters())
    ids, lengths = tokens.input_ids.to(parameter.device).long(), tokens.lengths.to(parameter.device).long()
    with torch.no_grad():
        smashed = bottom(ids, lengths)  # (B, L, d)
        target = trunk(smashed, lengths)
    dtype = next(middle.parameters()).dtype
    output = target if middle is trunk else middle(smashed.to(dtype), lengths)  # (B, L, d)
    difference = pack(output, lengths).float() - pack(target, lengths).float()  # (N, d)
    errors = difference.square().sum(-1) / pack(target, lengths).float().square().sum(-1).clamp_min(1e-12)
    before = padding_mask(lengths - 1, ids.shape[1]).bool()  # positions that a token follows
    logits = top.logits(top(output.to(parameter.dtype), lengths)[before]).float()  # (N - B, V)
    following = ids[:, 1:][before[:, :-1]]
    return torch.nn.functional.cross_entropy(logits, following, reduction="none"), errors


def _schedule(step: int, steps: int) -> float:
    """Returns the factor on the learning rate at step 0, 1, …"""
    warm = max(1, round(WARMUP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _check_cut(backbone: FrozenBackbone) -> CutModel:
    """Returns the backbone's cut model. Raises `ConfigError` if it isn't cut."""
    if backbone.cut_model is None:
        raise ConfigError("The model is not cut.", remedy="Load it with a cut (--cut).")
    return backbone.cut_model
