"""Draws SVG plots for the report: two principal components of a channel, and the AUC of attacks over training steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from blindtune.audit.attackers import Finding
from blindtune.audit.labels import Channel
from blindtune.audit.observe import Features
from blindtune.audit.statistics import Labels

COLOURS = ["#2b6cb0", "#dd6b20", "#2f855a", "#9f7aea", "#b7791f", "#c53030", "#319795", "#702459"]
POINTS = 700
_SIDE, _MARGIN = 220, 10


def scatter(features: Features, labels: Labels, seed: int = 0) -> str:
    """Draws two principal components of `(N, d)`, coloured by the true label, as in Figure 1 of P3EFT."""
    chosen = np.random.default_rng(seed).permutation(len(features))[:POINTS]
    if features.shape[1] < 2:
        features = np.pad(features, ((0, 0), (0, 1)))
    points = Channel(features).components(2)[chosen]
    low, high = np.percentile(points, 1, axis=0), np.percentile(points, 99, axis=0)
    unit = np.clip((points - low) / np.maximum(high - low, 1e-12), -0.03, 1.03)
    positions = _MARGIN + unit * (_SIDE - 2 * _MARGIN)
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{_SIDE - y:.1f}" r="2.2" fill="{COLOURS[label % len(COLOURS)]}"/>'
        for (x, y), label in zip(positions, labels[chosen].tolist(), strict=True)
    )
    return (
        f'<svg viewBox="0 0 {_SIDE} {_SIDE}" role="img" aria-label="two principal components">'
        f'<rect width="{_SIDE}" height="{_SIDE}" class="plot"/><g fill-opacity="0.55">{dots}</g></svg>'
    )


def curves(series: Mapping[str, Sequence[Finding]], floor: float) -> str:
    """Draws the AUC over training steps: a line for each named series, and a dashed line for the frozen model."""
    width, height, left, bottom, right = 720, 260, 44, 30, 190
    last = max((f.step for line in series.values() for f in line), default=1) or 1

    def x(step: float) -> float:
        return left + (width - left - right) * step / last

    def y(auc: float) -> float:
        return 10 + (height - bottom - 10) * (1 - (auc - 0.5) / 0.5)

    parts: list[str] = []
    for tick in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0):
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text x="{left - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:.1f}</text>')
    for tick in sorted({0, last // 2, last}):
        parts.append(f'<text x="{x(tick):.1f}" y="{height - 10}" text-anchor="middle">{tick}</text>')
    parts.append(f'<line x1="{left}" x2="{width - right}" y1="{y(floor):.1f}" y2="{y(floor):.1f}" class="floor"/>')
    legend: list[tuple[float, str, str]] = []
    for index, (name, line) in enumerate(series.items()):
        colour = COLOURS[index % len(COLOURS)]
        path = " ".join(f"{x(f.step):.1f},{y(max(0.5, f.auc)):.1f}" for f in line)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x(f.step):.1f}" cy="{y(max(0.5, f.auc)):.1f}" r="3" fill="{colour}"/>' for f in line]
        if line:
            legend.append((y(max(0.5, line[-1].auc)), name, colour))
    legend.append((y(floor), "frozen model", "#718096"))
    previous = -100.0
    for height_of_line, name, colour in sorted(legend):
        baseline = max(height_of_line, previous + 15)
        previous = baseline
        parts.append(f'<text x="{width - right + 10}" y="{baseline + 4:.1f}" fill="{colour}">{escape(name)}</text>')
    title = "best attack without labels (AUC) by training step"
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{title}">{"".join(parts)}</svg>'
