"""Draws the demo's picture: what one operator saw with both methods, and what a server could read of the texts."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from blindtune.cli.demo.labels import LabelsPart
    from blindtune.cli.demo.texts import TextsPart

WIDTH, SIDE = 760, 220
SHOWN = 3
"""Number of sentences in the picture."""


def write_picture(path: Path, labels: LabelsPart, texts: TextsPart | None) -> Path:
    """Writes an SVG with two principal components of the gradients that operator A was sent with both methods, coloured
    by the true label, and a few sentences with what the server read of each."""
    from blindtune.audit import ChannelId, ChannelKind
    from blindtune.audit.pictures import COLOURS, scatter
    from blindtune.cli.demo.labels import TITLES

    parts = [_text(30, 36, "What the servers saw", size=20, bold=True)]
    parts.append(_text(30, 62, "Private labels: gradients that operator A was sent, a dot for each text.", muted=True))
    for index, (name, verdict) in enumerate(labels.verdicts.items()):
        left = 30 + index * (SIDE + 30)
        numbers = labels.summary["methods"][name]
        features, true_labels = verdict.attacked[0].pictures[ChannelId(ChannelKind.GRADIENT, adapter=0), "late"]
        drawing = scatter(features, true_labels).replace(
            "<svg ", f'<svg x="{left}" y="98" width="{SIDE}" height="{SIDE}" ', 1
        )
        parts += [_text(left, 90, TITLES[name], bold=True), drawing.replace('class="plot"', 'fill="#f7fafc"')]
        numbers_shown = f"accuracy {numbers['accuracy']:.2f}, best attack AUC {numbers['best_attack_auc']:.2f}"
        parts.append(_text(left, 98 + SIDE + 22, numbers_shown, size=13))
    frozen = f"Texts alone: AUC {labels.summary['frozen_attack_auc']:.2f}."
    legend = 30 + 2 * (SIDE + 30)
    parts.append(_text(legend, 110, "The colour is the label,", size=13))
    parts.append(_text(legend, 128, "which no operator is sent:", size=13))
    for index, name in enumerate(labels.classes):
        parts.append(
            f'<circle cx="{legend + 6}" cy="{146 + 20 * index}" r="5" fill="{COLOURS[index % len(COLOURS)]}"/>'
        )
        parts.append(_text(legend + 18, 151 + 20 * index, name, size=13))
    parts.append(_text(legend, 210, frozen, size=13))
    height = 360
    if texts is not None:
        parts.append(f'<line x1="30" x2="{WIDTH - 30}" y1="362" y2="362" stroke="#e2e8f0" stroke-width="2"/>')
        parts.append(_text(30, 392, "Private texts: what the server with the trunk reads.", muted=True))
        y = 420
        for original, read in list(zip(texts.sentences, texts.read, strict=True))[:SHOWN]:
            parts += [_text(30, y, "you", size=13, muted=True), _text(120, y, _cut(original), size=13)]
            parts += [_text(30, y + 19, "server reads", size=13, muted=True), _text(120, y + 19, _cut(read), size=13)]
            y += 50
        undefended = f"Undefended split learning: {texts.accuracy:.0%} of the tokens are read at the right position."
        offline = f"Offline: {texts.offline_messages} messages with hidden states in {texts.offline_steps} steps."
        parts += [_text(30, y + 4, undefended, bold=True), _text(30, y + 28, offline, bold=True)]
        height = y + 50
    body = "".join(parts)
    font = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="{font}">'
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>{body}</svg>\n'
    )
    return path


def _text(x: float, y: float, text: str, *, size: int = 15, bold: bool = False, muted: bool = False) -> str:
    colour = "#4a5568" if muted else "#1a202c"
    weight = ' font-weight="700"' if bold else ""
    return f'<text x="{x}" y="{y}" font-size="{size}"{weight} fill="{colour}">{escape(text)}</text>'


def _cut(text: str, length: int = 88) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
