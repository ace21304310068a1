"""Holds the state that all routes share: models with their threads, caches, limits, metrics and the recorder.

`Host` doesn't handle requests; the handlers in `blindtune.server.routes` do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

from blindtune.errors import TooBusy, UnknownModel, UnknownPart
from blindtune.models import FrozenBackbone
from blindtune.server.auth import TokenStore
from blindtune.server.cache import ByteLRU
from blindtune.server.emulators import load_emulators, with_emulator
from blindtune.server.engine import Engine, RetainedGraph, StoredAdapter
from blindtune.server.memory import with_room
from blindtune.server.metrics import Metrics
from blindtune.server.recorder import Recorder
from blindtune.server.trunk import Trunk
from blindtune.server.tuned_parts import TunedPartsStore
from blindtune.wire import Limits

T = TypeVar("T")


@dataclass(frozen=True)
class ServerSettings:
    """Settings of a server, apart from the models that it hosts."""

    tokens: TokenStore = field(default_factory=TokenStore.open_to_all)
    limits: Limits = field(default_factory=Limits)
    graph_bytes: int = 2 * 2**30
    """Largest size in bytes of the retained autograd graphs of all tenants together."""
    adapter_bytes: int = 2**30
    """Largest size in bytes of the uploaded adapters of all tenants together."""
    tuned_parts_bytes: int = 2**30
    """Largest size in bytes of the tuned parts that all tenants together have deployed."""
    max_queue: int = 64
    """Largest number of requests that wait or run at the same time."""
    record: Path | None = None
    """Folder of the transcript; None: nothing is recorded."""
    log_requests: bool = True
    """Whether each request is logged."""
    emulators: Sequence[Path] = ()
    """Folders of emulators of hosted models, which `blindtune emulator build` wrote."""


class Host:
    """The state of one server.

    Args:
        models: the hosted models: name -> backbone.
        settings: settings of the server.
    Raises:
        EmulatorError: an emulator is damaged, or wasn't made from a hosted model.
        TranscriptError: the transcript in the folder `settings.record` is of other models.
    """

    def __init__(self, models: dict[str, FrozenBackbone], settings: ServerSettings) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.operator_id = uuid4().hex
        self.adapters = ByteLRU[tuple[str, str], StoredAdapter](settings.adapter_bytes, self.metrics.adapter_bytes.set)
        self.graphs = ByteLRU[tuple[str, str], RetainedGraph](settings.graph_bytes, self.metrics.graph_bytes.set)
        self.engines = {name: Engine(name, model, self.adapters, self.graphs) for name, model in models.items()}
        self.trunks = {
            name: Trunk(name, model, self.graphs) for name, model in models.items() if model.cut_model is not None
        }
        self.infos = {name: model.info(name, settings.limits) for name, model in models.items()}
        self.tuned_parts = TunedPartsStore(settings.tuned_parts_bytes)
        self.emulators = load_emulators(settings.emulators, models)
        for name in self.emulators:
            self.infos[name] = with_emulator(self.infos[name])
        self.recorder = Recorder(settings.record, self.operator_id, models) if settings.record else None
        self._threads = {name: ThreadPoolExecutor(1, f"engine-{name}") for name in models}
        self._waiting = 0

    def engine(self, model: str) -> Engine:
        """Returns the engine of a hosted model. Raises `UnknownModel` for another model."""
        if model not in self.engines:
            raise UnknownModel(
                f"This server doesn't host {model!r}.", remedy=f"It hosts: {', '.join(self.engines) or 'nothing'}."
            )
        return self.engines[model]

    def cut_backbone(self, model: str) -> FrozenBackbone:
        """Returns a hosted model that is cut. Raises `UnknownModel`, or `UnknownPart` if it isn't cut."""
        backbone = self.engine(model).backbone
        if backbone.cut_model is None:
            raise UnknownPart(f"{model!r} is not cut here.", remedy="The provider has to serve it with --cut.")
        return backbone

    @contextmanager
    def queue_slot(self) -> Generator[None]:
        """Occupies one of the `max_queue` queue slots within this context. Raises `TooBusy` if none is free."""
        if self._waiting >= self.settings.max_queue:
            raise TooBusy(f"{self._waiting} requests are waiting.", remedy="Try again in a few seconds.")
        self._waiting += 1
        self.metrics.queue.set(self._waiting)
        try:
            yield
        finally:
            self._waiting -= 1
            self.metrics.queue.set(self._waiting)

    async def on_engine(self, model: str, work: Callable[[], T]) -> T:
        """Runs `work` on the model's thread and returns its result."""
        return await asyncio.get_running_loop().run_in_executor(self._threads[model], work)

    def with_room(self, work: Callable[[], T]) -> T:
        """Runs `work` and returns its result. If memory runs out, drops the retained graphs and runs `work` again.

        Raises:
            OutOfMemory: memory runs out again.
        """
        return with_room(work, self.graphs.clear)

    def close(self) -> None:
        """Waits for the models' threads to finish and writes the transcript's last events."""
        for thread in self._threads.values():
            thread.shutdown(wait=True)
        if self.recorder is not None:
            self.recorder.close()
