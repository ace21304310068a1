"""The training loop of both products: steps, learning rates, checkpoints, resume. Any other torch loop works too."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from blindtune.errors import BlindtuneError, CheckpointError
from blindtune.files import read_tensors, under, write_tensors
from blindtune.training.callbacks import Callback, Progress
from blindtune.training.config import TrainConfig
from blindtune.training.interruption import Interrupted, stop_request

RESUME = "resume.safetensors"
C = TypeVar("C", bound=TrainConfig)
S = TypeVar("S", bound=Progress)


class Trainer(ABC, Generic[C, S]):
    """Trains named parameters. A run can stop after any step and be resumed.

    A subclass defines the computation of a step (`_step`), everything that determines its results (`_identity`), and
    the further state that a resumed run needs (`_state`, `_load_state`).

    Args:
        config: number of steps, learning rates and seed.
        parameters: the trained parameters by name; checkpoints use these names.
        rates: highest learning rates of the parameters for which it isn't `config.learning_rate`, by name.
        checkpoint: folder for checkpoints; without it none are written.
        save_every: number of steps between checkpoints.
    """

    def __init__(
        self,
        config: C,
        parameters: Mapping[str, nn.Parameter],
        *,
        rates: Mapping[str, float] | None = None,
        checkpoint: Path | None = None,
        save_every: int = 10,
    ) -> None:
        self.config, self.checkpoint, self.save_every = config, checkpoint, save_every
        self.parameters = dict(parameters)
        by_rate: dict[float, list[nn.Parameter]] = {config.learning_rate: []}
        for name, parameter in self.parameters.items():
            by_rate.setdefault((rates or {}).get(name, config.learning_rate), []).append(parameter)
        groups = [{"params": members, "lr": rate} for rate, members in by_rate.items() if members]
        self._highest = [rate for rate, members in by_rate.items() if members]
        self.optimizer = torch.optim.AdamW(groups, betas=config.betas, weight_decay=config.weight_decay)
        self.done = 0
        """Number of complete steps."""

    def steps(self) -> Iterator[S]:
        """Runs the remaining steps and yields their metrics. A step that fails changes nothing in a checkpoint."""
        while self.done < self.config.steps:
            yield self._step()
            if self.checkpoint is not None and self.done % self.save_every == 0:
                self.save()

    def run(self, callbacks: Sequence[Callback] = ()) -> list[S]:
        """Runs all remaining steps and saves a checkpoint.

        After Ctrl-C, the run ends with the current step and saves a checkpoint. After an error of blindtune, it saves
        a checkpoint of the last complete step.

        Returns:
            The metrics of each step.
        Raises:
            Interrupted: the user pressed Ctrl-C.
        """
        done: list[S] = []
        for callback in callbacks:
            callback.on_train_begin(self.done, self.config.steps)
        try:
            with stop_request() as stopped:
                for step in self.steps():
                    done.append(step)
                    for callback in callbacks:
                        callback.on_step_end(step)
                    if stopped():
                        raise Interrupted
        except (BlindtuneError, Interrupted):
            self.save()
            raise
        finally:
            for callback in callbacks:
                callback.on_train_end()
        self.save()
        return done

    @abstractmethod
    def _step(self) -> S:
        """Runs one step: computes gradients, then calls `_update`. Returns its metrics."""

    def _update(self) -> None:
        """Clips the gradients, then steps the optimizer with this step's learning rates."""
        if self.config.max_grad_norm:
            self._clip(list(self.parameters.values()), self.config.max_grad_norm)
        for group, highest in zip(self.optimizer.param_groups, self._highest, strict=True):
            group["lr"] = highest * self.config.rate(self.done)
        self.optimizer.step()

    def _clip(self, parameters: Sequence[nn.Parameter], norm: float) -> None:
        """Scales the gradients of all parameters by one factor, so that their common norm is at most `norm`."""
        nn.utils.clip_grad_norm_(parameters, norm)

    @abstractmethod
    def _identity(self) -> dict[str, object]:
        """Returns everything that determines the results of the steps, by names that an error message can show."""

    def _state(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Returns the tensors and texts that a resumed run needs besides parameters and Adam moments."""
        return {}, {}

    def _load_state(self, tensors: dict[str, Tensor], texts: dict[str, str]) -> None:
        """Restores what `_state` returned."""

    @abstractmethod
    def _save_result(self, folder: Path) -> None:
        """Writes the trained model so far, in the format that users load."""

    def save(self) -> None:
        """Writes a checkpoint of the last complete step."""
        if self.checkpoint is None:
            return
        tensors, texts = self._state()
        self.checkpoint.mkdir(parents=True, exist_ok=True)
        for name, parameter in self.parameters.items():
            tensors[f"parameter.{name}"] = parameter.detach().cpu()
            adam_state = self.optimizer.state.get(parameter, {})
            for key in ("exp_avg", "exp_avg_sq"):
                if key in adam_state:
                    tensors[f"{key}.{name}"] = adam_state[key].cpu()
        texts |= {f"identity.{what}": digest for what, digest in self._digests().items()}
        write_tensors(self.checkpoint / RESUME, tensors, {**texts, "done": str(self.done)})
        self._save_result(self.checkpoint)

    def resume(self) -> None:
        """Restores the checkpoint that `save` wrote, so that `steps` and `run` continue after it.

        Raises:
            CheckpointError: there is no checkpoint, or it comes from another run; the message says what differs.
        """
        path = (self.checkpoint or Path()) / RESUME
        try:
            tensors, texts = read_tensors(path)
        except CheckpointError as error:
            raise CheckpointError(
                f"{path} can't be read: {error.message}", remedy="Start anew without --resume."
            ) from None
        wrong = [what for what, digest in self._digests().items() if texts.get(f"identity.{what}") != digest]
        if wrong:
            raise CheckpointError(
                f"The checkpoint comes from a run that differs in: {'; '.join(wrong)}.",
                remedy="Resume with the same options, files and servers, or start anew without --resume.",
            )
        self._load_state(tensors, texts)
        self._load_parameters(under("parameter.", tensors), path)
        self.done = int(texts["done"])
        for name, parameter in self.parameters.items():
            if f"exp_avg.{name}" in tensors:
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(self.done)),
                    "exp_avg": tensors[f"exp_avg.{name}"].clone().to(parameter.device),
                    "exp_avg_sq": tensors[f"exp_avg_sq.{name}"].clone().to(parameter.device),
                }

    def _load_parameters(self, saved: dict[str, Tensor], path: Path) -> None:
        """Loads the parameters. Raises `CheckpointError`, without changing any, if their names or shapes differ."""
        shapes = {name: tensor.shape for name, tensor in saved.items()}
        if shapes != {name: parameter.shape for name, parameter in self.parameters.items()}:
            raise CheckpointError(
                f"{path} was made for other layers, another rank or another head.",
                remedy="Use the options that it was trained with.",
            )
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(saved[name])

    def _digests(self) -> dict[str, str]:
        """Returns the SHA-256 of each item of `_identity`, by its name."""
        return {what: hashlib.sha256(repr(part).encode()).hexdigest() for what, part in self._identity().items()}
