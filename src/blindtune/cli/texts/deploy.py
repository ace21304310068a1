"""`blindtune texts deploy`: uploads tuned parts to the provider, who uses them with the real trunk of the model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blindtune.cli import options
from blindtune.cli.console import console, reporting_errors, write_json
from blindtune.cli.texts.train import QUESTION, evaluate, make_fields, print_result
from blindtune.errors import ConfigError

if TYPE_CHECKING:
    from blindtune.client import DeployedModel, Operator
    from blindtune.data.questions import Fields, TokenizedQuestion
    from blindtune.training import TextsSummary


def deploy(
    checkpoint: options.TunedEnds,
    server: options.CutServer,
    data: Annotated[
        str | None,
        typer.Option(
            help="Questions to evaluate on: a CSV, TSV, JSON lines or Parquet file, or a hub data set.",
            rich_help_panel=options.DATA,
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="Task: choice, classification, instruction or text. Default: the checkpoint's.",
            rich_help_panel=options.DATA,
        ),
    ] = None,
    question: options.Question = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Text that the model continues. Repeat for more.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Largest number of tokens to generate for each --prompt.")] = 64,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 always picks the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    model: options.Model = None,
    token: options.Token = None,
    tls_ca: options.TlsCa = None,
    wait: options.Wait = 600.0,
    insecure: options.Insecure = False,
    json: options.Results = None,
) -> None:
    """Upload tuned parts to the provider, who uses them with the real trunk of the model; evaluate or use the result.

    This is the last step of offline and offsite: the ends were tuned around an emulator, and are now used with the
    trunk that it stands for. The provider gets the tuned weights, which depend on the training texts (`blindtune texts
    membership` measures how much), and sees the texts of --data and --prompt. Without these two options the parts are
    only uploaded and checked.

    Example: blindtune texts deploy out/ --server https://a.example --data test.jsonl
    """
    with reporting_errors():
        from blindtune.client import DeployedModel
        from blindtune.texts import DeployedScorer, read_tuned_parts

        operator = options.connect_operator(
            server, token=token, tls_ca=tls_ca, wait=wait, insecure=insecure, model=model
        )
        trained = read_summary_if_any(checkpoint)
        tensors, scaling = read_tuned_parts(checkpoint)
        deployed = DeployedModel(operator, tensors, scaling)
        result: dict[str, Any] = {"tuned_parts": deployed.sha256, "bytes": deployed.nbytes}
        weights = sum(tensor.numel() for tensor in tensors.values())
        console.print(
            f"Uploaded {weights:,} tuned weights ({deployed.nbytes:,} bytes) to {server}, for the real trunk of "
            f"{operator.info.base_model_name}: tuned parts {deployed.sha256}",
            soft_wrap=True,
        )
        if data is not None:
            fields = chosen_fields(trained, task, question)
            questions = read_questions(operator, data, fields, "test", 128 if trained is None else trained.max_length)
            result["zero_shot"] = evaluate(DeployedScorer(DeployedModel(operator)), questions, "pretrained model")
            result["deployed"] = evaluate(DeployedScorer(deployed), questions, "tuned parts")
            print_result({key: result[key] for key in ("zero_shot", "deployed")})
        result["texts"] = [_write(operator, deployed, text, max_new_tokens, temperature, seed) for text in prompt or []]
        write_json(json, result)


def read_summary_if_any(checkpoint: Path) -> "TextsSummary | None":
    """Returns the run's summary; None for a checkpoint of other tools. Raises `CheckpointError` as `read_summary`."""
    from blindtune.files import SUMMARY
    from blindtune.training import TextsSummary, read_summary

    return read_summary(checkpoint, TextsSummary) if (checkpoint / SUMMARY).is_file() else None


def chosen_fields(trained: "TextsSummary | None", task: str | None, question: list[str] | None) -> "Fields":
    """Returns how questions are read: as in training, except for the options that are given now.

    Raises:
        ConfigError: the task is unknown, or neither given nor in the summary.
    """
    from blindtune.data.questions import Fields

    before = {} if trained is None else dict(trained.fields)
    kind = task or before.get("kind")
    if kind is None:
        raise ConfigError("The checkpoint doesn't say its task.", remedy="Give --task.")
    given = vars(make_fields(kind, question))
    asked = set(options.parse_settings(question, QUESTION)) | {"kind"}
    return Fields(**{**before, **{name: value for name, value in given.items() if name in asked or name not in before}})


def read_questions(
    operator: "Operator", data: str, fields: "Fields", split: str, max_length: int
) -> list["TokenizedQuestion"]:
    """Reads questions from a file or a hub data set, and tokenizes them for a hosted model."""
    from blindtune.data.questions import load_questions, tokenize

    questions = load_questions(data, fields, split=split)
    return tokenize(questions, operator.tokenizer(), max_length=min(max_length, operator.info.limits.max_length))


def _write(
    operator: "Operator", deployed: "DeployedModel", prompt: str, max_new_tokens: int, temperature: float, seed: int
) -> str:
    tokenizer = operator.tokenizer()
    row = tokenizer.rows([prompt], max_length=operator.info.limits.max_length)[0]
    new = deployed.generate(row.ids, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    text = tokenizer.text(new)
    console.print(f"[dim]{prompt}[/]{text}", soft_wrap=True)
    return text
