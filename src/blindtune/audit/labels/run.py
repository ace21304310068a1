"""Audits labels: reads transcripts, attacks every view, trains a control, and returns a verdict."""

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
"""Maximum number of servers for `collude`. With 4 servers there are 11 subsets of two or more."""


@dataclass(frozen=True)
class AuditSettings:
    """Configures an audit of labels.

    Attributes:
        points: number of snapshots to attack, spread evenly over the run.
        probe_points: number of snapshots at which expensive attacks run too.
        max_texts: maximum number of texts to attack, as a random sample; all if None.
        model: name or folder of the pretrained model; if None, the model that the transcript names.
        tenant: name of the tenant whose run is attacked; required if the recording has several.
        collude: whether every subset of two or more servers is attacked too, as if they had shared their transcripts.
        updates: number of optimizer steps to invert. Each one takes up to a minute.
        device: device that runs texts through the recorded adapters. Attacks on the results run on the CPU.
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
    """Attacks what servers recorded, and scores the attacks against the true labels.

        verdict = audit_labels(["seen-by-a", "seen-by-b"], texts, labels)
        print(verdict.sentence())
        write_report(Path("report.html"), verdict, title="Audit", classes=["no", "yes"])

    Args:
        transcripts: folders that `blindtune serve --record` wrote, one for each server; or a mapping from server names.
        texts, labels: the training set. The attacks do not see it; it serves for scoring only.
        control: transcripts of an unprotected run.
        control_findings: findings of an earlier audit of an unprotected run; empty if no control is needed. If neither
            `control` nor `control_findings` is given, the function trains a short unprotected run as the control.
        backbone: the pretrained model, if it is already loaded.
        begin: called at the start of each task, to report progress.
    Raises:
        TranscriptError: a transcript has no training or was recorded on other weights, or too few texts have labels.
        ConfigError: fewer than two servers, or too many, for `settings.collude`.
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
    """Returns the joint view of every subset of two or more servers, the smaller subsets first.

    Raises:
        ConfigError: fewer than two servers, or more than `MOST_COLLUDING`, whose subsets would take too long.
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
    """Returns the label of each text, by the token ids that the servers received."""
    longest = max(len(row) for view in views for row in view.first_seen)
    tokenizer = Tokenizer(backbone.tokenizer, pad_token_id=backbone.pad_token_id, with_types=True)
    rows = tokenizer.rows(texts, max_length=longest)
    return {row.ids: label for row, label in zip(rows, labels, strict=True)}


def _backbone(views: Sequence[View], settings: AuditSettings, backbone: FrozenBackbone | None) -> FrozenBackbone:
    """Returns the pretrained model of all views. Raises `TranscriptError` if a view was recorded on another one."""
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
