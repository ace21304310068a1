"""`blindtune emulator build`: the provider's command that makes an emulator of a cut model's trunk."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from blindtune.cli import options
from blindtune.cli.console import console, manual, reporting_errors, write_json

if TYPE_CHECKING:
    from blindtune.data.public_text import PublicText
    from blindtune.models import FrozenBackbone, Part
    from blindtune.models.cut.emulator import StoredEmulator

app = typer.Typer(help="Make emulators of a cut model's trunk.", no_args_is_help=True)


@app.callback()
def emulator() -> None:
    """Make emulators of a cut model's trunk, for clients that train offline."""


def build(
    model: Annotated[str, typer.Option(help="Model: a hub name, a folder, a .gguf file, or `smollm2`.")],
    cut: Annotated[str, typer.Option(help="Number of blocks in the clients' bottom and top, e.g. 2 for both, or 2,4.")],
    keep: Annotated[int, typer.Option(help="Number of the trunk's blocks to keep, spread evenly.")],
    public: Annotated[
        list[Path],
        typer.Option(
            help="File of public text: .txt, or JSON lines, CSV, … with a column `text`; also .gz. Repeat for more."
        ),
    ],
    key: Annotated[
        Path, typer.Option(help="Ed25519 private key (PEM) to sign with; created with mode 0600 if it doesn't exist.")
    ],
    output: Annotated[Path, typer.Option(help="Folder for the emulator.")],
    steps: Annotated[
        int, typer.Option(min=0, help="Number of distillation steps; with 0, blocks are only dropped.")
    ] = 500,
    batch_size: Annotated[int, typer.Option(min=1, help="Number of passages in a step.")] = 8,
    lr: Annotated[float, typer.Option(help="Maximum learning rate.")] = 1e-3,
    max_length: Annotated[int, typer.Option(min=2, help="Largest number of tokens in a passage.")] = 128,
    int8: Annotated[
        bool, typer.Option("--int8", help="Store weights in int8, with a quarter of float32's bytes.")
    ] = False,
    device: options.Device = "cpu",
    dtype: Annotated[
        str,
        typer.Option(
            help="Dtype of the model: float32, float64, bfloat16 or float16. Distillation always uses float32."
        ),
    ] = "float32",
    seed: Annotated[int, typer.Option(help="Seed of the batches and of the choice of held-out passages.")] = 0,
    threads: Annotated[int | None, typer.Option(help="Number of torch threads. Default: all cores.")] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Also write the manifest to this file.")] = None,
) -> None:
    """Make an emulator: a cut model's trunk with blocks dropped, distilled on public text, and signed.

    A server offers it with `blindtune serve --cut 2 --emulator DIR`. Clients download it once and train their ends
    around it, instead of sending hidden states at every step. An emulator reveals more of the model than the ends alone
    do: its blocks are initialised with the model's own. Losses are measured on held-out passages of the public text.

    Example: blindtune emulator build --model smollm2 --cut 2 --keep 10 --public news.jsonl.gz --key provider.pem
    --output emulator/
    """
    with reporting_errors():
        import torch

        from blindtune.cli.serve import parse_cut
        from blindtune.data.public_text import PublicText, file_sha256
        from blindtune.models import Tokenizer, load_backbone
        from blindtune.models.cut.distill import MSE_WEIGHT, evaluate
        from blindtune.models.cut.emulator import as_stored, make_emulator, save_emulator
        from blindtune.models.cut.manifest import Distillation, signing_key

        if threads is not None:
            torch.set_num_threads(threads)
        console.print(f"Loading {model} ({dtype}, {device}) …")
        backbone = load_backbone(model, device=device, dtype=dtype, cut=parse_cut(cut))
        cut_model = backbone.require_cut()
        made = make_emulator(cut_model, keep).float()
        tokenizer = Tokenizer(backbone.tokenizer, pad_token_id=backbone.pad_token_id, with_types=False)
        text = PublicText.read(public, tokenizer, max_length=max_length, batch_size=batch_size, seed=seed)
        signer = signing_key(key)
        console.print(f"{text}; measuring losses before distillation …")
        full = evaluate(backbone, cut_model.parts["trunk"], text.measured())
        before = evaluate(backbone, made, text.measured())
        _distill(backbone, made, text, steps, lr)
        quantized = as_stored(made, cut_model, dtype=backbone.dtype, int8=int8)
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
            after=evaluate(backbone, quantized, text.measured()),
        )
        stored = save_emulator(output, made, backbone, signer, int8=int8, distillation=distillation)
        _print(stored, backbone, output)
        write_json(json, stored.manifest.model_dump())


app.command(help=manual(build))(build)


def _distill(backbone: "FrozenBackbone", made: "Part", text: "PublicText", steps: int, lr: float) -> None:
    """Distills the emulator in place, with a progress bar."""
    from blindtune.cli.progress import STEP_COLUMNS, Bars
    from blindtune.models.cut.distill import distill

    with Bars(*STEP_COLUMNS, console=console) as progress:
        task = progress.add_task("distilling", total=steps, status="")
        for step in distill(backbone, made, text.batches(), steps=steps, lr=lr):
            rate = step.tokens / step.seconds
            status = f"LM loss {step.lm_loss:.3f}  error {step.mse:.4f}  {rate:.0f} tokens/s"
            progress.update(task, status=status)
            progress.advance(task)


def _print(stored: "StoredEmulator", backbone: "FrozenBackbone", output: Path) -> None:
    from blindtune.cli.progress import human_bytes
    from blindtune.models.cut.emulator import WEIGHTS_FILE

    manifest, distillation = stored.manifest, stored.manifest.distillation
    if distillation is None:
        raise ValueError("the emulator was not distilled")
    trunk = backbone.require_cut().parts["trunk"]
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
    console.print("LM loss: nats per token of held-out public text. Error: ||emulator − trunk||² / ||trunk||².")
    console.print(f"Emulator: {output}. Public key, for your clients: {manifest.public_key}", soft_wrap=True)
