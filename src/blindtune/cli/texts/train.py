"""`blindtune texts train`: fine-tunes a hosted decoder on private texts, with its ends here and its trunk elsewhere."""

import json as json_module
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.table import Table

from blindtune.checks import check_counts
from blindtune.cli import options
from blindtune.cli.console import console, reporting_errors, write_json
from blindtune.errors import BlindtuneError, ConfigError

if TYPE_CHECKING:
    from blindtune.data.questions import Fields, Question, TokenizedQuestion
    from blindtune.texts import Scorer, Trainer
    from blindtune.texts.session import Session, Tuning

QUESTION = {"template": None, "choices": "choices", "answer": "answer", "label": "label", "classes": None}
"""Options of `--question`, and their defaults."""


def train(
    server: options.CutServer,
    data: Annotated[
        str,
        typer.Option(
            help="Training data: a CSV, TSV, JSON lines or Parquet file, or a hub data set such as piqa:train.",
            rich_help_panel=options.DATA,
        ),
    ],
    output: options.CheckpointFolder,
    task: Annotated[
        str,
        typer.Option(help="Task: choice, classification, instruction or text.", rich_help_panel=options.DATA),
    ] = "choice",
    question: options.Question = None,
    validation: options.Validation = "0.1",
    max_length: Annotated[
        int,
        typer.Option(
            help="Number of tokens to which texts are truncated, or the model's limit if that is less.",
            rich_help_panel=options.DATA,
        ),
    ] = 128,
    design: Annotated[
        str,
        typer.Option(
            help="Design: online, gradfree, offline (nothing of the texts is sent) or offsite. See the documentation."
        ),
    ] = "offline",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Option of the design, as name=value, e.g. noise=0.02. Repeat for more."),
    ] = None,
    tune: Annotated[
        list[str] | None,
        typer.Option(
            help="Weights to train: full (whole blocks of the ends), or an option of LoRA: rank=16, alpha=32 or "
            "target_modules=q_proj,v_proj. Repeat for more.",
            rich_help_panel=options.ADAPTERS,
        ),
    ] = None,
    start: Annotated[
        Path | None,
        typer.Option(help="Checkpoint whose tuned parts training starts from.", rich_help_panel=options.ADAPTERS),
    ] = None,
    device: Annotated[
        str,
        typer.Option(help="Torch device of the ends and of an emulator, such as cpu, cuda or cuda:1."),
    ] = "cpu",
    steps: options.Steps = None,
    batch_size: options.BatchSize = 32,
    lr: Annotated[float, typer.Option(help="Learning rate.", rich_help_panel=options.TRAINING)] = 1e-3,
    training: options.More = None,
    resume: options.Resume = False,
    ground_truth: Annotated[
        Path | None,
        typer.Option(help="File for the tokens of each message, with which an audit is scored. It stays here."),
    ] = None,
    model: options.Model = None,
    token: options.Token = None,
    tls_ca: options.TlsCa = None,
    wait: options.Wait = 600.0,
    insecure: options.Insecure = False,
    provider_key: options.ProviderKey = None,
    json: options.Results = None,
) -> None:
    """Fine-tune a hosted decoder on private texts.

    The server has to offer the ends of a decoder (`blindtune serve --cut`). They run and are tuned here, together with
    the server's trunk or with an emulator of it. The designs online and gradfree send hidden states, which reveal much
    of the texts unless noise prevents it. The designs offline and offsite send nothing until you hand over the tuned
    parts (`blindtune texts deploy`). Ctrl-C saves a checkpoint, and --resume continues from it.

    Further training options (--training name=value): epochs, weight_decay, betas, warmup, floor, max_grad_norm, seed,
    save_every, cache_mb (largest size in MiB of the hidden states that gradfree stores).

    Example: blindtune texts train --server https://a.example --data questions.jsonl --task choice --output out/
    """
    with reporting_errors():
        from blindtune.data.questions import tokenize
        from blindtune.models.devices import find_device
        from blindtune.texts import TrainConfig, Trainer, make_design
        from blindtune.texts.session import open_session
        from blindtune.training import steps_for

        if not resume:
            options.refuse_checkpoint(output)
        more = options.read_training(
            TrainConfig, training, ("cache_mb",), steps=steps, batch_size=batch_size, learning_rate=lr
        )
        cache_mb = more.pop("cache_mb", 2048)
        epochs, save_every, seed = more.pop("epochs", 3.0), more.pop("save_every", 10), more.get("seed", 0)
        fields, tuning = make_fields(task, question), read_tuning(tune, start)
        find_device(device)  # raises before anything is sent
        questions, held_out, fields = _read(data, fields, validation, seed)
        chosen = make_design(design, options.parse_settings(set_))
        operator = options.connect_operator(
            server, token=token, tls_ca=tls_ca, wait=wait, insecure=insecure, model=model
        )
        with console.status("Fetching the model's ends …"):
            session = open_session(
                operator,
                chosen,
                tuning,
                seed=seed,
                device=device,
                trusted_key=provider_key,
                store=output / "smashed",
                store_bytes=cache_mb * 2**20,
            )
        if start is not None:
            console.print(f"Starts from the tuned parts in {start}.", soft_wrap=True)
        length = min(max_length, operator.info.limits.max_length)
        tokenizer = operator.tokenizer()
        tokenized = tokenize(questions, tokenizer, max_length=length)
        more.setdefault("steps", steps_for(len(tokenized), batch_size, epochs))
        session.check_room(tokenized)
        trainer = Trainer(
            session.model, session.ends, chosen, tokenized, TrainConfig(**more),
            summary=session.summary(max_length=length, fields=fields), checkpoint=output, save_every=save_every,
            meter=session.costs,
        )  # fmt: skip
        result = _run(trainer, session, output, ground_truth, resume=resume)
        if held_out:
            if ground_truth is not None:
                session.model.boundary.on_sent = _ground_truth_writer(ground_truth, "validation")
            result["validation"] = evaluate(
                session.model, tokenize(held_out, tokenizer, max_length=length), "validation"
            )
        result["output"] = str(output)
        print_result(result)
        write_json(json, result)


def make_fields(task: str, question: list[str] | None) -> "Fields":
    """Returns how questions are read, from `--task` and `--question`. `\\n` in a template means a new line.

    Raises:
        ConfigError: the task or an option is unknown, or the task doesn't use the option.
    """
    from blindtune.data.questions import KINDS, OPTIONS, Fields

    if task not in KINDS:
        raise ConfigError(f"There is no task {task!r}.", remedy=f"Use one of: {', '.join(KINDS)} (--task).")
    chosen: dict[str, Any] = {n: str(value) for n, value in options.parse_settings(question, QUESTION).items()}
    for name in chosen:
        if name not in OPTIONS[task]:
            raise ConfigError(
                f"--question {name}=… has no effect with the task {task!r}.",
                remedy=f"Options of this task: {', '.join(OPTIONS[task])}.",
            )
    if "template" in chosen:
        chosen["template"] = chosen["template"].replace("\\n", "\n")
    if "classes" in chosen:
        chosen["classes"] = options.parse_names(chosen["classes"])
    return Fields(task, **chosen)


def read_tuning(tune: list[str] | None, start: Path | None) -> "Tuning":
    """Reads `--tune` and `--start`. Raises `ConfigError` for an unknown option or a value that isn't a count."""
    from blindtune.texts.session import DEFAULT_RANK, Tuning

    kinds = [setting for setting in tune or [] if "=" not in setting]
    if any(kind not in ("lora", "full") for kind in kinds):
        raise ConfigError(f"--tune {kinds[0]} is unknown.", remedy="Use lora, full, or an option such as rank=16.")
    chosen = options.parse_settings([s for s in tune or [] if "=" in s], {"rank": 0, "alpha": 0, "target_modules": ""})
    targets = chosen.pop("target_modules", None)
    check_counts(**chosen)
    return Tuning(
        cast(Any, kinds[-1] if kinds else "lora"),
        chosen.get("rank", DEFAULT_RANK),
        chosen.get("alpha"),
        None if targets is None else options.parse_names(str(targets)),
        start,
    )


def _read(
    data: str, fields: "Fields", validation: str, seed: int
) -> tuple[list["Question"], list["Question"], "Fields"]:
    """Returns the training questions, the validation questions, and the fields with the class names of `data`."""
    from blindtune.data.questions import load_questions, with_classes
    from blindtune.data.tables import split_indices

    fraction = options.fraction_of(validation)
    questions = load_questions(data, fields)
    fields = with_classes(fields, questions)
    if fraction is None:
        return questions, load_questions(validation, fields, split="validation"), fields
    kept, held_out = split_indices(len(questions), round(len(questions) * fraction), seed)
    return [questions[i] for i in kept], [questions[i] for i in held_out], fields


def _run(
    trainer: "Trainer", session: "Session", output: Path, ground_truth: Path | None, *, resume: bool
) -> dict[str, Any]:
    """Trains with a progress bar, and returns the results. It leaves a checkpoint even if it fails."""
    from blindtune.cli.progress import StepBar, human_bytes, texts_status
    from blindtune.texts.costs import reset_peak_memory
    from blindtune.training import Interrupted

    _print_plan(trainer, session)
    if resume:
        trainer.resume()
        console.print(f"Resumed after step {trainer.done}.")
    if ground_truth is not None:
        session.model.boundary.on_sent = _ground_truth_writer(ground_truth, "train")
    reset_peak_memory()
    try:
        done = trainer.run([StepBar(console, session.design.name, texts_status)])
    except (Interrupted, KeyboardInterrupt):
        console.print(f"Stopped after step {trainer.done}. Checkpoint: {output}. Go on with --resume.", soft_wrap=True)
        raise typer.Exit(130) from None
    except BlindtuneError:
        console.print(
            f"[red]Stopped after step {trainer.done}.[/] Checkpoint: {output}. Go on with --resume.", soft_wrap=True
        )
        raise
    costs = trainer.costs
    recent = done[-20:]
    console.print(
        f"Checkpoint: {output}  ({human_bytes(costs.sent)} sent, {human_bytes(costs.received)} received, "
        f"the ends included; {costs.flops / 1e12:.2f} TFLOP and a peak memory of {human_bytes(costs.memory)} here)",
        soft_wrap=True,
    )
    return {
        "method": session.design.name,
        "steps": trainer.done,
        "train_examples": len(trainer.train),
        "train_loss": sum(step.losses["task"] for step in recent) / len(recent) if recent else None,
        "traffic": costs.traffic,
        "bytes_sent": costs.sent,
        "bytes_received": costs.received,
        "seconds": costs.seconds,
        "client_flops": costs.flops,
        "peak_memory_bytes": costs.memory,
    }


def _print_plan(trainer: "Trainer", session: "Session") -> None:
    """Prints what will be trained, and what the server will see."""
    info, design, config = session.operator.info, session.design, trainer.config
    *others, last = ("emulator" if part == "trunk" else part for part in design.parts)
    trained = f"{', '.join(others)} and {last}" if others else last
    numbers = sum(parameter.numel() for parameter in session.ends.parameters())
    console.print(
        f"{len(trainer.train)} examples, {config.steps} steps of {config.batch_size}; {design.name} trains {numbers:,} "
        f"weights of the {trained} of {info.base_model_name} (fingerprint {info.fingerprint[:12]}…)"
    )
    if info.cut is not None:
        console.print(
            f"  The client holds {session.weights_shared:.0%} of its weights: {info.cut.bottom} bottom and "
            f"{info.cut.top} top blocks, embeddings and LM head"
            + ("" if session.manifest is None else f"; and an emulator of {session.manifest.parameters:,} weights"),
            soft_wrap=True,
        )
    epochs = math.ceil(config.steps * config.batch_size / len(trainer.train))
    console.print(f"  {session.operator.transport.url}  {design.exposure(epochs)}", soft_wrap=True)


def _ground_truth_writer(path: Path, part: str) -> Callable[[str, list[list[int]]], None]:
    """Returns a callback that appends the tokens of each message to a local file, for `blindtune texts audit`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)

    def write(forward: str, rows: list[list[int]]) -> None:
        with path.open("a") as file:
            file.write(json_module.dumps({"forward": forward, "ids": rows, "part": part}) + "\n")

    return write


def evaluate(model: "Scorer", questions: list["TokenizedQuestion"], title: str) -> dict[str, float]:
    """Computes a model's scores on questions by likelihood, with a progress bar."""
    from blindtune.cli.progress import Bars
    from blindtune.texts import evaluate_questions

    scores: dict[str, float] = {}
    with Bars(console=console) as progress:
        task = progress.add_task(title, total=len(questions))
        for _, latest in evaluate_questions(model, questions):
            scores = latest
            progress.advance(task)
    if all(len(question.rows) == 1 for question in questions):  # nothing to choose between
        return {"loss": scores["loss"]}
    return scores


def print_result(result: dict[str, Any]) -> None:
    """Prints the results as a table. Nested numbers have rows of their own."""
    table = Table(title="Result", title_justify="left", show_header=False)
    for name, value in result.items():
        nested = cast("dict[str, Any]", value) if isinstance(value, dict) else {"": value}
        for key, number in nested.items():
            shown = f"{number:.4f}" if isinstance(number, float) else f"{number}"
            table.add_row(f"{name} {key}".strip().replace("_", " "), shown)
    console.print(table)
