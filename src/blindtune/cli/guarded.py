"""`blindtune train --method guarded-…`: training data stay here, the middle of the model runs elsewhere."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import typer
from rich.table import Table

from blindtune.cli import options
from blindtune.cli.console import console
from blindtune.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from blindtune.client import Operator
    from blindtune.methods.guarded import Design, Ends, SplitCausalLM
    from blindtune.training.guarded import Costs, GuardedConfig, GuardedTrainer, Scorer
    from blindtune.training.questions import Fields, Question, TokenizedQuestion

DEFAULT_RANK, DEFAULT_LR, DEFAULT_LENGTH = 16, 1e-3, 128


@dataclass(frozen=True)
class Tuning:
    """What of the ends is trained, and what it starts from."""

    trained: str = "lora"
    rank: int | None = None
    alpha: int | None = None
    targets: list[str] | None = None
    start: Path | None = None
    """A checkpoint whose tuned ends are taken over, such as a bottom that was decorrelated on public texts."""


@dataclass(frozen=True)
class Data:
    """Files and how questions are read from them."""

    train: str
    fields: "Fields"
    classes: list[str] | None
    validation: str | None
    validation_fraction: float
    split: str
    validation_split: str | None
    max_length: int | None


@dataclass(frozen=True)
class Session:
    """The provider's model as the client holds it."""

    operator: "Operator"
    model: "SplitCausalLM"
    ends: "Ends"
    design: "Design"
    manifest: dict[str, Any] | None = None


def make_fields(task: str, template: str | None, **columns: str) -> "Fields":
    """Raises `ConfigError` for an unknown task. `\\n` in a template is a new line."""
    from blindtune.training.questions import KINDS, Fields

    if task not in KINDS:
        raise ConfigError(f"There is no task {task!r}.", remedy=f"Use one of: {', '.join(KINDS)} (--task).")
    written = None if template is None else template.replace("\\n", "\n")
    return Fields(task, written, **columns)


def train_guarded(
    servers: list[str],
    method: str,
    chosen: dict[str, Any],
    data: Data,
    tuning: Tuning,
    config: "GuardedConfig",
    output: Path,
    connection: dict[str, Any],
    *,
    save_every: int,
    resume: bool,
    cache_mb: int,
    truth: Path | None,
    trusted_key: str | None,
    device: str,
    steps: int | None,
    epochs: float,
) -> dict[str, Any]:
    """Connects, trains with progress, leaves a checkpoint however it ends, and evaluates."""
    from blindtune.methods.guarded import make_design
    from blindtune.methods.state import SUMMARY
    from blindtune.training import steps_for
    from blindtune.training.guarded import GuardedTrainer
    from blindtune.training.questions import tokenize

    if output.exists() and not resume and (output / SUMMARY).is_file():
        raise CheckpointError(f"{output} holds a checkpoint.", remedy="Use another --output, or go on with --resume.")
    questions, held_out = _load(data, config.seed)
    design = make_design(method, chosen)
    session = open_session(
        servers, design, tuning, connection, seed=config.seed, trusted_key=trusted_key, device=device
    )
    if tuning.start is not None:
        take_over(session.ends, tuning.start)
    length = min(data.max_length or DEFAULT_LENGTH, session.operator.info.limits.max_length)
    tokenizer = session.operator.tokenizer()
    train = tokenize(questions, tokenizer, max_length=length)
    validation = tokenize(held_out, tokenizer, max_length=length)
    count = steps if steps is not None else steps_for(len(train), config.batch_size, epochs)
    config = replace(config, steps=count)
    _prepare_store(session, train, output, cache_mb)
    summary = _summary(session, chosen, tuning, data, length)
    trainer = GuardedTrainer(
        session.model, session.ends, design, train, config, summary=summary, checkpoint=output, save_every=save_every,
        meter=lambda: _metered(session),
    )  # fmt: skip
    _announce(session, len(train), config)
    if resume:
        trainer.resume()
        console.print(f"Resumed after step {trainer.done}.")
    if truth is not None:
        session.model.on_sent = _truth_writer(truth, "train")
    result = _run(trainer, session, output)
    if truth is not None:
        session.model.on_sent = _truth_writer(truth, "validation")
    if validation:
        result["validation"] = evaluate(session.model, validation, "validation")
    return {**result, "output": str(output)}


def open_session(
    servers: list[str],
    design: "Design",
    tuning: Tuning,
    connection: dict[str, Any],
    *,
    seed: int,
    trusted_key: str | None,
    device: str = "cpu",
) -> Session:
    """Ends and middle of the hosted model. One server: hidden states are not shared between operators.

    Raises:
        ConfigError: several servers, or no such device.
    """
    from blindtune.client import RemoteTrunk, fetch_emulator, fetch_part
    from blindtune.methods.guarded import Ends, SplitCausalLM
    from blindtune.models.devices import find_device
    from blindtune.models.split import tie

    place = find_device(device)
    if len(servers) != 1:
        raise ConfigError(f"{len(servers)} servers for a split model.", remedy="Give the one that hosts its trunk.")
    operator = options.connect_operator(servers[0], **connection)
    up, down = design.codecs()
    trunk = None if design.emulated else RemoteTrunk(operator, up=up, down=down)
    with console.status("Fetching the model's ends …"):
        bottom, top = (fetch_part(operator, name).float() for name in ("bottom", "top"))
        tie(bottom, top)
        emulator, manifest = fetch_emulator(operator, trusted_key) if design.emulated else (None, None)
    rank = tuning.rank or DEFAULT_RANK
    emulator = None if emulator is None else emulator.float()
    ends = Ends(
        bottom, top, design.parts, cast(Any, tuning.trained), rank=rank, alpha=tuning.alpha or 2 * rank,
        targets=tuning.targets, seed=seed, emulator=emulator,
    )  # fmt: skip
    for part in filter(None, (bottom, top, emulator)):  # after LoRA was drawn, which is alike for every device
        part.to(place)
    middle = emulator or trunk
    assert middle is not None  # noqa: S101 - one of the two
    told = None if manifest is None else json.loads(manifest.model_dump_json())
    return Session(operator, SplitCausalLM(bottom, top, middle), ends, design, told)


def take_over(ends: "Ends", folder: Path) -> None:
    """Starts from the tuned ends of a checkpoint, merged where they aren't trained on. Raises `CheckpointError`."""
    from blindtune.methods.guarded.ends import merge_checkpoint

    merge_checkpoint(ends, folder)
    console.print(f"Starts from the tuned ends in {folder}.", soft_wrap=True)


def _load(data: Data, seed: int) -> tuple[list["Question"], list["Question"]]:
    from blindtune.training.data import split_indices
    from blindtune.training.questions import load_questions

    questions = load_questions(data.train, data.fields, classes=data.classes, split=data.split)
    if data.validation or data.validation_split:
        source, split = data.validation or data.train, data.validation_split or "validation"
        return questions, load_questions(source, data.fields, classes=data.classes, split=split)
    kept, held_out = split_indices(len(questions), round(len(questions) * data.validation_fraction), seed)
    return [questions[i] for i in kept], [questions[i] for i in held_out]


def _prepare_store(session: Session, train: list["TokenizedQuestion"], output: Path, cache_mb: int) -> None:
    """Gradfree's store, refused before anything is sent if the texts have no room in it."""
    from blindtune.methods.guarded import Gradfree, SmashedStore
    from blindtune.models.backbone import tensors_sha256

    design = session.design
    if not isinstance(design, Gradfree) or design.zo:
        return
    info = session.operator.info
    bottom = tensors_sha256(session.ends.bottom.weights())
    disturbed = f"{design.up} {design.down} {design.noise} {design.clip_norm} {design.anonymity}"
    identity = f"{info.fingerprint} {bottom} {disturbed}"
    design.store = SmashedStore(
        info.hidden_size, design.down, max_bytes=cache_mb * 2**20, folder=output / "smashed", identity=identity
    )
    missing = {question.row for question in train if question.row not in design.store}
    design.store.check_room(sum(len(row) for row in missing))


def _summary(session: Session, chosen: dict[str, Any], tuning: Tuning, data: Data, length: int) -> dict[str, Any]:
    from blindtune.methods.guarded import read_run

    info = session.operator.info
    assert info.split is not None  # noqa: S101 - parts were fetched
    return {
        "method": session.design.name,
        "options": asdict(cast(Any, session.design)),
        "model": info.name,
        "base_model": info.base_model_name,
        "fingerprint": info.fingerprint,
        "cut": [info.split.bottom, info.split.top],
        "trained": tuning.trained,
        "rank": session.ends.rank,
        "alpha": session.ends.alpha,
        "targets": session.ends.targets,
        "start": read_run(tuning.start) if tuning.start else None,
        "parts": list(session.design.parts),
        "max_length": length,
        "fields": asdict(data.fields),
        "emulator": session.manifest,
    }


def _announce(session: Session, count: int, config: "GuardedConfig") -> None:
    info, design = session.operator.info, session.design
    assert info.split is not None  # noqa: S101 - parts were fetched
    *others, last = ("emulator" if part == "trunk" else part for part in design.parts)
    trained = f"{', '.join(others)} and {last}" if others else last
    numbers = sum(parameter.numel() for parameter in session.ends.parameters())
    console.print(
        f"{count} examples, {config.steps} steps of {config.batch_size}; {design.name} trains {numbers:,} weights of "
        f"the {trained} of {info.base_model_name} (fingerprint {info.fingerprint[:12]}…)"
    )
    share, cut = info.split.weights_shared, info.split
    console.print(
        f"  {share:.0%} of its weights are here: {cut.bottom} bottom and {cut.top} top blocks, embeddings and LM head",
        soft_wrap=True,
    )
    epochs = math.ceil(config.steps * config.batch_size / count)
    console.print(f"  {session.operator.transport.url}  {_sees(design, epochs)}", soft_wrap=True)


def _sees(design: "Design", epochs: int) -> str:
    """What the server will be able to see.

    Args:
        epochs: how often a text is sent, if it is sent in every step that it is part of.
    """
    from blindtune.methods.guarded import Gradfree, Online
    from blindtune.privacy.token_noise import row_mu

    up, down = design.codecs()
    if design.emulated:
        return "sees nothing of the texts; the emulator of its middle has come here"
    noise = getattr(design, "noise", 0)
    views = design.views(epochs)
    disturbed = f", clipped, with noise of {noise:g} clipping norms on each value" if noise else ""
    if noise:
        disturbed += f" (μ = {row_mu(noise, views):.2f} for one row of a text, after {views} messages)"
    hidden = f"sees every token's hidden state ({up} up, {down} down){disturbed}"
    if isinstance(design, Gradfree) and design.anonymity:
        hidden += f", but of each token only which group of {design.anonymity} it is in"
    if isinstance(design, Gradfree):
        return f"{hidden}, once for each text, and no gradient" if not design.zo else f"{hidden}, and no gradient"
    weight = design.decorrelation_weight if isinstance(design, Online) else 0
    guarded = f", decorrelated with weight {weight:g}" if weight else ": it can read the texts"
    return f"{hidden}, and gradients, in every step{guarded}"


def _truth_writer(path: Path, part: str) -> Callable[[str, list[list[int]]], None]:
    """Appends what was in each message to a file that stays here, for `blindtune audit --truth`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)

    def write(forward: str, rows: list[list[int]]) -> None:
        with path.open("a") as file:
            file.write(json.dumps({"forward": forward, "ids": rows, "part": part}) + "\n")

    return write


def _run(trainer: "GuardedTrainer", session: Session, output: Path) -> dict[str, Any]:
    from blindtune.cli.progress import Interrupted, human_bytes, run_guarded_steps
    from blindtune.errors import BlindtuneError

    try:
        done = run_guarded_steps(trainer, console, session.design.name)
    except (Interrupted, KeyboardInterrupt):
        trainer.save()
        console.print(f"Stopped after step {trainer.done}. Checkpoint: {output}. Go on with --resume.", soft_wrap=True)
        raise typer.Exit(130) from None
    except BlindtuneError:
        trainer.save()
        console.print(
            f"[red]Stopped after step {trainer.done}.[/] Checkpoint: {output}. Go on with --resume.", soft_wrap=True
        )
        raise
    trainer.save()
    costs = trainer.costs
    recent = done[-20:]
    loss = sum(step.losses["task"] for step in recent) / len(recent) if recent else None
    console.print(
        f"Checkpoint: {output}  ({human_bytes(costs.sent)} sent, {human_bytes(costs.received)} received, parts too; "
        f"{costs.flops / 1e12:.2f} TFLOP and at most {human_bytes(costs.memory)} of memory here)",
        soft_wrap=True,
    )
    return {
        "method": session.design.name,
        "steps": trainer.done,
        "train_examples": len(trainer.train),
        "train_loss": loss,
        "traffic": costs.traffic,
        "bytes_sent": costs.sent,
        "bytes_received": costs.received,
        "seconds": costs.seconds,
        "client_flops": costs.flops,
        "peak_memory_bytes": costs.memory,
    }


def _metered(session: Session) -> "Costs":
    """All messages of this process, and its memory, here and on a GPU."""
    from blindtune.cli.progress import peak_device_memory, peak_memory
    from blindtune.training.guarded import Costs

    traffic = session.operator.transport.traffic
    memory = peak_memory() + peak_device_memory(session.model.device)
    return Costs(sent=traffic.sent, received=traffic.received, memory=memory)


def evaluate(model: "Scorer", questions: list["TokenizedQuestion"], title: str) -> dict[str, float]:
    """Accuracy by likelihood, with progress."""
    from blindtune.cli.progress import Bars
    from blindtune.training.guarded import evaluate_questions

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
    """One table, nested numbers in rows of their own."""
    table = Table(title="Result", title_justify="left", show_header=False)
    for name, value in result.items():
        nested = cast("dict[str, Any]", value) if isinstance(value, dict) else {"": value}
        for key, number in nested.items():
            shown = f"{number:.4f}" if isinstance(number, float) else f"{number}"
            table.add_row(f"{name} {key}".strip().replace("_", " "), shown)
    console.print(table)
