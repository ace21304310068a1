"""`blindtune demo`: runs and attacks both private labels and private texts on this machine, and draws a picture."""

import shutil
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from blindtune.cli.console import console, reporting_errors, write_json
from blindtune.errors import ConfigError

CACHE = Path.home() / ".cache" / "blindtune"
MARKER = ".blindtune-demo"
"""File that marks a folder as made by this command, which may therefore remove it."""
PLAN = """\
You will see, in about three minutes on two cores:
  1. Private labels. Two servers on this machine host MiniLM. The demo fits a classifier on
     frozen features, the default, which sends nothing about labels. Then it trains plain LoRA and
     padded LoRA. The data are film reviews; the private label is the sign of a human rating.
  2. An attack on what each server recorded. Its AUC measures how well the server can infer
     labels; 0.5 is guessing.
  3. Private texts. A server hosts SmolLM2. Undefended split learning sends it hidden states, and
     an attack reconstructs the text from them. The design `offline` sends nothing.
  4. A picture of what the servers saw."""


def demo(
    output: Annotated[Path, typer.Option(help="Folder for transcripts, checkpoints, reports and the picture.")] = Path(
        "out/demo"
    ),
    seed: Annotated[int, typer.Option(help="Seed of batches and initial weights; secrets are always random.")] = 0,
    steps: Annotated[int, typer.Option(help="Number of training steps of each method.")] = 30,
    train: Annotated[int, typer.Option(help="Number of training sentences.")] = 960,
    test: Annotated[int, typer.Option(help="Number of test sentences.")] = 300,
    points: Annotated[int, typer.Option(help="Number of snapshots of the run to attack.")] = 2,
    attacked: Annotated[int, typer.Option(help="Number of training sentences to attack, chosen at random.")] = 250,
    model: Annotated[str, typer.Option(help="Model that the operators host.")] = "minilm",
    decoder: Annotated[
        str, typer.Option(help="Decoder for the part on private texts; an empty name skips that part.")
    ] = "smollm2",
    cache: Annotated[Path, typer.Option(help="Folder for downloaded files.")] = CACHE,
    json: Annotated[Path | None, typer.Option("--json", help="Also write the results to this file.")] = None,
) -> None:
    """Fine-tune with private labels and with private texts on this machine, and attack what the servers saw.

    The demo starts two operators as separate processes and fits a classifier on frozen features of one of them. Then it
    trains plain LoRA and padded LoRA over both with the same number of steps, and audits what each operator recorded.
    Then it sends sentences through the trunk of a cut decoder, reconstructs them from what the server recorded, and
    trains with the design that sends nothing. It needs no account, no hub and no GPU.
    """
    with reporting_errors():
        from blindtune.cli.demo.labels import DemoPlan, attack_both, train_all
        from blindtune.cli.demo.picture import write_picture
        from blindtune.cli.demo.texts import print_texts, texts_in_background
        from blindtune.data.film_reviews import film_reviews
        from blindtune.models.sources import find_source
        from blindtune.training import Interrupted

        start = time.perf_counter()
        console.rule("[bold]blindtune demo")
        console.print(PLAN, highlight=False)
        for name in filter(None, (model, decoder)):
            find_source(name)  # a name that is unknown raises before anything runs
        _prepare_folder(output)
        everything = film_reviews(cache)
        test_set = everything.take(range(test))
        train_set = everything.take(range(test, min(len(everything), test + train)))
        plan = DemoPlan(model, seed, steps, points, attacked, output)
        try:
            sentences = [str(text) for text in test_set.texts]
            with texts_in_background(decoder, sentences, output) if decoder else nullcontext() as wait_for_texts:
                labels = attack_both(plan, train_set, *train_all(plan, train_set, test_set))
                example = wait_for_texts() if wait_for_texts else None
            if example is not None:
                print_texts(decoder, example)
        except (Interrupted, KeyboardInterrupt):
            console.print("Stopped.")
            raise typer.Exit(130) from None
        picture = write_picture(output / "demo.svg", labels, example)
        result = labels.summary | {"seed": seed, "steps": steps, "train": len(train_set), "test": len(test_set)}
        result |= {"texts": None if example is None else example.to_json()}
        result["seconds"] = time.perf_counter() - start
        console.print(f"Picture: {picture.resolve()}", soft_wrap=True)
        console.print(f"Total time: {result['seconds']:.0f} s.")
        write_json(json, result)


def _prepare_folder(output: Path) -> None:
    """Empties the folder of an earlier demo. Raises `ConfigError` if the folder holds anything else."""
    marker = output / MARKER
    if marker.is_file():
        shutil.rmtree(output)
    elif output.exists() and any(output.iterdir()):
        raise ConfigError(
            f"{output} holds files that this command didn't write.", remedy="Give another folder (--output)."
        )
    output.mkdir(parents=True, exist_ok=True)
    marker.touch()
