"""blindtune: fine-tune a language model that someone else hosts, without showing them what you teach it.

    backbone = bt.Backbone(["https://a.example", "https://b.example"], model="minilm", token=...)
    model = bt.PrivateModel(backbone, head=bt.LinearHead(backbone.hidden_size, 2), method=bt.P3EFT())
    model.prepare(texts, labels)
    for batch in loader:
        loss = model(batch.texts, labels=batch.labels).loss
        loss.backward(); optimizer.step(); optimizer.zero_grad()

Names are imported when they are first used, so that `import blindtune` and the command line start at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blindtune.client import Backbone, Patience
    from blindtune.errors import BlindtuneError
    from blindtune.methods import P3EFT, HeadOnly, LinearHead, LoRA, PrivateModel, exposure, load_model, save_model
    from blindtune.privacy.randomness import SecureGenerator
    from blindtune.training import Examples, TrainConfig, Trainer, evaluate, load_examples, predict, randomise_moments

_HOMES = {
    "client": ("Backbone", "Patience"),
    "errors": ("BlindtuneError",),
    "methods": ("P3EFT", "HeadOnly", "LinearHead", "LoRA", "PrivateModel", "exposure", "load_model", "save_model"),
    "privacy.randomness": ("SecureGenerator",),
    "training": ("Examples", "TrainConfig", "Trainer", "evaluate", "load_examples", "predict", "randomise_moments"),
}

__all__ = [
    "P3EFT",
    "Backbone",
    "BlindtuneError",
    "Examples",
    "HeadOnly",
    "LinearHead",
    "LoRA",
    "Patience",
    "PrivateModel",
    "SecureGenerator",
    "TrainConfig",
    "Trainer",
    "evaluate",
    "exposure",
    "load_examples",
    "load_model",
    "predict",
    "randomise_moments",
    "save_model",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"blindtune.{home}"), name)
    raise AttributeError(f"module 'blindtune' has no attribute {name!r}")
