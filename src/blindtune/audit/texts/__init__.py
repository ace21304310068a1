"""Attacks on texts: they reconstruct tokens from the messages of a cut model. Importing this package registers them."""

from blindtune.audit.texts.attacker import Attacker, Budget
from blindtune.audit.texts.bisr import bisr, bisr_backward, bisr_forward
from blindtune.audit.texts.direct import direct_forward
from blindtune.audit.texts.eia import eia
from blindtune.audit.texts.evaluate import Reconstruction, attack_texts, headline
from blindtune.audit.texts.floors import language_model, unigram
from blindtune.audit.texts.lamp import lamp
from blindtune.audit.texts.link import Linked, link_repeats
from blindtune.audit.texts.metrics import METRICS, Interval
from blindtune.audit.texts.nearest import nearest_left_to_right, nearest_token
from blindtune.audit.texts.observe import Exchange, GroundTruth, Observed, TrueCall, read_exchanges
from blindtune.audit.texts.registry import ATTACKS, Attack, attack
from blindtune.audit.texts.run import Adaptive, TextsAudit, audit_texts, through_codec
from blindtune.audit.texts.sip import sip, sip_on_s_b
from blindtune.audit.texts.tag import tag

__all__ = [
    "ATTACKS",
    "METRICS",
    "Adaptive",
    "Attack",
    "Attacker",
    "Budget",
    "Exchange",
    "GroundTruth",
    "Interval",
    "Linked",
    "Observed",
    "Reconstruction",
    "TextsAudit",
    "TrueCall",
    "attack",
    "attack_texts",
    "audit_texts",
    "bisr",
    "bisr_backward",
    "bisr_forward",
    "direct_forward",
    "eia",
    "headline",
    "lamp",
    "language_model",
    "link_repeats",
    "nearest_left_to_right",
    "nearest_token",
    "read_exchanges",
    "sip",
    "sip_on_s_b",
    "tag",
    "through_codec",
    "unigram",
]
