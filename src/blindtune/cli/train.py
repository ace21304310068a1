"""`blindtune train` and `blindtune predict`: the data owner's commands."""

import csv
import json as json_module
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from blindtune.cli import options
from blindtune.cli.console import console, errors, reporting_errors, write_json
from blindtune.errors import BlindtuneError, BudgetSpent, CheckpointError, ConfigError

if TYPE_CHECKING:
    from blindtune.methods import PrivateModel
    from blindtune.training import Examples, TrainConfig

SPLIT = "Split decoders (private texts)"
LABELS_HELP = "Column of labels: class names, integers or booleans."


def train(
    server: options.Servers,
    data: Annotated[
        str, typer.Option(help="CSV, TSV, JSON lines or Parquet file, or a hub data set such as glue/sst2.")
    ],
    output: Annotated[Path, typer.Option(help="Folder for the checkpoint.")],
    text: options.TextColumn = "text",
    text_pair: options.TextPair = None,
    label: Annotated[str, typer.Option(help=LABELS_HELP)] = "label",
    classes: Annotated[
        str | None, typer.Option(help="Class names in order, separated by commas; found in the data if left out.")
    ] = None,
    validation: Annotated[str | None, typer.Option(help="File (or hub data set) to validate on.")] = None,
    validation_fraction: Annotated[float, typer.Option(help="Otherwise this part of the data; 0 for none.")] = 0.1,
    split: Annotated[str, typer.Option(help="Split of a hub data set to train on.")] = "train",
    validation_split: Annotated[
        str | None, typer.Option(help="Split of a hub data set to validate on, of --validation or else of --data.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="p3eft (labels stay private; the default), p3eft_published (the paper's algorithm, adapters in the "
            "clear), lora (no privacy), head_only, or a baseline: dc (distance correlation), pslf, "
            "randomized_response. Of split decoders, whose texts stay here: guarded-online, guarded-gradfree, "
            "guarded-offline, offsite."
        ),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="An option of the method, e.g. --set max_mu=0.1; repeat.")
    ] = None,
    task: Annotated[
        str, typer.Option(help="Split decoders: choice, classification, instruction, or text.", rich_help_panel=SPLIT)
    ] = "choice",
    template: Annotated[
        str | None,
        typer.Option(
            help="Split decoders: the prompt, with columns in braces, e.g. 'Question: {question}\\nAnswer:'.",
            rich_help_panel=SPLIT,
        ),
    ] = None,
    choices: Annotated[
        str, typer.Option(help="Column of the choices: a list, or texts between |.", rich_help_panel=SPLIT)
    ] = "choices",
    answer: Annotated[
        str,
        typer.Option(help="Column of the right choice (index, letter or text), or of answers.", rich_help_panel=SPLIT),
    ] = "answer",
    tune: Annotated[
        str, typer.Option(help="What of the ends is trained: lora, or full (their blocks).", rich_help_panel=SPLIT)
    ] = "lora",
    start: Annotated[
        Path | None, typer.Option(help="Checkpoint whose tuned ends training starts from.", rich_help_panel=SPLIT)
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            help="Split decoders: torch device that the ends (and an emulator) run on here: cpu, cuda, cuda:1.",
            rich_help_panel=SPLIT,
        ),
    ] = "cpu",
    cache_mb: Annotated[
        int, typer.Option(help="guarded-gradfree: most MiB of hidden states to keep.", rich_help_panel=SPLIT)
    ] = 2048,
    truth: Annotated[
        Path | None,
        typer.Option(help="File for the tokens of each message, to score an audit against.", rich_help_panel=SPLIT),
    ] = None,
    provider_key: Annotated[
        str | None, typer.Option(help="Public key that must have signed the emulator.", rich_help_panel=SPLIT)
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps.")] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the data, if no steps are given.")] = 3.0,
    batch_size: Annotated[int, typer.Option(help="Examples in a step.")] = 32,
    lr: Annotated[
        float | None,
        typer.Option(help="Learning rate; 0.002 for p3eft, 0.001 for split decoders, else 0.003, if left out."),
    ] = None,
    head_lr: Annotated[float, typer.Option(help="Learning rate of the head.")] = 2e-3,
    weight_decay: Annotated[float, typer.Option(help="AdamW's weight decay.")] = 0.0,
    warmup: Annotated[int, typer.Option(help="Steps over which learning rates rise.")] = 10,
    random_moments: Annotated[
        float, typer.Option(help="Size of secret random moments that the optimizer starts from; none if 0.")
    ] = 0.0,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens to which texts are truncated; 128, or the model's limit, if left out.")
    ] = None,
    pooling: Annotated[str | None, typer.Option(help="cls, mean, last or first; the model's own if left out.")] = None,
    rank: Annotated[
        int | None, typer.Option(help="LoRA rank; 32 for p3eft, 16 for split decoders, else 8, if left out.")
    ] = None,
    alpha: Annotated[int | None, typer.Option(help="LoRA alpha; twice the rank if left out.")] = None,
    target_modules: Annotated[
        str | None, typer.Option(help="Layers that get adapters, e.g. query,value; all linear ones if left out.")
    ] = None,
    layers: Annotated[str, typer.Option(help="all, upper (the upper half), or numbers such as 3-5,8.")] = "upper",
    seed: Annotated[int, typer.Option(help="Seed of batches, splits and the adapters' initial weights.")] = 0,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 10,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --output.")] = False,
    model: options.Model = None,
    token: options.Token = None,
    tls_ca: options.TlsCa = None,
    wait: options.Wait = 600.0,
    insecure: options.Insecure = False,
    json: options.Results = None,
) -> None:
    """Fine-tune a hosted model on private labels, or on private texts.

    Texts and adapters go to the servers; labels, the head and the optimizer stay here. With p3eft, each operator gets
    the adapter under a pad and one share of each gradient, so give at least two operators that don't collude. Ctrl-C
    leaves a checkpoint; --resume continues to the weights that an uninterrupted run would have had. The output folder
    holds PEFT adapters, the head, and the secrets of the run.

    With guarded-online, guarded-gradfree, guarded-offline and offsite the texts stay here too: the server has to offer
    the ends of a decoder (`blindtune serve --split`), which run and are tuned here, around the middle there or an
    emulator of it. Hidden states that cross the wire still tell much of the texts, unless noise or Offline prevents it.

    Example:  blindtune train --server https://a.example --server https://b.example --data notes.csv --text note
    --label diagnosis --output out/
    """
    with reporting_errors():
        from blindtune.cli import guarded
        from blindtune.methods import method_class, read_summary
        from blindtune.methods.guarded import DESIGNS
        from blindtune.training import Columns, TrainConfig, load_examples, split_examples, steps_for
        from blindtune.training.guarded import GuardedConfig

        connection = {"token": token, "tls_ca": tls_ca, "wait": wait, "insecure": insecure, "model": model}
        targets = options.parse_names(target_modules)
        names = options.parse_names(classes)
        if method in DESIGNS:
            result = guarded.train_guarded(
                server,
                method,
                options.parse_settings(set_),
                guarded.Data(
                    data,
                    guarded.make_fields(task, template, choices=choices, answer=answer, label=label),
                    names,
                    validation,
                    validation_fraction,
                    split,
                    validation_split,
                    max_length,
                ),
                guarded.Tuning(tune, rank, alpha, targets, start),
                GuardedConfig(
                    batch_size=batch_size,
                    learning_rate=guarded.DEFAULT_LR if lr is None else lr,
                    weight_decay=weight_decay,
                    warmup=warmup,
                    seed=seed,
                ),
                output,
                connection,
                save_every=save_every,
                resume=resume,
                cache_mb=cache_mb,
                truth=truth,
                trusted_key=provider_key,
                device=device,
                steps=steps,
                epochs=epochs,
            )
            guarded.print_result(result)
            write_json(json, result)
            return
        if device != "cpu":
            raise ConfigError(
                f"--device {device} is for split decoders: with this method the model runs at the servers.",
                remedy="Leave it out; the provider chooses (`blindtune serve --device`).",
            )
        columns = Columns(text, label, text_pair)
        examples = load_examples(data, columns, classes=names, split=split)
        held_out: Examples | None = None
        if validation or validation_split:
            held_out = load_examples(
                validation or data, columns, classes=examples.classes, split=validation_split or "validation"
            )
        elif validation_fraction > 0:
            examples, held_out = split_examples(examples, validation_fraction, seed)
        count = steps if steps is not None else steps_for(len(examples), batch_size, epochs)
        name = read_summary(output)["method"] if resume else (method or "p3eft")
        kind = method_class(name)
        config = TrainConfig(
            steps=count,
            batch_size=batch_size,
            learning_rate=kind.default_lr if lr is None else lr,
            head_learning_rate=head_lr,
            weight_decay=weight_decay,
            warmup=warmup,
            random_moments=random_moments,
            seed=seed,
        )
        rank = kind.default_rank if rank is None else rank
        lora = {"rank": rank, "alpha": 2 * rank if alpha is None else alpha, "targets": targets, "layers": layers}
        chosen = options.parse_settings(set_)
        settings = {"max_length": max_length, "pooling": pooling}
        if resume:
            private = _resume_model(server, output, connection, {"method": method, **chosen})
        else:
            for name_, value in (("steps", count), ("batch_size", batch_size)):
                if any(option.name == name_ for option in fields(kind)):
                    chosen.setdefault(name_, value)
            private = _new_model(server, name, chosen, len(examples.classes), lora, settings, connection, seed)
        result = _run(private, examples, held_out, config, output, save_every, resume)
        _print_result(result)
        write_json(json, result)


def _new_model(
    servers: list[str],
    method: str,
    chosen: dict[str, Any],
    classes: int,
    lora: dict[str, Any],
    settings: dict[str, Any],
    connection: dict[str, Any],
    seed: int,
) -> "PrivateModel":
    from blindtune.methods import LinearHead, PrivateModel, make_method

    algorithm = make_method(method, chosen)
    backbone = options.connect(servers, num_adapters=0, **settings, **connection)
    if algorithm.num_adapters:
        backbone.adapter_config = options.make_lora_config(backbone.info, **lora)
    head = LinearHead(backbone.hidden_size, classes)
    return PrivateModel(backbone, head, algorithm, seed=seed)


def _resume_model(
    servers: list[str], folder: Path, connection: dict[str, Any], chosen: dict[str, Any]
) -> "PrivateModel":
    """The model of the checkpoint; method and options that are given again must be the same."""
    from blindtune.methods import adapter_config, load_model, read_summary

    summary = read_summary(folder)
    trained = {"method": summary["method"], **summary["options"]}
    for name, value in chosen.items():
        if value is not None and value != trained.get(name):
            raise CheckpointError(
                f"{folder} was trained with {name} = {trained.get(name)!r}, not {value!r}.",
                remedy="Resume with the same options, or start anew without --resume.",
            )
    backbone = options.connect(
        servers,
        adapter=adapter_config(folder),
        num_adapters=0,
        max_length=summary["max_length"],
        pooling=summary["pooling"],
        **{**connection, "model": connection["model"] or summary["model"]},
    )
    return load_model(folder, backbone)


def _run(
    private: "PrivateModel",
    examples: "Examples",
    held_out: "Examples | None",
    config: "TrainConfig",
    output: Path,
    save_every: int,
    resume: bool,
) -> dict[str, Any]:
    """Trains with progress and leaves a checkpoint, however it ends."""
    from blindtune.cli.progress import Interrupted, human_bytes, inference_progress, run_steps
    from blindtune.methods import exposure, read_resume
    from blindtune.methods.model import PROBE_TEXTS
    from blindtune.training import Trainer, evaluate

    trainer = Trainer(private, examples, config, checkpoint=output, save_every=save_every)
    backbone, method = private.backbone, private.method
    console.print(
        f"{len(examples)} examples, {len(examples.classes)} classes, {config.steps} steps of {config.batch_size}; "
        f"{method.name} over {len(backbone.pool)} operator(s) that host {backbone.info.base_model_name} "
        f"(fingerprint {backbone.info.fingerprint[:12]}…)"
    )
    for line in exposure(private, config.steps, random_moments=config.random_moments):
        console.print(f"  {line}", soft_wrap=True)
    _print_earlier(private, examples)
    if resume:
        trainer.load(*read_resume(output))
        console.print(f"Resumed after step {trainer.done}.")
    else:
        with inference_progress(backbone, console, "frozen features", len(examples)):
            trainer.prepare()
        if private.precision:
            shown = ", ".join(f"{name.replace('_', ' ')} {error:.1%}" for name, error in private.precision.items())
            console.print(f"  Measured on {PROBE_TEXTS} texts, before anything depends on labels: {shown}.")
    try:
        run_steps(trainer, console, method.name)
    except (Interrupted, KeyboardInterrupt):
        trainer.save()
        console.print(f"Stopped after step {trainer.done}. Checkpoint: {output}. Go on with --resume.", soft_wrap=True)
        raise typer.Exit(130) from None
    except BudgetSpent as spent:
        console.print(f"[yellow]Stopped after step {trainer.done}.[/] {spent.message}", soft_wrap=True)
    except BlindtuneError:  # an operator is gone, or a loss exploded: the last complete step is safe
        trainer.save()
        console.print(
            f"[red]Stopped after step {trainer.done}.[/] Checkpoint: {output}. Go on with --resume.", soft_wrap=True
        )
        raise
    if lost := method.report().get("nonfinite_messages"):
        console.print(
            f"[red]{lost} messages held zeros, because a loss or an adapter had NaN or infinity.[/] Lower --lr. "
            "Nothing was broken off: that would have told something of labels.",
            soft_wrap=True,
        )
    trainer.save()
    result: dict[str, Any] = {"method": method.name, "steps": trainer.done, "train_examples": len(examples)}
    if held_out is not None:
        with inference_progress(backbone, console, "validation", len(held_out)):
            result["validation"] = evaluate(private, held_out)
    traffic = backbone.traffic
    result |= method.report()
    result |= {"bytes_sent": traffic.sent, "bytes_received": traffic.received, "output": str(output)}
    console.print(
        f"Checkpoint: {output}  ({human_bytes(traffic.sent)} sent, {human_bytes(traffic.received)} received)",
        soft_wrap=True,
    )
    return result


def _print_earlier(private: "PrivateModel", examples: "Examples") -> None:
    """What runs on the same labels tell together."""
    from blindtune.privacy.accountant import gaussian_guarantee
    from blindtune.privacy.history import total_mu

    runs = private.earlier_runs(examples.texts)
    if not runs:
        return
    together = gaussian_guarantee(total_mu(runs, private.method.label_mu))
    console.print(
        f"  {len(runs)} earlier run(s) on this machine used labels of these texts. One operator that saw all of them "
        f"and sees this one: μ = {together.mu:.3g}, ε = {together.epsilon:.3g} at δ = {together.delta:g}.",
        soft_wrap=True,
    )


def _print_result(result: dict[str, Any]) -> None:
    """A table; the ε of a row has its δ beside it."""
    deltas = {"label_epsilon": 0.0}
    deltas |= {f"{prefix}epsilon": result.get(f"{prefix}delta", 0.0) for prefix in ("", "gradient_channel_")}
    table = Table(title="Result", title_justify="left", show_header=False)
    flat = {**result, **{f"validation {name}": value for name, value in result.get("validation", {}).items()}}
    for name, value in flat.items():
        if not isinstance(value, dict) and name not in ("delta", "gradient_channel_delta"):
            title = name.replace("_", " ") + (f" (δ = {deltas[name]:g})" if name in deltas else "")
            table.add_row(title, f"{value:.4f}" if isinstance(value, float) else str(value))
    console.print(table)


def predict(
    checkpoint: Annotated[Path, typer.Argument(help="Folder that `blindtune train` wrote.")],
    server: options.Servers,
    data: Annotated[str, typer.Option(help="File with texts (same formats as for train).")],
    text: options.TextColumn = "text",
    text_pair: options.TextPair = None,
    label: Annotated[str | None, typer.Option(help=LABELS_HELP + " Scores the predictions if given.")] = None,
    split: Annotated[str, typer.Option(help="Split of a hub data set.")] = "test",
    output: Annotated[Path | None, typer.Option(help="CSV file for the predictions; stdout if left out.")] = None,
    model: options.Model = None,
    token: options.Token = None,
    tls_ca: options.TlsCa = None,
    wait: options.Wait = 600.0,
    insecure: options.Insecure = False,
    json: Annotated[Path | None, typer.Option("--json", help="Also write scores to this file.")] = None,
) -> None:
    """Predict classes with a trained checkpoint over the servers that host its model.

    Writes one row for each text: the predicted class and the probability of every class. Servers see texts and
    adapters; the head, and so the predictions, stay here. A checkpoint of p3eft needs the operators that trained it, in
    their order: each gets the adapter under a pad.

    Example:  blindtune predict out/ --server https://a.example --server https://b.example --data new.csv --text note
    --output predicted.csv
    """
    with reporting_errors():
        import torch

        from blindtune.cli.progress import inference_progress
        from blindtune.methods import PrivateModel, adapter_config, load_model, read_summary
        from blindtune.training import Columns, load_examples, scores
        from blindtune.training import predict as run

        summary = read_summary(checkpoint)
        examples = load_examples(
            data, Columns(text, label, text_pair), classes=summary["classes"] if label else None, split=split
        )
        backbone = options.connect(
            server,
            adapter=adapter_config(checkpoint),
            num_adapters=0,
            max_length=summary["max_length"],
            pooling=summary["pooling"],
            token=token,
            tls_ca=tls_ca,
            wait=wait,
            insecure=insecure,
            model=model or summary["model"],
        )
        private: PrivateModel = load_model(checkpoint, backbone, predict_only=True)
        with inference_progress(backbone, errors, "predicting", len(examples)):
            chances = run(private, examples.texts)
        _write_predictions(output, chances.tolist(), summary["classes"])
        result: dict[str, Any] = {"examples": len(examples)}
        if examples.labels is not None:
            result |= scores(chances, torch.tensor(examples.labels))
            errors.print(json_module.dumps(result))
        write_json(json, result)


def _write_predictions(output: Path | None, chances: list[list[float]], classes: list[str]) -> None:
    if len(classes) != len(chances[0]):
        raise CheckpointError("The checkpoint's class names don't fit its head.", remedy="Train again.")
    file = output.open("w", newline="") if output else sys.stdout
    writer = csv.writer(file)
    writer.writerow(["prediction", *(f"p_{name}" for name in classes)])
    for row in chances:
        writer.writerow([classes[row.index(max(row))], *(f"{value:.6f}" for value in row)])
    if output:
        file.close()
        errors.print(f"{len(chances)} predictions: {output}")
