"""`blindtune labels train`: fine-tunes a hosted model on private labels."""

import math
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from blindtune.cli import options
from blindtune.cli.console import console, reporting_errors, write_json
from blindtune.errors import BlindtuneError, BudgetSpent, CheckpointError, ConfigError

if TYPE_CHECKING:
    from blindtune.data import Examples
    from blindtune.labels import Method, PrivateModel, TrainConfig, Trainer
    from blindtune.labels.losses import Loss

LABELS_HELP = "Column of labels: class names, integers or booleans."
DEFAULT_METHOD = "features"


def train(
    server: options.Servers,
    data: Annotated[
        str,
        typer.Option(
            help="Training data: a CSV, TSV, JSON lines or Parquet file, or a hub data set such as glue/sst2:train.",
            rich_help_panel=options.DATA,
        ),
    ],
    output: options.CheckpointFolder,
    text: options.TextColumns = ["text"],  # noqa: B006 - Typer copies it
    label: Annotated[str, typer.Option(help=LABELS_HELP, rich_help_panel=options.DATA)] = "label",
    classes: Annotated[
        str | None,
        typer.Option(
            help="Class names in order, separated by commas. Default: the classes in the data.",
            rich_help_panel=options.DATA,
        ),
    ] = None,
    validation: options.Validation = "0.1",
    max_length: Annotated[
        int | None,
        typer.Option(
            help="Number of tokens to which texts are truncated. Default: 128, or the model's limit if that is less.",
            rich_help_panel=options.DATA,
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="Training method. Default: features, which needs one server and sends nothing about labels. "
            "padded-lora trains adapters, and bounds what one of two operators learns. See `blindtune labels methods` "
            "for the others."
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Option of the method, as name=value, e.g. max_mu=0.1. Repeat for more."),
    ] = None,
    readout: options.ReadoutOption = None,
    store: options.Store = None,
    head: Annotated[
        str | None,
        typer.Option(
            help="Head: linear (fitted on frozen features first), mlp (128 and 32 hidden units) or pooler. The last "
            "two start from random weights. Default: linear, or that of p3eft's recipe."
        ),
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(
            help="Loss: cross_entropy (the default), or squared, which suits padded-lora.",
            rich_help_panel=options.TRAINING,
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            help="LoRA rank. Default: 32 for padded-lora, 8 for other methods.", rich_help_panel=options.ADAPTERS
        ),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            help="Option of LoRA, as name=value: alpha=64 (default: twice the rank) or target_modules=query,value "
            "(default: all linear layers). Repeat for more.",
            rich_help_panel=options.ADAPTERS,
        ),
    ] = None,
    layers: Annotated[
        str,
        typer.Option(
            help="Blocks that get adapters: all, upper (the upper half), or numbers such as 3-5,8.",
            rich_help_panel=options.ADAPTERS,
        ),
    ] = "upper",
    steps: options.Steps = None,
    batch_size: options.BatchSize = 32,
    lr: Annotated[
        float | None,
        typer.Option(
            help="Learning rate of the adapters. Default: the method's own.", rich_help_panel=options.TRAINING
        ),
    ] = None,
    training: options.More = None,
    resume: options.Resume = False,
    model: options.Model = None,
    token: options.Token = None,
    tls_ca: options.TlsCa = None,
    wait: options.Wait = 600.0,
    insecure: options.Insecure = False,
    json: options.Results = None,
) -> None:
    """Fine-tune a hosted model on private labels.

    Texts are sent to the servers; labels and the head stay here. With features, the default, one server is enough, and
    what it gets doesn't depend on labels. With --method padded-lora, each operator also gets an adapter under a pad and
    one share of each gradient, so give at least two operators that don't collude. Ctrl-C saves a checkpoint of a method
    that trains in steps, and --resume continues from it. The output folder holds the head, PEFT adapters, and the
    secrets of the run.

    Further training options (--training name=value): epochs, head_learning_rate, weight_decay, betas, warmup, floor,
    max_grad_norm, random_adam_moments, seed, save_every.

    Example: blindtune labels train --server https://a.example --data notes.csv --text note --label diagnosis
    --output out/
    """
    with reporting_errors():
        from blindtune.labels import TrainConfig, Trainer, make_method, method_class
        from blindtune.labels.losses import find_loss
        from blindtune.training import LabelsSummary, read_summary, steps_for

        connection: dict[str, Any] = {
            "store": options.store_folder(store),
            "token": token,
            "tls_ca": tls_ca,
            "wait": wait,
            "insecure": insecure,
            "model": model,
        }
        more = options.read_training(TrainConfig, training, steps=steps, batch_size=batch_size, learning_rate=lr)
        if not resume:
            options.refuse_checkpoint(output)
            kind = method_class(method or DEFAULT_METHOD)
            if not kind.by_steps:
                _refuse_unused(
                    kind.name, {"--steps": steps, "--lr": lr, "--loss": loss, "--rank": rank, "--lora": lora}, more
                )
        epochs, save_every, seed = more.pop("epochs", 3.0), more.pop("save_every", 10), more.get("seed", 0)
        examples, held_out = _read(data, text, label, options.parse_names(classes), validation, seed)
        more.setdefault("steps", steps_for(len(examples), batch_size, epochs))
        chosen = options.parse_settings(set_)
        if resume:
            summary = read_summary(output, LabelsSummary)
            algorithm = make_method(summary.method, summary.options)
        else:
            planned = {"steps": more["steps"], "batch_size": batch_size, "head_seed": seed}
            algorithm = make_method(method or DEFAULT_METHOD, chosen, **planned)
        config = TrainConfig(**algorithm.complete_training(more))
        if resume:
            private = _resume_model(
                server, output, connection, {"method": method, "head": head, "loss": loss, **chosen}
            )
        else:
            rank = algorithm.default_rank if rank is None else rank
            adapter = {"rank": rank, "layers": layers, **options.read_lora(lora, rank)}
            settings = {"max_length": max_length, **algorithm.reads, **options.read_readout(readout)}
            if len(text) == 1:
                settings.pop("pairs", None)
            head = head or algorithm.default_head
            connected = {**settings, **connection}
            criterion = find_loss(loss or "cross_entropy")
            private = _new_model(server, algorithm, head, len(examples.classes), adapter, connected, criterion, seed)
        if private.method.by_steps:
            trainer = Trainer(private, examples, config, checkpoint=output, save_every=save_every)
            result = _run(trainer, held_out, output, resume=resume)
        else:
            result = _fit(private, examples, held_out, output)
        _print_result(result)
        write_json(json, result)


def _refuse_unused(method: str, given: dict[str, Any], training: dict[str, Any]) -> None:
    """Raises `ConfigError` for options of training in steps, which the method doesn't do."""
    used = [name for name, value in given.items() if value is not None]
    used += [f"--training {name}" for name in training if name not in ("seed", "batch_size", "steps", "learning_rate")]
    if used:
        raise ConfigError(
            f"{method} isn't trained in steps, so it has no use for {used[0]}.",
            remedy="Leave it out, or name a method that trains adapters, such as --method padded-lora.",
        )


def methods() -> None:
    """List the methods of `blindtune labels train --method`, and the options of each."""
    with reporting_errors():
        from blindtune.labels.methods import METHODS
        from blindtune.labels.methods.base import option_names

        table = Table(title="Methods", title_justify="left")
        for column in ("method", "what it does", "options (--set)"):
            table.add_column(column)
        for name, kind in METHODS.items():
            summary = (kind.__doc__ or "").strip().split("\n")[0]
            table.add_row(name, summary, ", ".join(option_names(kind)) or "–")
        console.print(table)


def _read(
    data: str, text: list[str], label: str, classes: list[str] | None, validation: str, seed: int
) -> "tuple[Examples, Examples | None]":
    """Returns the training examples and the validation examples; None for no validation."""
    from blindtune.data import split_examples

    examples = options.read_examples(data, text, label, classes=classes)
    fraction = options.fraction_of(validation)
    if fraction is None:
        return examples, options.read_examples(validation, text, label, classes=examples.classes, split="validation")
    return split_examples(examples, fraction, seed) if fraction > 0 else (examples, None)


def _new_model(
    servers: list[str],
    algorithm: "Method",
    head: str,
    classes: int,
    lora: dict[str, Any],
    connection: dict[str, Any],
    loss: "Loss",
    seed: int,
) -> "PrivateModel":
    from blindtune.labels import PrivateModel, make_head

    make_head(head, 1, classes)  # an unknown name is refused before anything is sent
    backbone = options.connect(servers, num_adapters=0, **connection)
    if algorithm.num_adapters:
        backbone.adapter_config = options.make_lora_config(backbone.info, **lora)
    made = make_head(head, backbone.hidden_size, classes)
    return PrivateModel(backbone, made, algorithm, loss=loss, seed=seed)


def _resume_model(
    servers: list[str], folder: Path, connection: dict[str, Any], chosen: dict[str, Any]
) -> "PrivateModel":
    """Loads the model of a checkpoint.

    Raises:
        CheckpointError: a method or option that is given again differs from the checkpoint's.
    """
    from blindtune.labels import PrivateModel, adapter_config, method_class, readout_of
    from blindtune.labels.checkpoint import head_name
    from blindtune.training import LabelsSummary, read_summary

    summary = read_summary(folder, LabelsSummary)
    trained = {"method": summary.method, "head": head_name(summary), "loss": summary.loss, **summary.options}
    for name, value in chosen.items():
        if value is not None and value != trained.get(name):
            raise CheckpointError(
                f"{folder} was trained with {name} = {trained.get(name)!r}, not {value!r}.",
                remedy="Resume with the same options, or train from the start without --resume.",
            )
    if not method_class(summary.method).by_steps:
        raise CheckpointError(f"{folder} holds a finished run.", remedy="Use it with `blindtune labels predict`.")
    settings: dict[str, Any] = {**readout_of(summary), **connection, "model": connection["model"] or summary.model}
    backbone = options.connect(servers, adapter=adapter_config(folder), num_adapters=0, **settings)
    return PrivateModel.from_pretrained(folder, backbone)


def _run(trainer: "Trainer", held_out: "Examples | None", output: Path, *, resume: bool) -> dict[str, Any]:
    """Trains with a progress bar, evaluates, and returns the results. It leaves a checkpoint even if it fails."""
    from blindtune.cli.progress import StepBar, labels_status
    from blindtune.training import Interrupted

    private, config = trainer.model, trainer.config
    method = private.method
    _print_plan(private, trainer.train, config.steps, f"{config.steps} steps of {config.batch_size}", config)
    if resume:
        trainer.resume()
        console.print(f"Resumed after step {trainer.done}.")
    else:
        _prepare(trainer)
    try:
        trainer.run([StepBar(console, method.name, labels_status)])
    except (Interrupted, KeyboardInterrupt):
        console.print(f"Stopped after step {trainer.done}. Checkpoint: {output}. Go on with --resume.", soft_wrap=True)
        raise typer.Exit(130) from None
    except BudgetSpent as spent:
        console.print(f"[yellow]Stopped after step {trainer.done}.[/] {spent.message}", soft_wrap=True)
    except BlindtuneError:  # e.g. an operator doesn't answer, or a loss is NaN: the last complete step is saved
        console.print(
            f"[red]Stopped after step {trainer.done}.[/] Checkpoint: {output}. Go on with --resume.", soft_wrap=True
        )
        raise
    if lost := method.report().get("nonfinite_messages"):
        console.print(
            f"[red]{lost} messages held zeros, because a loss or an adapter had NaN or infinity.[/] Lower --lr. "
            "The run wasn't stopped, since that would have revealed something about labels.",
            soft_wrap=True,
        )
    result = {"method": method.name, "steps": trainer.done, "train_examples": len(trainer.train)}
    return _finish(private, held_out, output, result)


def _fit(private: "PrivateModel", examples: "Examples", held_out: "Examples | None", output: Path) -> dict[str, Any]:
    """Fits the head of a method that isn't trained in steps, evaluates, and returns the results."""
    from blindtune.cli.progress import fit_frozen

    _print_plan(private, examples, 1, "no step of training")
    fit_frozen(private, examples, [] if held_out is None else held_out.texts, console)
    result: dict[str, Any] = {"method": private.method.name, "train_examples": len(examples)}
    if private.choice is not None:
        chosen = private.choice.chosen
        result["chosen"] = str(chosen)
        if not math.isnan(chosen.accuracy):
            result["cross_validated_accuracy"] = chosen.accuracy
    private.save_pretrained(output, classes=examples.classes)
    return _finish(private, held_out, output, result)


def _finish(
    private: "PrivateModel", held_out: "Examples | None", output: Path, result: dict[str, Any]
) -> dict[str, Any]:
    """Evaluates the trained model, and returns the results with what the method reports and the traffic."""
    from blindtune.cli.progress import human_bytes, inference_progress
    from blindtune.labels import evaluate

    backbone, method = private.backbone, private.method
    if held_out is not None:
        bar = inference_progress(backbone, console, "validation", len(held_out))
        with bar if method.num_adapters else nullcontext():  # without adapters, everything was fetched before the fit
            result["validation"] = evaluate(private, held_out)
    traffic = backbone.traffic
    result |= method.report()
    result |= {"bytes_sent": traffic.sent, "bytes_received": traffic.received, "output": str(output)}
    console.print(
        f"Checkpoint: {output}  ({human_bytes(traffic.sent)} sent, {human_bytes(traffic.received)} received)",
        soft_wrap=True,
    )
    return result


def _print_plan(
    private: "PrivateModel", examples: "Examples", steps: int, training: str, config: "TrainConfig | None" = None
) -> None:
    """Prints what will be trained, and what each operator will see and can learn."""
    from blindtune.labels import exposure

    info = private.backbone.info
    console.print(
        f"{len(examples)} examples, {len(examples.classes)} classes, {training}; "
        f"{private.method.name} over {len(private.backbone.pool)} operator(s) that host {info.base_model_name} "
        f"(fingerprint {info.fingerprint[:12]}…)"
    )
    moments = 0.0 if config is None else config.random_adam_moments
    for line in exposure(private, steps, random_adam_moments=moments):
        console.print(f"  {line}", soft_wrap=True)
    earlier, combined = private.combined_guarantee(examples.texts)
    if earlier:
        console.print(
            f"  {earlier} earlier run(s) on this machine used labels of these texts. For one operator that saw all of "
            f"them and sees this one: μ = {combined.mu:.3g}, ε = {combined.epsilon:.3g} at δ = {combined.delta:g}.",
            soft_wrap=True,
        )


def _prepare(trainer: "Trainer") -> None:
    """Prepares the trainer with a progress bar, and prints the measured precision."""
    from blindtune.cli.progress import inference_progress
    from blindtune.labels.model import PROBE_TEXTS

    private = trainer.model
    with inference_progress(private.backbone, console, "frozen features", len(trainer.train)):
        trainer.prepare()
    if private.precision:
        numbers = ", ".join(f"{name.replace('_', ' ')} {error:.1%}" for name, error in private.precision.items())
        console.print(f"  Measured on {PROBE_TEXTS} texts, independently of labels: {numbers}.")


def _print_result(result: dict[str, Any]) -> None:
    """Prints the results as a table, in which each ε is shown with its δ."""
    deltas = {"label_epsilon": 0.0}
    deltas |= {f"{prefix}epsilon": result.get(f"{prefix}delta", 0.0) for prefix in ("", "gradient_channel_")}
    table = Table(title="Result", title_justify="left", show_header=False)
    flat = {**result, **{f"validation {name}": value for name, value in result.get("validation", {}).items()}}
    for name, value in flat.items():
        if not isinstance(value, dict) and name not in ("delta", "gradient_channel_delta"):
            title = name.replace("_", " ") + (f" (δ = {deltas[name]:g})" if name in deltas else "")
            table.add_row(title, f"{value:.4f}" if isinstance(value, float) else str(value))
    console.print(table)
