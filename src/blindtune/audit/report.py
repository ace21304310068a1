"""The audit as one self-contained HTML file: verdict, controls, curves, pictures, every number."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from blindtune.audit.attackers import FROZEN, Attacked, Finding
from blindtune.audit.labels.few import COUNTS
from blindtune.audit.pictures import COLOURS, curves, scatter
from blindtune.audit.verdict import Verdict, strongest

PICTURED = ("activation 0", "shift 0", "gradient 0", "gradient 0.0")
GROUPS = {"activations": ("activation", "sent activation"), "shifts": ("shift",), "gradients": ("gradient",)}


def write_report(
    path: Path, verdict: Verdict, *, title: str, classes: Sequence[str], facts: Sequence[tuple[str, str]] = ()
) -> None:
    """Writes the report; `facts` are further `(name, value)` lines about the run."""
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
    """For each group of channels the best attack without labels at each step."""
    series: dict[str, list[Finding]] = {}
    for name, prefixes in GROUPS.items():
        by_step: dict[int, list[Finding]] = {}
        for finding in findings:
            if finding.knows == "nothing" and finding.channel.startswith(prefixes):
                by_step.setdefault(finding.step, []).append(finding)
        if by_step:
            series[name] = [strongest(by_step[step]) for step in sorted(by_step)]
    return series


def _floor(findings: Sequence[Finding]) -> float:
    return max((f.auc for f in findings if f.channel.startswith(FROZEN) and f.knows == "nothing"), default=0.5)


KNOWLEDGE = ("nothing", "which component", *COUNTS.values(), "all other labels")


def _rows(findings: Sequence[Finding]) -> list[tuple[str, list[Finding | None]]]:
    """Channel, and its best attack for each kind of knowledge."""
    rows: list[tuple[str, list[Finding | None]]] = []
    for channel in dict.fromkeys(finding.channel for finding in findings):
        mine = [finding for finding in findings if finding.channel == channel]
        groups = [[finding for finding in mine if finding.knows == knows] for knows in KNOWLEDGE]
        rows.append((channel, [strongest(group) if group else None for group in groups]))
    return rows
