"""Attacks on what really crossed the wire, from transcripts alone, with the pretrained model at hand."""

from blindtune.audit.attackers import FROZEN, Attacked, Finding, Plan, attack_view, audited_checkpoints, cells
from blindtune.audit.control import unprotected_control
from blindtune.audit.observe import Row, View, join_views, read_view
from blindtune.audit.recompute import Recomputation
from blindtune.audit.report import write_report
from blindtune.audit.verdict import Verdict

__all__ = [
    "FROZEN",
    "Attacked",
    "Finding",
    "Plan",
    "Recomputation",
    "Row",
    "Verdict",
    "View",
    "attack_view",
    "audited_checkpoints",
    "cells",
    "join_views",
    "read_view",
    "unprotected_control",
    "write_report",
]
