"""`blindtune plug-in`: tuned ends go to the provider, and are tried around the real middle of the model."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from blindtune.cli import options
from blindtune.cli.console import console, reporting_errors, write_json
from blindtune.errors import ConfigError

if TYPE_CHECKING:
    from blindtune.client import Operator, RemotePlugin
    from blindtune.training.questions import Fields, TokenizedQuestion


def plug_in(
    checkpoint: options.TunedEnds,
    server: options.SplitServer,
    data: Annotated[
        str | None, typer.Option(help="Questions to evaluate on: CSV, TSV, JSON lines, Parquet, or a hub data set.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of a hub data set.")] = "test",
    task: Annotated[
        str | None, typer.Option(help="choice, classification or instruction; the checkpoint's if left out.")
    ] = None,
    template: Annotated[str | None, typer.Option(help="The prompt, with columns in braces; as trained.")] = None,
    choices: Annotated[str | None, typer.Option(help="Column of the choices; as trained.")] = None,
    answer: Annotated[str | None, typer.Option(help="Column of the right choice, or of answers; as trained.")] = None,
    label: Annotated[str | None, typer.Option(help="Column of labels; as trained.")] = None,
    classes: Annotated[str | None, typer.Option(help="Class names in order, separated by commas.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A text to go on with; repeat for more.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to write for each --prompt.")] = 64,
    temperature: Annotated[float, typer.Option(help="Of sampling; 0 for the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    model: options.Model = None,
    token: options.Token = None,
    tls_ca: options.TlsCa = None,
    wait: options.Wait = 600.0,
    insecure: options.Insecure = False,
    json: options.Results = None,
) -> None:
    """Hand tuned ends to the provider, who puts them around the real middle of the model; evaluate or use that.

    This is the last step of guarded-offline and offsite: ends were tuned around an emulator, and are used around what
    it stands for. The provider gets the tuned weights, which depend on the training texts (`blindtune membership` says
    how much), and sees the texts of --data and --prompt. Without those two the ends are only uploaded and checked.

    Example:  blindtune plug-in out/ --server https://a.example --data test.jsonl
    """
    with reporting_errors():
        from blindtune.cli.guarded import print_result
        from blindtune.client import RemotePlugin
        from blindtune.methods.guarded import read_run, read_tuned

        operator = options.connect_operator(
            server, token=token, tls_ca=tls_ca, wait=wait, insecure=insecure, model=model
        )
        tensors, scaling = read_tuned(checkpoint)
        trained = read_run(checkpoint)
        plugin = RemotePlugin(operator, tensors, scaling)
        result: dict[str, Any] = {"plugin": plugin.sha256, "bytes": plugin.nbytes}
        numbers = sum(tensor.numel() for tensor in tensors.values())
        console.print(
            f"{numbers:,} tuned weights ({plugin.nbytes:,} bytes) are at {server}, around the real middle of "
            f"{operator.info.base_model_name}: plug-in {plugin.sha256}",
            soft_wrap=True,
        )
        if data is not None:
            given = {"kind": task, "template": template, "choices": choices, "answer": answer, "label": label}
            fields = chosen_fields(trained, given)
            names = options.parse_names(classes)
            questions = read_test(operator, data, fields, names, split, int(trained.get("max_length", 128)))
            result["zero_shot"] = _evaluate(RemotePlugin(operator), questions, "model as it is")
            result["plug_in"] = _evaluate(plugin, questions, "plugged in")
            print_result({key: result[key] for key in ("zero_shot", "plug_in")})
        result["texts"] = [_write(operator, plugin, text, max_new_tokens, temperature, seed) for text in prompt or []]
        write_json(json, result)


def chosen_fields(trained: dict[str, Any], given: dict[str, str | None]) -> "Fields":
    """How questions are read: as in training, but for what is given now.

    Raises:
        ConfigError: an unknown task, or none.
    """
    from blindtune.cli.guarded import make_fields

    merged = {**trained.get("fields", {}), **{key: value for key, value in given.items() if value is not None}}
    if "kind" not in merged:
        raise ConfigError("The checkpoint doesn't tell its task.", remedy="Give --task.")
    return make_fields(merged.pop("kind"), merged.pop("template", None), **merged)


def read_test(
    operator: "Operator", data: str, fields: "Fields", classes: list[str] | None, split: str, max_length: int
) -> list["TokenizedQuestion"]:
    """Questions of a file or a hub data set, tokenized for a hosted model."""
    from blindtune.training.questions import load_questions, tokenize

    questions = load_questions(data, fields, classes=classes, split=split)
    return tokenize(questions, operator.tokenizer(), max_length=min(max_length, operator.info.limits.max_length))


def _evaluate(plugin: "RemotePlugin", questions: list["TokenizedQuestion"], title: str) -> dict[str, float]:
    from blindtune.cli.guarded import evaluate
    from blindtune.training.guarded import Plugged

    return evaluate(Plugged(plugin), questions, title)


def _write(
    operator: "Operator", plugin: "RemotePlugin", prompt: str, max_new_tokens: int, temperature: float, seed: int
) -> str:
    tokenizer = operator.tokenizer()
    row = tokenizer.rows([prompt], max_length=operator.info.limits.max_length)[0]
    new = plugin.generate(row.ids, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    text = tokenizer.text(new)
    console.print(f"[dim]{prompt}[/]{text}", soft_wrap=True)
    return text
