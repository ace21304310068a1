"""Attacks on what really crossed the wire, from transcripts alone, with the pretrained model at hand."""

from blindtune.audit.attackers import FROZEN, Attacked, Finding, Plan, attack_view, audited_checkpoints, cells
from blindtune.audit.control import unprotected_control
from blindtune.audit.observe import Recomputation, Row, View, read_view
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
    "read_view",
    "unprotected_control",
    "write_report",
]
