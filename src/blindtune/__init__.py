"""blindtune: fine-tune a language model that someone else hosts, without showing them what you teach it.

    backbone = bt.Backbone(["https://a.example", "https://b.example"], model="minilm", token=...)
    model = bt.PrivateModel(backbone, head=bt.LinearHead(backbone.hidden_size, 2), method=bt.PaddedLoRA())
    model.prepare(texts, labels)
    for batch in loader:
        loss = model(batch.texts, labels=batch.labels).loss
        loss.backward(); optimizer.step(); optimizer.zero_grad()

Each public name is imported when it is first used, so that `import blindtune` and the command line start fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blindtune.audit import audit_labels, audit_texts
    from blindtune.client import Backbone, Timeout
    from blindtune.data import Examples, load_examples
    from blindtune.errors import BlindtuneError
    from blindtune.labels import (
        P3EFT,
        Features,
        LinearHead,
        LoRA,
        PaddedLoRA,
        PrivateBackpropOptions,
        PrivateModel,
        Side,
        TangentSketch,
        TrainConfig,
        Trainer,
        evaluate,
        exposure,
        predict,
        randomise_adam_moments,
    )
    from blindtune.local import local_operators
    from blindtune.privacy.randomness import SecureGenerator
    from blindtune.texts.shadow import ShadowClient

_HOMES = {
    "audit": ("audit_labels", "audit_texts"),
    "client": ("Backbone", "Timeout"),
    "data": ("Examples", "load_examples"),
    "errors": ("BlindtuneError",),
    "labels": (
        "Features",
        "LinearHead",
        "LoRA",
        "P3EFT",
        "PaddedLoRA",
        "PrivateBackpropOptions",
        "PrivateModel",
        "Side",
        "TangentSketch",
        "TrainConfig",
        "Trainer",
        "evaluate",
        "exposure",
        "predict",
        "randomise_adam_moments",
    ),
    "local": ("local_operators",),
    "privacy.randomness": ("SecureGenerator",),
    "texts.shadow": ("ShadowClient",),
}
"""The public names of each module of this package."""

__all__ = [
    "P3EFT",
    "Backbone",
    "BlindtuneError",
    "Examples",
    "Features",
    "LinearHead",
    "LoRA",
    "PaddedLoRA",
    "PrivateBackpropOptions",
    "PrivateModel",
    "SecureGenerator",
    "ShadowClient",
    "Side",
    "TangentSketch",
    "Timeout",
    "TrainConfig",
    "Trainer",
    "audit_labels",
    "audit_texts",
    "evaluate",
    "exposure",
    "load_examples",
    "local_operators",
    "predict",
    "randomise_adam_moments",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"blindtune.{module}"), name)
    raise AttributeError(f"module 'blindtune' has no attribute {name!r}")
