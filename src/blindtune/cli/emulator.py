"""`blindtune emulator build`: the provider's command that makes a stand-in for a split model's middle."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from blindtune.cli import options
from blindtune.cli.console import console, reporting_errors, write_json

if TYPE_CHECKING:
    from blindtune.cli.public_text import PublicText
    from blindtune.models import FrozenBackbone, Part
    from blindtune.models.emulator import StoredEmulator

app = typer.Typer(help="Make emulators of a split model's middle.", no_args_is_help=True)


@app.callback()
def emulator() -> None:
    """Make emulators of a split model's middle, for clients that train offline."""


@app.command()
def build(
    model: Annotated[str, typer.Option(help="A hub name, a folder, a .gguf file, or `smollm2`, as for `serve`.")],
    split: Annotated[str, typer.Option(help="Blocks of the clients' bottom and top, as for `serve`, e.g. 2 or 2,4.")],
    keep: Annotated[int, typer.Option(help="Blocks of the middle that stay, uniformly spread.")],
    public: Annotated[
        list[Path],
        typer.Option(help="Public text: .txt, or JSON lines, CSV, … with a column `text`; also .gz. Repeat for more."),
    ],
    key: Annotated[
        Path, typer.Option(help="Ed25519 private key (PEM) to sign with; made, with mode 0600, if it isn't there.")
    ],
    output: Annotated[Path, typer.Option(help="Folder for the emulator.")],
    steps: Annotated[int, typer.Option(min=0, help="Distillation steps; 0 only drops blocks.")] = 500,
    batch_size: Annotated[int, typer.Option(min=1, help="Passages in a step.")] = 8,
    lr: Annotated[float, typer.Option(help="Highest learning rate.")] = 1e-3,
    max_length: Annotated[int, typer.Option(min=2, help="Longest passage, tokens.")] = 128,
    int8: Annotated[bool, typer.Option("--int8", help="Store weights in int8, a quarter of float32's bytes.")] = False,
    device: options.Device = "cpu",
    dtype: Annotated[str, typer.Option(help="As for `serve`; distillation itself is in float32.")] = "float32",
    seed: Annotated[int, typer.Option(help="Seed of the batches, and of what is held out.")] = 0,
    threads: Annotated[int | None, typer.Option(help="Torch threads; all cores if left out.")] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Also write the manifest to this file.")] = None,
) -> None:
    """Make an emulator: a split model's middle with blocks dropped, distilled on public text, and signed.

    A server offers it with `blindtune serve --split 2 --emulator DIR`. Clients get it once and train their ends around
    it, instead of sending hidden states at every step. It gives away more of the model than the ends do: the blocks
    that stay start as the model's own. Losses are measured on passages of the public text that are held out.

    Example:  blindtune emulator build --model smollm2 --split 2 --keep 10 --public news.jsonl.gz --key provider.pem
    --output emulator/
    """
    with reporting_errors():
        import torch

        from blindtune.cli.public_text import PublicText, file_sha256
        from blindtune.cli.serve import parse_cut
        from blindtune.models import Tokenizer, load_backbone
        from blindtune.models.emulator import as_stored, make_emulator, save_emulator
        from blindtune.models.manifest import Distillation, signing_key
        from blindtune.server.distill import MSE_WEIGHT, evaluate

        if threads is not None:
            torch.set_num_threads(threads)
        console.print(f"Loading {model} ({dtype}, {device}) …")
        backbone = load_backbone(model, device=device, dtype=dtype, cut=parse_cut(split))
        assert backbone.split is not None  # noqa: S101 - there is a cut
        made = make_emulator(backbone.split, keep).float()
        tokenizer = Tokenizer(backbone.tokenizer, pad_token_id=backbone.pad_token_id, with_types=False)
        text = PublicText.read(public, tokenizer, max_length=max_length, batch_size=batch_size, seed=seed)
        signer = signing_key(key)
        console.print(f"{text}; measuring before …")
        full = evaluate(backbone, backbone.split.parts["trunk"], text.measured())
        before = evaluate(backbone, made, text.measured())
        _distill(backbone, made, text, steps, lr)
        stays = as_stored(made, backbone.split, dtype=backbone.dtype, int8=int8)
        distillation = Distillation(
            steps=steps,
            batch_size=batch_size,
            lr=lr,
            max_length=max_length,
            seed=seed,
            mse_weight=MSE_WEIGHT,
            public={file_sha256(path): path.name for path in public},
            full=full,
            before=before,
            after=evaluate(backbone, stays, text.measured()),
        )
        stored = save_emulator(output, made, backbone, signer, int8=int8, distillation=distillation)
        _print(stored, backbone, output)
        write_json(json, stored.manifest.model_dump())


def _distill(backbone: "FrozenBackbone", made: "Part", text: "PublicText", steps: int, lr: float) -> None:
    """Under a progress bar."""
    from blindtune.cli.progress import STEP_COLUMNS, Bars
    from blindtune.server.distill import distill

    with Bars(*STEP_COLUMNS, console=console) as progress:
        task = progress.add_task("distilling", total=steps, status="")
        for step in distill(backbone, made, text.batches(), steps=steps, lr=lr):
            rate = step.tokens / step.seconds
            status = f"LM loss {step.lm_loss:.3f}  error {step.mse:.4f}  {rate:.0f} tokens/s"
            progress.update(task, status=status)
            progress.advance(task)


def _print(stored: "StoredEmulator", backbone: "FrozenBackbone", output: Path) -> None:
    from blindtune.cli.progress import human_bytes
    from blindtune.models.emulator import WEIGHTS_FILE

    manifest, distillation = stored.manifest, stored.manifest.distillation
    assert backbone.split is not None and distillation is not None  # noqa: S101, PT018 - just made so
    trunk = backbone.split.parts["trunk"]
    whole = sum(weight.numel() for weight in trunk.weights().values())
    size = human_bytes((output / WEIGHTS_FILE).stat().st_size)
    table = Table(title=f"Emulator of {manifest.model}'s blocks {trunk.blocks[0]} to {trunk.blocks[-1]}")
    table.add_column()
    table.add_column("value", justify="right")
    table.add_row(
        "kept blocks", f"{', '.join(map(str, manifest.blocks))} ({len(manifest.blocks)} of {len(trunk.blocks)})"
    )
    table.add_row("parameters", f"{manifest.parameters:,} of {whole:,} ({manifest.parameters / whole:.0%})")
    table.add_row("weights", f"{size}, {'int8' if manifest.int8 else manifest.dtype}")
    table.add_row("LM loss of the full model", f"{distillation.full.lm_loss:.3f}")
    table.add_row("LM loss with the emulator, before distillation", f"{distillation.before.lm_loss:.3f}")
    table.add_row("LM loss with the emulator, after, as it is stored", f"{distillation.after.lm_loss:.3f}")
    table.add_row("error at its output, before", f"{distillation.before.mse:.4f}")
    table.add_row("error at its output, after, as it is stored", f"{distillation.after.mse:.4f}")
    console.print(table)
    console.print("LM loss: nats for each token of held-out public text. Error: ||emulator − trunk||² / ||trunk||².")
    console.print(f"Emulator: {output}. Public key, for your clients: {manifest.public_key}", soft_wrap=True)
