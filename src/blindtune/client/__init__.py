"""The data owner's side: hosted models as torch modules, over one or several operators."""

from blindtune.client.backbone import Backbone, BackwardCall, GradientChannel, PlainChannel, RemoteBatch
from blindtune.client.operators import Operator, OperatorPool, Upload
from blindtune.client.transport import Patience, Traffic, Transport

__all__ = [
    "Backbone",
    "BackwardCall",
    "GradientChannel",
    "Operator",
    "OperatorPool",
    "Patience",
    "PlainChannel",
    "RemoteBatch",
    "Traffic",
    "Transport",
    "Upload",
]
