"""What an audit found, in a form for people and for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from blindtune.audit.attackers import FROZEN, Attacked, Finding
from blindtune.audit.labels.few import COUNTS
from blindtune.audit.statistics import Chance, chance_of_maximum

COMPUTED = ("activation", "shift", "sent activation")
"""How channels begin that hold what the model computes."""

CONTROL_AUC = 0.75
"""An attack on unprotected training that stays below this shows that the attacks are too weak here."""


@dataclass(frozen=True)
class Verdict:
    """The strongest attacks on one audit, beside its two controls.

    `headline` is the best attack without any label; `probe` the best one that is given all other labels.
    """

    attacked: list[Attacked]
    control: list[Finding]

    @property
    def findings(self) -> list[Finding]:
        return [finding for result in self.attacked for finding in result.findings]

    @property
    def headline(self) -> Finding:
        return strongest(f for f in self.findings if f.knows == "nothing" and not f.channel.startswith(FROZEN))

    @property
    def component(self) -> Finding:
        """The best of the leading principal components, for an attacker who finds out which one it is."""
        return strongest(f for f in self.findings if f.knows == "which component" and not f.channel.startswith(FROZEN))

    @property
    def frozen_component(self) -> Finding:
        return strongest(f for f in self.findings if f.knows == "which component" and f.channel.startswith(FROZEN))

    @property
    def probe(self) -> Finding:
        return strongest(f for f in self.findings if f.knows == "all other labels" and not f.channel.startswith(FROZEN))

    @property
    def frozen(self) -> Finding:
        return strongest(f for f in self.findings if f.knows == "nothing" and f.channel.startswith(FROZEN))

    @property
    def frozen_probe(self) -> Finding:
        return strongest(f for f in self.findings if f.knows == "all other labels" and f.channel.startswith(FROZEN))

    @property
    def control_headline(self) -> Finding:
        """On activations and shifts: clear gradients always give labels away, which would say nothing about those."""
        return strongest(f for f in self.control if f.knows == "nothing" and f.channel.startswith(COMPUTED))

    @property
    def valid(self) -> bool:
        """Whether the attacks succeed on unprotected training."""
        return self.control_headline.auc >= CONTROL_AUC

    @cached_property
    def chance(self) -> Chance:
        """What the headline would be if labels had nothing to do with what the servers saw."""
        cached = [entry for result in self.attacked for entry in result.cached]
        labels = {row: label for result in self.attacked for row, label in result.labels.items()}
        return chance_of_maximum(cached, labels)

    @property
    def few_labels(self) -> dict[str, tuple[Finding, Finding | None]]:
        """For each number of known labels the best probe on what crossed the wire, and on the frozen model."""
        found: dict[str, tuple[Finding, Finding | None]] = {}
        for knows in COUNTS.values():
            probes = [f for f in self.findings if f.knows == knows and not f.channel.startswith(FROZEN)]
            frozen = [f for f in self.findings if f.knows == knows and f.channel.startswith(FROZEN)]
            if probes:
                found[knows] = (strongest(probes), strongest(frozen) if frozen else None)
        return found

    def best_on(self, *kinds: str, operator: str | None = None) -> Finding | None:
        """The best attack without labels on channels whose names start with one of `kinds`."""
        chosen = [
            f
            for f in self.findings
            if f.knows == "nothing" and f.channel.startswith(kinds) and operator in (None, f.operator)
        ]
        return strongest(chosen) if chosen else None

    def best_of_each(self, *kinds: str) -> dict[str, float]:
        """Attack without labels -> its best AUC on channels whose names start with one of `kinds`."""
        found: dict[str, float] = {}
        for f in self.findings:
            if f.knows == "nothing" and f.channel.startswith(kinds):
                found[f.attack] = max(f.auc, found.get(f.attack, 0.0))
        return found

    def table(self) -> list[Finding]:
        """For each server and channel, the best moment of its best attack, with and without labels."""
        groups: dict[tuple[str, str, str], list[Finding]] = {}
        for finding in self.findings:
            groups.setdefault((finding.operator, finding.channel, finding.knows), []).append(finding)
        return [strongest(group) for group in groups.values()]

    def sentence(self) -> str:
        """The result in one sentence."""
        best = self.headline
        told = (
            f"The strongest attack without labels reaches AUC {best.interval()} "
            f"({best.attack} on {best.channel}, {best.operator}, step {best.step})"
        )
        control = self.control_headline
        if not self.valid:
            return f"{told}; void: on unprotected training it reaches {control.auc:.2f} only, so it proves nothing."
        return (
            f"{told}; guessing would reach up to {self.chance.quantile:.2f} in 95% of cases (p = {self.chance.p:.3f}); "
            f"{control.auc:.2f} on unprotected training, {self.frozen.auc:.2f} on the frozen model."
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "headline": asdict(self.headline),
            "component": asdict(self.component),
            "probe": asdict(self.probe),
            "few_labels": {
                knows: {"strongest": asdict(best), "frozen": asdict(frozen) if frozen else None}
                for knows, (best, frozen) in self.few_labels.items()
            },
            "chance": asdict(self.chance),
            "controls": {
                "unprotected": asdict(self.control_headline),
                "frozen": asdict(self.frozen),
                "frozen_component": asdict(self.frozen_component),
                "frozen_probe": asdict(self.frozen_probe),
                "valid": self.valid,
            },
            "findings": [asdict(finding) for finding in self.findings],
        }


def strongest(findings: Sequence[Finding] | Any) -> Finding:
    """The finding with the highest AUC."""
    return max(findings, key=lambda finding: finding.auc)
