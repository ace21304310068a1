"""`blindtune.json`: the summary of a run in its folder. It contains no tensors and no secrets.

Both products share one versioned format. Reading a run of the other product raises an error that says so.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from blindtune.errors import CheckpointError
from blindtune.files import SUMMARY, replace_file
from blindtune.wire import Codec, Readout

FORMAT = 5
S = TypeVar("S", bound="RunSummary")


class RunSummary(BaseModel):
    """The fields that the summaries of both products have.

    Attributes:
        method: name of the method or, for private texts, of the design.
        options: options of the method or design.
        model: name of the hosted model.
        base_model_name: PEFT's `base_model_name_or_path`.
        fingerprint: SHA-256 of the hosted weights.
        max_length: number of tokens to which texts were truncated.
    """

    model_config = ConfigDict(extra="forbid")

    PRODUCT: ClassVar[Literal["labels", "texts"]]

    format: Literal[5] = FORMAT
    method: str
    options: dict[str, Any]
    model: str
    base_model_name: str
    fingerprint: str
    max_length: int


class LabelsSummary(RunSummary):
    """The summary of a run with private labels.

    Attributes:
        run: the run's id in its ledger; empty if it has none.
        readout: which hidden states the head reads.
        pairs: how pairs of texts are read (`Backbone`).
        codec: codec of hidden states of the frozen model (`Backbone`).
        adapters: n, the number of adapters.
        head: class name of the head.
        loss: name of the loss (`blindtune.labels.LOSSES`), or `own`.
        classes: class names in the order of their indices.
    """

    PRODUCT = "labels"

    product: Literal["labels"] = "labels"
    run: str
    hidden_size: int
    readout: Readout
    pairs: Literal["joint", "apart", "both"]
    codec: Codec
    adapters: int
    seed: int
    head: str
    loss: str
    num_classes: int
    classes: list[str]


class TextsSummary(RunSummary):
    """The summary of a run with private texts.

    Attributes:
        cut: numbers of blocks in the bottom and in the top.
        tune: `lora`, or `full` for whole blocks.
        rank, alpha, targets: LoRA's rank, alpha and target modules.
        start: summary of the run from whose checkpoint this one started; None for the pretrained model.
        unknown_start: whether the run started from a checkpoint that has no summary.
        parts: the trained parts; `trunk` means the emulator's blocks.
        fields: kind, template and columns of the questions (`blindtune.data.questions.Fields`).
        emulator: the emulator's manifest.
        steps: number of complete steps.
        training: number of steps, batch size, learning rates and seed.
    """

    PRODUCT = "texts"

    product: Literal["texts"] = "texts"
    cut: tuple[int, int]
    tune: Literal["lora", "full"]
    rank: int
    alpha: int
    targets: list[str] | None
    start: TextsSummary | None = None
    unknown_start: bool = False
    parts: list[str]
    fields: dict[str, Any]
    emulator: dict[str, Any] | None = None
    steps: int = 0
    training: dict[str, Any] = {}


def write_summary(folder: Path, summary: RunSummary) -> None:
    """Replaces the folder's `blindtune.json` atomically."""
    replace_file(folder / SUMMARY, (summary.model_dump_json(indent=2) + "\n").encode())


def read_summary(folder: str | Path, kind: type[S]) -> S:
    """Returns the summary in a run's folder.

    Args:
        kind: `LabelsSummary` or `TextsSummary`.
    Raises:
        CheckpointError: there is no summary, it is damaged, or it has another version or the other product.
    """
    path = Path(folder) / SUMMARY
    if not path.is_file():
        raise CheckpointError(f"There is no {path}.", remedy="Name the folder that a training command wrote.")
    try:
        content = json.loads(path.read_text())
        version, written_by = content.get("format"), content.get("product")
    except (ValueError, AttributeError):
        raise CheckpointError(f"{path} is damaged: it holds no JSON object.", remedy="Restore the file.") from None
    product = kind.PRODUCT
    if version != FORMAT:
        raise CheckpointError(
            f"{path} is not a checkpoint of this version.",
            remedy="Train again. Pads and shares of earlier versions revealed more than they stated (CHANGELOG.md).",
        )
    if written_by != product:
        raise CheckpointError(
            f"{folder} holds a run of private {written_by}, not of private {product}.",
            remedy=f"Use the commands of `blindtune {written_by}` for it.",
        )
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{path} is damaged: {field}: {first['msg']}.", remedy="Restore the file.") from None
