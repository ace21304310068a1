"""Audits: attacks on recorded transcripts, by attackers who have the pretrained model."""

from blindtune.extras import requires

with requires("audit", "An audit"):
    from blindtune.audit.attackers import Attacked, Finding, Plan, attack_view, audited_checkpoints, cells
    from blindtune.audit.channel_id import FROZEN_MODEL, ChannelId, ChannelKind, Control
    from blindtune.audit.control import unprotected_control
    from blindtune.audit.labels.registry import Knowledge
    from blindtune.audit.labels.run import AuditSettings, audit_labels
    from blindtune.audit.observe import Row, View, join_views, read_view
    from blindtune.audit.recompute import Recomputation
    from blindtune.audit.report import write_report
    from blindtune.audit.texts.run import TextsAudit, audit_texts
    from blindtune.audit.verdict import Verdict

__all__ = [
    "FROZEN_MODEL",
    "Attacked",
    "AuditSettings",
    "ChannelId",
    "ChannelKind",
    "Control",
    "Finding",
    "Knowledge",
    "Plan",
    "Recomputation",
    "Row",
    "TextsAudit",
    "Verdict",
    "View",
    "attack_view",
    "audit_labels",
    "audit_texts",
    "audited_checkpoints",
    "cells",
    "join_views",
    "read_view",
    "unprotected_control",
    "write_report",
]
