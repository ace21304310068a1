"""The demo's part on private texts: reconstructs texts from undefended split learning, and shows that offline sends
nothing."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Generator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from blindtune.cli.console import console

if TYPE_CHECKING:
    from blindtune.client import Operator
    from blindtune.data.questions import TokenizedQuestion
    from blindtune.models import FrozenBackbone
    from blindtune.texts import Design
    from blindtune.wire import Transcript

SENTENCES, PUBLIC, MAX_LENGTH = 6, 400, 24
OFFLINE_STEPS, KEPT_BLOCKS = 3, 6
SERVERS = ("split-learning-server", "offline-server")


@dataclass(frozen=True)
class TextsPart:
    """Results of the part on private texts.

    Attributes:
        sentences: the client's texts, as they were tokenized.
        read: the texts that the server reconstructs from undefended split learning.
        accuracy: fraction of the tokens that were reconstructed at the right position.
        offline_messages: number of messages with hidden states that the server received with offline.
        offline_steps: number of training steps with offline.
    """

    sentences: list[str]
    read: list[str]
    accuracy: float
    offline_messages: int
    offline_steps: int

    def to_json(self) -> dict[str, Any]:
        """Returns the results as JSON values."""
        return asdict(self)


@contextmanager
def texts_in_background(decoder: str, sentences: list[str], folder: Path) -> Generator[Callable[[], TextsPart]]:
    """Runs `texts_part` in a child process within this context. The child gets the time that nothing else needs.

    Yields:
        A function that waits for the result.
    """
    with ProcessPoolExecutor(1, get_context("spawn"), _use_idle_time) as pool:
        try:
            yield pool.submit(texts_part, decoder, sentences, folder).result
        except BaseException:
            for child in active_children():  # otherwise the pool would wait until the child is done
                child.terminate()
            raise


def _use_idle_time() -> None:
    """Prepares the child process: a low priority, one thread, and no output of libraries."""
    import torch

    from blindtune.cli.console import quiet_libraries

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, and the parent ends its child
    if hasattr(os, "nice"):
        os.nice(10)
    quiet_libraries()
    torch.set_num_threads(1)


def texts_part(decoder: str, sentences: list[str], folder: Path) -> TextsPart:
    """Trains one step of undefended split learning and a few of offline, and reconstructs texts from the transcript.

    Args:
        decoder: the hosted model.
        sentences: the client's texts, and after them the attacker's public text.
        folder: folder for the transcripts and the emulator.
    """
    from blindtune.data.questions import Question, tokenize
    from blindtune.local import local_operators
    from blindtune.models import Cut, load_backbone
    from blindtune.texts import Offline, Online
    from blindtune.wire import Transcript

    backbone = load_backbone(decoder, cut=Cut(2, 2))
    emulator = _emulator(backbone, folder)
    seen = [folder / name for name in SERVERS]
    pool = local_operators(backbone, record=seen, emulators=[emulator])
    tokenizer = pool.operators[0].tokenizer()
    texts, public = sentences[:SENTENCES], sentences[SENTENCES : SENTENCES + PUBLIC]
    questions = tokenize([Question("", (text,), 0) for text in texts], tokenizer, max_length=MAX_LENGTH)
    sent = _train(pool.operators[0], Online(up="fp32", down="fp32"), questions, steps=1)
    _train(pool.operators[1], Offline(), questions, steps=OFFLINE_STEPS)
    pool.close()
    rows = [list(row.ids) for row in tokenizer.rows(public, max_length=MAX_LENGTH)]
    read = _read_back(Transcript(seen[0]), backbone, rows)
    right = sum(a == b for row, guess in zip(sent, read, strict=True) for a, b in zip(row, guess, strict=True))
    return TextsPart(
        [tokenizer.text(row) for row in sent],
        [tokenizer.text(row) for row in read],
        right / sum(len(row) for row in sent),
        sum(event.kind.startswith("trunk") for event in Transcript(seen[1]).events),
        OFFLINE_STEPS,
    )


def _emulator(backbone: FrozenBackbone, folder: Path) -> Path:
    """Makes an emulator of a few blocks. It isn't distilled: the demo shows what is sent, not what is learned."""
    from blindtune.models.cut.emulator import make_emulator, save_emulator
    from blindtune.models.cut.manifest import signing_key

    made = make_emulator(backbone.require_cut(), KEPT_BLOCKS)
    save_emulator(folder / "emulator", made, backbone, signing_key(folder / "provider.pem"), int8=True)
    return folder / "emulator"


def _train(operator: Operator, design: Design, questions: list[TokenizedQuestion], *, steps: int) -> list[list[int]]:
    """Trains the ends. Returns the token rows whose hidden states were sent."""
    from blindtune.texts import TrainConfig, Trainer
    from blindtune.texts.session import Tuning, open_session

    session = open_session(operator, design, Tuning())
    sent: list[list[int]] = []
    session.model.boundary.on_sent = lambda _, rows: sent.extend(rows)
    config = TrainConfig(steps=steps, batch_size=len(questions))
    Trainer(session.model, session.ends, design, questions, config).run()
    return sent


def _read_back(transcript: Transcript, backbone: FrozenBackbone, public: list[list[int]]) -> list[list[int]]:
    """Returns the token rows that the nearest-token attack reconstructs from the first message of hidden states.

    Args:
        public: token rows of public text, which the attacker is fitted on.
    """
    from blindtune.audit.texts import ATTACKS, Attacker, read_exchanges

    model = next(iter(transcript.recording.models))
    observed = read_exchanges(transcript, model, dim=int(backbone.config.hidden_size))[0].read()
    guesses = ATTACKS["nearest token"].run(observed, Attacker(backbone.require_cut(), public))
    return [row.tolist() for row in guesses.split(observed.lengths.tolist())]


def print_texts(decoder: str, part: TextsPart) -> None:
    """Prints what the server reads of each text."""
    console.rule("[bold]private texts")
    console.print(f"{decoder} was cut into a bottom of two blocks, the trunk, and a top of two blocks.")
    console.print("Undefended split learning: one step, which sends hidden states to the server.")
    table = Table(title="What the server reads under undefended split learning", title_justify="left")
    table.add_column("text of the client")
    table.add_column("read by the server")
    for original, read in zip(part.sentences, part.read, strict=True):
        table.add_row(original, read)
    console.print(table)
    console.print(f"{part.accuracy:.0%} of the tokens are read at the right position.", style="bold")
    console.print(
        f"Offline: the client trained for {part.offline_steps} steps around an emulator of the trunk, which it "
        f"downloaded once. The server got {part.offline_messages} messages with hidden states.",
        style="bold",
    )
