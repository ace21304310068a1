"""Writes an audit as one self-contained HTML file: verdict, controls, curves, pictures, and all numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from blindtune.audit.attackers import Attacked, Finding
from blindtune.audit.channel_id import ChannelId, ChannelKind
from blindtune.audit.labels.few import COUNTS
from blindtune.audit.labels.registry import Knowledge
from blindtune.audit.pictures import COLOURS, curves, scatter
from blindtune.audit.verdict import Verdict, strongest

PICTURED = (
    ChannelId(ChannelKind.ACTIVATION, adapter=0),
    ChannelId(ChannelKind.SHIFT, adapter=0),
    ChannelId(ChannelKind.GRADIENT, adapter=0),
    ChannelId(ChannelKind.GRADIENT, adapter=0, share=0),
)
GROUPS = {
    "activations": (ChannelKind.ACTIVATION, ChannelKind.SENT_ACTIVATION),
    "shifts": (ChannelKind.SHIFT,),
    "gradients": (ChannelKind.GRADIENT,),
}
KNOWLEDGE = (Knowledge.NOTHING, Knowledge.WHICH_COMPONENT, *COUNTS.values(), Knowledge.ALL_OTHER_LABELS)


def write_report(
    path: Path, verdict: Verdict, *, title: str, classes: Sequence[str], facts: Sequence[tuple[str, str]] = ()
) -> None:
    """Writes the report. It also lists `facts`, pairs `(name, value)` about the run."""
    environment = jinja2.Environment(loader=jinja2.PackageLoader("blindtune.audit", ""), autoescape=True)
    page = environment.get_template("report.html.j2").render(
        title=title,
        verdict=verdict,
        classes=[(name, COLOURS[index % len(COLOURS)]) for index, name in enumerate(classes)],
        facts=facts,
        servers=[_server(result) for result in verdict.attacked],
        knowledge=KNOWLEDGE[1:],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page)


def _server(result: Attacked) -> dict[str, Any]:
    """Returns the template's variables for one server."""
    return {
        "name": result.operator,
        "checkpoints": result.checkpoints,
        "texts": result.texts,
        "curves": curves(_series(result.findings), _floor(result.findings)),
        "pictures": [
            (channel, [(when, scatter(*result.pictures[channel, when])) for when in ("early", "late")])
            for channel in PICTURED
            if (channel, "late") in result.pictures and (channel, "early") in result.pictures
        ],
        "rows": _rows(result.findings),
    }


def _series(findings: Sequence[Finding]) -> dict[str, list[Finding]]:
    """Returns the strongest finding without labels at each step, for each group of channels."""
    series: dict[str, list[Finding]] = {}
    for name, kinds in GROUPS.items():
        by_step: dict[int, list[Finding]] = {}
        for finding in findings:
            if finding.knows is Knowledge.NOTHING and finding.channel.observes(*kinds):
                by_step.setdefault(finding.step, []).append(finding)
        if by_step:
            series[name] = [strongest(by_step[step]) for step in sorted(by_step)]
    return series


def _floor(findings: Sequence[Finding]) -> float:
    """Returns the highest AUC without labels on controls."""
    return max((f.auc for f in findings if f.channel.is_control and f.knows is Knowledge.NOTHING), default=0.5)


def _rows(findings: Sequence[Finding]) -> list[tuple[ChannelId, list[Finding | None]]]:
    """Returns each channel with its strongest finding for each kind of knowledge; None if there is none."""
    rows: list[tuple[ChannelId, list[Finding | None]]] = []
    for channel in dict.fromkeys(finding.channel for finding in findings):
        on_channel = [finding for finding in findings if finding.channel == channel]
        groups = [[finding for finding in on_channel if finding.knows is knows] for knows in KNOWLEDGE]
        rows.append((channel, [strongest(group) if group else None for group in groups]))
    return rows
