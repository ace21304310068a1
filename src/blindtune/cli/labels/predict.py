"""`blindtune labels predict`: predicts classes with a trained checkpoint."""

import csv
import json as json_module
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from blindtune.cli import options
from blindtune.cli.console import errors, reporting_errors, write_json
from blindtune.cli.labels.train import LABELS_HELP
from blindtune.errors import CheckpointError


def predict(
    checkpoint: Annotated[Path, typer.Argument(help="Folder that `blindtune labels train` wrote.")],
    server: options.Servers,
    data: Annotated[
        str,
        typer.Option(
            help="File of texts, in the formats that `blindtune labels train` reads.", rich_help_panel=options.DATA
        ),
    ],
    text: options.TextColumns = ["text"],  # noqa: B006 - Typer copies it
    label: Annotated[
        str | None,
        typer.Option(help=LABELS_HELP + " With it, the predictions are scored.", rich_help_panel=options.DATA),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="CSV file for the predictions. Default: stdout.")] = None,
    store: options.Store = None,
    model: options.Model = None,
    token: options.Token = None,
    tls_ca: options.TlsCa = None,
    wait: options.Wait = 600.0,
    insecure: options.Insecure = False,
    json: Annotated[Path | None, typer.Option("--json", help="Also write scores to this file.")] = None,
) -> None:
    """Predict classes with a trained checkpoint, on the servers that host its model.

    The command writes one row for each text: the predicted class and the probability of every class. Servers see texts
    and adapters; the head, and so the predictions, stay here. A checkpoint of padded-lora needs the operators that
    trained it, in the same order: each gets the adapter under a pad.

    Example: blindtune labels predict out/ --server https://a.example --server https://b.example --data new.csv
    --text note --output predicted.csv
    """
    with reporting_errors():
        import torch

        from blindtune.cli.progress import inference_progress
        from blindtune.labels import PrivateModel, adapter_config, readout_of, scores
        from blindtune.labels import predict as run
        from blindtune.training import LabelsSummary, read_summary

        summary = read_summary(checkpoint, LabelsSummary)
        classes = summary.classes if label else None
        examples = options.read_examples(data, text, label, classes=classes, split="test")
        backbone = options.connect(
            server,
            adapter=adapter_config(checkpoint),
            num_adapters=0,
            **readout_of(summary),
            store=options.store_folder(store),
            token=token,
            tls_ca=tls_ca,
            wait=wait,
            insecure=insecure,
            model=model or summary.model,
        )
        private = PrivateModel.from_pretrained(checkpoint, backbone, predict_only=True)
        with inference_progress(backbone, errors, "predicting", len(examples) * private.method.requests_per_text):
            probabilities = run(private, examples.texts)
        _write_predictions(output, probabilities.tolist(), summary.classes)
        result: dict[str, Any] = {"examples": len(examples)}
        if examples.labels is not None:
            result |= scores(probabilities, torch.tensor(examples.labels))
            errors.print(json_module.dumps(result))
        write_json(json, result)


def _write_predictions(output: Path | None, probabilities: list[list[float]], classes: list[str]) -> None:
    if len(classes) != len(probabilities[0]):
        raise CheckpointError(
            f"The checkpoint has {len(classes)} class names, and its head {len(probabilities[0])} outputs.",
            remedy="Train again.",
        )
    file = output.open("w", newline="") if output else sys.stdout
    writer = csv.writer(file)
    writer.writerow(["prediction", *(f"p_{name}" for name in classes)])
    for row in probabilities:
        writer.writerow([classes[row.index(max(row))], *(f"{value:.6f}" for value in row)])
    if output:
        file.close()
        errors.print(f"{len(probabilities)} predictions: {output}")
