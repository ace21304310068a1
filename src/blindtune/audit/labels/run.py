"""A whole audit of labels: read transcripts, attack every view, train a control, and reach a verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from blindtune.audit.attackers import Attacked, Finding, Plan, attack_view, audited_checkpoints, cells
from blindtune.audit.control import STEPS, unprotected_control
from blindtune.audit.labels.lattice import on_lattice
from blindtune.audit.observe import Row, View, join_views, read_view
from blindtune.audit.progress import Begin, silent
from blindtune.audit.recompute import Recomputation
from blindtune.audit.verdict import Verdict
from blindtune.errors import ConfigError, TranscriptError
from blindtune.models import FrozenBackbone, Tokenizer, load_backbone
from blindtune.models.tokenizer import Text
from blindtune.wire import Transcript

MOST_COLLUDING = 4
"""So many servers have 11 subsets of two or more."""


@dataclass(frozen=True)
class AuditSettings:
    """How thorough an audit is.

    Attributes:
        points: in time, spread over the run.
        probe_points: how many of them also get what costs more.
        max_texts: a random sample of so many texts is attacked; all if None.
        model: the pretrained model; the one that the transcript names if None.
        tenant: whose run, if several tenants were recorded.
        collude: whether every subset of two or more servers is attacked too, as if they had pooled what they saw.
        updates: optimizer steps to invert, up to a minute each.
        device: where texts run under the recorded adapters; attacks on the results run on the CPU.
    """

    points: int = 8
    probe_points: int = 3
    max_texts: int | None = None
    model: str | None = None
    tenant: str | None = None
    collude: bool = False
    updates: int = 0
    device: str = "cpu"


def audit_labels(
    transcripts: Sequence[str | Path] | Mapping[str, Path],
    texts: Sequence[Text],
    labels: Sequence[int],
    settings: AuditSettings | None = None,
    *,
    control: Sequence[Path] = (),
    control_findings: Sequence[Finding] | None = None,
    backbone: FrozenBackbone | None = None,
    begin: Begin = silent,
) -> Verdict:
    """Attacks what servers recorded, and scores it against the true labels.

        verdict = audit_labels(["seen-by-a", "seen-by-b"], texts, labels)
        print(verdict.sentence())
        write_report(Path("report.html"), verdict, title="Audit", classes=["no", "yes"])

    Args:
        transcripts: folders that `blindtune serve --record` wrote, one a server; or such folders by the servers' names.
        texts, labels: the training set, for scoring alone.
        control: transcripts of an unprotected run.
        control_findings: what was found in an unprotected run; empty for an audit that has its control elsewhere. With
            neither of the two, a short unprotected run is trained here.
        backbone: the pretrained model, if it is loaded already.
        begin: reports progress.
    Raises:
        TranscriptError: a transcript without training, of other weights, or too few texts with a label.
        ConfigError: more servers than can collude.
    """
    settings = settings or AuditSettings()
    folders = transcripts if isinstance(transcripts, Mapping) else {str(folder): Path(folder) for folder in transcripts}
    views = [read_view(Transcript(folder), name, settings.tenant) for name, folder in folders.items()]
    views = [view for view in views if view.messages] or views
    control_views = [read_view(Transcript(folder), f"control {folder}") for folder in control]
    backbone = _backbone([*views, *control_views], settings, backbone)
    if settings.collude:
        views += colluding(views)
    known = label_rows(texts, labels, views, backbone)
    plan = Plan(known, settings.points, settings.probe_points, settings.max_texts, settings.updates)
    recompute = Recomputation(backbone)
    attacked = [_attack(view, plan, recompute, begin) for view in [*views, *control_views]]
    main, others = attacked[: len(views)], attacked[len(views) :]
    findings = [finding for result in others for finding in result.findings]
    if control_findings is not None:
        findings = list(control_findings)
    elif not others:
        trained = next(view for view in views if audited_checkpoints(view, 1))
        advance = begin("control: unprotected training", STEPS)
        findings = unprotected_control(trained, plan, recompute, lambda: advance(1))
    notes = [f"{on_lattice(view)}." for view in views if view.gradients or view.moving]
    return Verdict(main, findings, notes)


def colluding(views: Sequence[View]) -> list[View]:
    """The joint view of every subset of two or more servers, the small ones first.

    Raises:
        ConfigError: fewer than two servers, or so many that their subsets would take too long.
    """
    if not 2 <= len(views) <= MOST_COLLUDING:
        raise ConfigError(
            f"--collude attacks every subset of the servers; {len(views)} transcripts can't be joined.",
            remedy=f"Name 2 to {MOST_COLLUDING} transcripts of one run.",
        )
    return [join_views(subset) for size in range(2, len(views) + 1) for subset in combinations(views, size)]


def label_rows(
    texts: Sequence[Text], labels: Sequence[int], views: Sequence[View], backbone: FrozenBackbone
) -> dict[Row, int]:
    """Token rows, as the servers saw them, with their labels."""
    longest = max(len(row) for view in views for row in view.first_seen)
    tokenizer = Tokenizer(backbone.tokenizer, pad_token_id=backbone.pad_token_id, with_types=True)
    rows = tokenizer.rows(texts, max_length=longest)
    return {row.ids: label for row, label in zip(rows, labels, strict=True)}


def _backbone(views: Sequence[View], settings: AuditSettings, backbone: FrozenBackbone | None) -> FrozenBackbone:
    """The pretrained model that all views were recorded on. Raises `TranscriptError`."""
    recorded = views[0].transcript.recording.models[views[0].model]
    if backbone is None:
        backbone = load_backbone(settings.model or recorded.source, device=settings.device, dtype=recorded.dtype)
    for view in views:
        if view.transcript.recording.models[view.model].fingerprint != backbone.fingerprint:
            raise TranscriptError(
                f"{view.transcript.folder} was recorded on other weights than {backbone.source.requested!r}.",
                remedy="Give the same pretrained model with --model.",
            )
    return backbone


def _attack(view: View, plan: Plan, recompute: Recomputation, begin: Begin) -> Attacked:
    rows = sum(row in plan.labels for row in view.first_seen)
    recompute.on_texts = begin(f"{view.operator}: recomputing activations", 2 * min(rows, plan.max_texts or rows))
    attack = begin(f"{view.operator}: attacking channels", cells(view, plan))
    return attack_view(view, plan, recompute, lambda: attack(1))
