"""Sums up an audit of labels, in a sentence and as JSON."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from blindtune.audit.attackers import Attacked, Finding
from blindtune.audit.channel_id import ChannelId, ChannelKind
from blindtune.audit.labels.few import COUNTS
from blindtune.audit.labels.registry import Knowledge
from blindtune.audit.statistics import Chance, chance_of_maximum

COMPUTED = (ChannelKind.ACTIVATION, ChannelKind.SHIFT, ChannelKind.SENT_ACTIVATION)
"""Kinds of channels whose vectors the model computes in forward passes."""

CONTROL_AUC = 0.75
"""Least AUC on unprotected training. If the attacks don't reach it, they are too weak for a verdict."""


@dataclass(frozen=True)
class Verdict:
    """Sums up the strongest attacks of one audit, and its two controls: an unprotected run and the frozen model.

    `headline` is the best attack without any label; `probe` is the best one that knows all other labels.

    Attributes:
        attacked: the findings on each server.
        control: findings on an unprotected run.
    """

    attacked: list[Attacked]
    control: list[Finding]
    notes: list[str] = field(default_factory=list[str])
    """Further observations, each as a sentence, such as whether noise lies on a lattice."""

    @property
    def findings(self) -> list[Finding]:
        """Returns all findings on all servers."""
        return [finding for result in self.attacked for finding in result.findings]

    @property
    def headline(self) -> Finding:
        """Returns the best attack without labels."""
        return strongest(self._of_run(Knowledge.NOTHING))

    @property
    def component(self) -> Finding:
        """Returns the best of the leading principal components, for an attacker who knows which one it is."""
        return strongest(self._of_run(Knowledge.WHICH_COMPONENT))

    @property
    def frozen_component(self) -> Finding:
        """Returns the best of the leading principal components on the frozen model."""
        return strongest(self._of_frozen_model(Knowledge.WHICH_COMPONENT))

    @property
    def probe(self) -> Finding:
        """Returns the best attack that knows all other labels."""
        return strongest(self._of_run(Knowledge.ALL_OTHER_LABELS))

    @property
    def frozen(self) -> Finding:
        """Returns the best attack without labels on the frozen model."""
        return strongest(self._of_frozen_model(Knowledge.NOTHING))

    @property
    def frozen_probe(self) -> Finding:
        """Returns the best attack on the frozen model, for an attacker who knows all other labels."""
        return strongest(self._of_frozen_model(Knowledge.ALL_OTHER_LABELS))

    @property
    def control_headline(self) -> Finding | None:
        """Returns the best attack without labels on activations and shifts of unprotected training.

        It is None for an audit without a control. Gradients don't count. In the clear they always reveal labels, so
        they can't show that the attacks on activations and shifts work.
        """
        chosen = [f for f in self.control if f.knows is Knowledge.NOTHING and f.channel.observes(*COMPUTED)]
        return strongest(chosen) if chosen else None

    @property
    def valid(self) -> bool:
        """Returns whether the attacks succeed on unprotected training; True for an audit without a control."""
        control = self.control_headline
        return control is None or control.auc >= CONTROL_AUC

    @cached_property
    def chance(self) -> Chance:
        """Returns the distribution that the headline would have if labels were independent of what servers received."""
        cached = [entry for result in self.attacked for entry in result.cached]
        labels = {row: label for result in self.attacked for row, label in result.labels.items()}
        return chance_of_maximum(cached, labels)

    @property
    def few_labels(self) -> dict[Knowledge, tuple[Finding, Finding | None]]:
        """Returns the best probe on the run and on the frozen model, for each number of known labels."""
        best: dict[Knowledge, tuple[Finding, Finding | None]] = {}
        for knows in COUNTS.values():
            probes = self._of_run(knows)
            frozen = self._of_frozen_model(knows)
            if probes:
                best[knows] = (strongest(probes), strongest(frozen) if frozen else None)
        return best

    def best_on(self, *kinds: ChannelKind, operator: str | None = None) -> Finding | None:
        """Returns the best attack without labels on channels of these kinds."""
        chosen = [
            f for f in self._of_run(Knowledge.NOTHING) if f.channel.observes(*kinds) and operator in (None, f.operator)
        ]
        return strongest(chosen) if chosen else None

    def best_of_each(self, *kinds: ChannelKind) -> dict[str, float]:
        """Returns the best AUC of each attack without labels on channels of these kinds."""
        best: dict[str, float] = {}
        for finding in self._of_run(Knowledge.NOTHING):
            if finding.channel.observes(*kinds):
                best[finding.attack] = max(finding.auc, best.get(finding.attack, 0.0))
        return best

    def table(self) -> list[Finding]:
        """Returns the best attack at its best step, for each server, channel and knowledge."""
        groups: dict[tuple[str, ChannelId, Knowledge], list[Finding]] = {}
        for finding in self.findings:
            groups.setdefault((finding.operator, finding.channel, finding.knows), []).append(finding)
        return [strongest(group) for group in groups.values()]

    def sentence(self) -> str:
        """Returns the result in one sentence."""
        best = self.headline
        attack = (
            f"The strongest attack without labels reaches AUC {best.interval()} "
            f"({best.attack} on {best.channel}, {best.operator}, step {best.step})"
        )
        control = self.control_headline
        if control is not None and not self.valid:
            return f"{attack}; void: on unprotected training it reaches {control.auc:.2f} only, so it proves nothing."
        unprotected = "no control was attacked" if control is None else f"{control.auc:.2f} on unprotected training"
        return (
            f"{attack}; guessing would reach up to {self.chance.quantile:.2f} in 95% of cases "
            f"(p = {self.chance.p:.3f}); {unprotected}, {self.frozen.auc:.2f} on the frozen model."
        )

    def to_json(self) -> dict[str, Any]:
        """Returns all numbers."""
        control = self.control_headline
        return {
            "headline": self.headline.to_json(),
            "component": self.component.to_json(),
            "probe": self.probe.to_json(),
            "few_labels": {
                str(knows): {"strongest": best.to_json(), "frozen": frozen.to_json() if frozen else None}
                for knows, (best, frozen) in self.few_labels.items()
            },
            "chance": asdict(self.chance),
            "controls": {
                "unprotected": None if control is None else control.to_json(),
                "frozen": self.frozen.to_json(),
                "frozen_component": self.frozen_component.to_json(),
                "frozen_probe": self.frozen_probe.to_json(),
                "valid": self.valid,
            },
            "findings": [finding.to_json() for finding in self.findings],
        }

    def _of_run(self, knows: Knowledge) -> list[Finding]:
        """Returns findings of attacks with this knowledge, without controls."""
        return [f for f in self.findings if f.knows is knows and not f.channel.is_control]

    def _of_frozen_model(self, knows: Knowledge) -> list[Finding]:
        """Returns findings of attacks with this knowledge on controls."""
        return [f for f in self.findings if f.knows is knows and f.channel.is_control]


def strongest(findings: Iterable[Finding]) -> Finding:
    """Returns the finding with the highest AUC."""
    return max(findings, key=lambda finding: finding.auc)
