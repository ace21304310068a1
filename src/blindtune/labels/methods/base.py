"""The base class of methods for private labels, with neutral defaults, and their registry.

A method decides what operators are sent (its channel), how the adapters' outputs are mixed into the head's input, and
which terms are added to the loss. It also describes what an operator can learn (`Method.exposure`). Methods register
themselves, so a new method needs one new file only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from blindtune.client import Backbone, OperatorPool, PlainChannel, RemoteBatch
from blindtune.errors import ConfigError
from blindtune.labels.channels.private_backprop import PrivateBackprop, PrivateBackpropOptions
from blindtune.labels.classifiers import Choice
from blindtune.labels.placement import Part, listed
from blindtune.models.tokenizer import TokenRow
from blindtune.privacy.ledger import Ledger
from blindtune.privacy.randomness import SecureGenerator

M = TypeVar("M", bound="type[Method]")
METHODS: dict[str, type[Method]] = {}
"""Registered methods by name, in the order of their definition."""


def method(cls: M) -> M:
    """Class decorator that registers a method under its `name`, for `make_method`, the command line and checkpoints."""
    METHODS[cls.name] = cls
    return cls


class Method:
    """A training algorithm for private labels. The defaults are those of one adapter in the clear.

    Subclasses are dataclasses whose fields are the method's options. The fields of an option that is itself a dataclass
    are options too: `make_method("lora", {"m": 2})` sets `backprop.m`.
    """

    name: ClassVar[str]
    """Name on the command line and in checkpoints."""
    title: ClassVar[str]
    """Name in tables and figures."""
    default_rank: ClassVar[int] = 8
    """Default rank of the adapters. The default α is twice the rank."""
    default_lr: ClassVar[float] = 3e-3
    """Default learning rate of the adapters."""
    reads: ClassVar[Mapping[str, Any]] = {}
    """Arguments of `Backbone` for the hidden states that the method reads best, such as `readout`."""
    by_steps: ClassVar[bool] = True
    """Whether the method is trained in steps. If not, `fit_head` does everything."""
    fixed_a: ClassVar[bool] = False
    """Whether only the adapters' B matrices are trained; their A matrices are then expanded from a public seed."""
    watches_batches: ClassVar[bool] = False
    """Whether the method's guarantee requires that batches don't depend on labels."""
    attached = False
    """Whether the method belongs to a model. It can't be used for another one, since it counts the first one's messages
    and holds its secrets."""
    on_progress: Callable[[int, int], None] | None = None
    """Callback that `fit_head` invokes with the number of candidates that it has tried, and of all."""

    @property
    def num_adapters(self) -> int:
        """n, the number of adapters."""
        return 1

    @property
    def ledger(self) -> Ledger | None:
        """The ledger of messages to operators; None if nothing bounds what they reveal."""
        return None

    @property
    def label_mu(self) -> float:
        """Bound on μ of one label in everything that operators may see of the run; infinite if there is no bound."""
        return math.inf

    @property
    def requests_per_text(self) -> int:
        """Number of requests that `inputs` sends with each text."""
        return 1

    @property
    def needs_frozen(self) -> bool:
        """Whether `penalties` needs the frozen features."""
        return False

    @property
    def auxiliary(self) -> nn.Module | None:
        """A second head, from `(B, d)` to `(B, K)`, whose loss trains the adapters; None for none.

        With it, the head that predicts learns the true labels from detached features, so the adapters get no gradient
        from it.
        """
        return None

    @property
    def mixes_equal_to_zero(self) -> bool:
        """Whether `mix` returns zeros for adapters that compute the same, as they do before training."""
        return False

    @property
    def default_head(self) -> str:
        """Name of the head that the command line uses by default (`blindtune.labels.HEADS`)."""
        return "linear"

    def complete_training(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the given options of `TrainConfig`, and the method's own values of others: its learning rate."""
        return {"learning_rate": self.default_lr, **given}

    def attach(self, backbone: Backbone, classes: int, generator: SecureGenerator) -> None:
        """Installs the method's channel in the backbone, and draws the method's secrets.

        Args:
            classes: K, the number of classes.
            generator: secret random generator.
        """
        backbone.channel = PlainChannel()

    def check(self, backbone: Backbone) -> None:
        """Raises `PrivacyError` or `ConfigError` if the method can't keep its guarantee with these operators."""

    def inputs(self, backbone: Backbone, rows: Sequence[TokenRow]) -> Tensor:
        """Returns what the head reads of texts under the frozen model: by default their frozen features `(N, d)`.

        It is called for the training texts, and by methods without adapters for all predictions too. What it sends
        depends on the texts alone.
        """
        return backbone.frozen(rows)

    def fetch(self, backbone: Backbone, rows: Sequence[TokenRow]) -> None:
        """Fetches what `inputs` will need for these rows, so that it sends nothing later.

        The order in which texts are sent doesn't depend on the order of the rows.
        """
        backbone.fetch(rows)

    def prepare(self, frozen: Tensor, labels: Tensor) -> None:
        """Computes statistics of the training set's `inputs` `(N, d)` and labels `(N,)`."""

    def fit_head(self, backbone: Backbone, rows: Sequence[TokenRow], labels: Tensor, classes: int) -> Choice | None:
        """Chooses and fits a head on the frozen model's states of the training set.

        Args:
            rows: the texts.
            labels: true labels `(N,)`.
            classes: K.
        Returns:
            The fitted head, with what it was chosen from; None for methods that are trained in steps.
        """
        return None

    def mix(self, hidden: Tensor) -> Tensor:
        """Returns the head's input `(B, d)` for hidden states `(n, B, d)`."""
        return hidden[0]

    def penalties(self, hidden: Tensor, frozen: Tensor | None, labels: Tensor) -> dict[str, Tensor]:
        """Returns further terms of the loss by name.

        Args:
            hidden: hidden states `(n, B, d)`.
            frozen: frozen features `(B, d)`; None unless `needs_frozen`.
            labels: true labels `(B,)`.
        """
        return {}

    def adapter_labels(self, rows: Sequence[TokenRow], labels: Tensor) -> Tensor:
        """Returns the labels `(B,)` that the adapters are trained on: by default the true ones.

        A head from which the adapters get gradients is trained on them too. The method is called for every batch and
        for the whole training set, and returns the same label for an example each time.
        """
        return labels

    def report(self) -> dict[str, float]:
        """Returns numbers to show during training, such as μ of the channel."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """Returns all secret or learned tensors, for a checkpoint. They are never changed in place."""
        return {}

    def inference_state_dict(self) -> dict[str, Tensor]:
        """Returns the part of `state_dict` that predictions need."""
        return self.state_dict()

    def step_state_dict(self) -> dict[str, Tensor]:
        """Returns the part of `state_dict` that a step changes, to undo the step. The ledger isn't undone."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Loads what `state_dict`, `inference_state_dict` or `step_state_dict` returned."""

    def probe(self, batch: RemoteBatch, pool: OperatorPool) -> dict[str, float]:
        """Measures on a few texts the errors that the defence adds to the head's input, and warns if they are large.

        Returns:
            relative errors by name.
        """
        return {}

    def exposure(self, part: Part, operators: int, *, random_adam_moments: float = 0.0) -> str:
        """Describes in words what one operator sees in a run, and what it can learn from that.

        Args:
            part: the steps in which the operator takes part.
            operators: number of operators.
            random_adam_moments: size of the secret random Adam moments that the optimizer starts from; 0 for none.
        """
        raise NotImplementedError


class FrozenMethod(Method):
    """Base class of methods that fit a head on the frozen model's states: nothing that is sent depends on labels."""

    by_steps: ClassVar[bool] = False

    @property
    def num_adapters(self) -> int:
        return 0

    @property
    def label_mu(self) -> float:
        return 0.0

    def exposure(self, part: Part, operators: int, *, random_adam_moments: float = 0.0) -> str:
        return "sees texts, each once: nothing about labels"


@dataclass
class AdapterMethod(Method):
    """Base class of methods that send adapters in the clear.

    An operator can learn labels from activations, and without shares from gradients.

    Args:
        backprop: options for sending gradients, which are sent in the clear unless m ≥ 2.
    """

    backprop: PrivateBackpropOptions = field(default_factory=PrivateBackpropOptions)

    shares: PrivateBackprop | None = field(init=False, repr=False, compare=False, default=None)
    """The channel of gradient shares; None for gradients in the clear."""

    @property
    def learned(self) -> str:
        """Describes in words what the adapters learn, and therefore what operators can learn from them."""
        return "the labels"

    @property
    def defence(self) -> str | None:
        """Names the defence that limits what activations and shifts reveal; None if there is none."""
        return None

    @property
    def ledger(self) -> Ledger | None:
        return None if self.shares is None else self.shares.ledger

    def attach(self, backbone: Backbone, classes: int, generator: SecureGenerator) -> None:
        if self.backprop.m > 1:
            self.shares = PrivateBackprop(self.backprop, generator, adapters=self.num_adapters)
        backbone.channel = self.shares or PlainChannel()

    def check(self, backbone: Backbone) -> None:
        if self.shares is not None:
            self.shares.check_operators(len(backbone.pool), backbone.info.dtype)

    def report(self) -> dict[str, float]:
        return {} if self.shares is None else self.shares.report()

    def exposure(self, part: Part, operators: int, *, random_adam_moments: float = 0.0) -> str:
        compromised = self.shares is not None and operators < self.shares.options.m
        seen = ["texts"]
        if part.share:
            shares = "every share" if compromised else "one share of each gradient"
            seen += [self._adapters_seen(operators), "gradients" if self.shares is None else shares]
        after = f", {self._adapters_seen(operators)} where you validate or predict" if self._only_later(part) else ""
        return f"sees {listed(seen)}, {part}{after}: {self._learns(part, compromised, random_adam_moments)}"

    @staticmethod
    def _only_later(part: Part) -> bool:
        return part.predictions and not part.share

    def _adapters_seen(self, operators: int) -> str:
        if self.shares is not None and self.shares.apart(operators):
            return f"one of {self.num_adapters} adapters (always the same)"
        return f"all {self.num_adapters} adapters" if self.num_adapters > 1 else "the adapter"

    def _learns(self, part: Part, compromised: bool, random_adam_moments: float) -> str:
        if not (part.share or part.predictions):
            return "nothing about labels"
        if part.share and (self.shares is None or compromised):
            return f"it can learn {self.learned} from gradients" + (": their shares meet here" if compromised else "")
        limit = f" as far as {self.defence} lets them" if self.defence else ""
        activations = f"activations and shifts carry {self.learned}{limit}"
        return f"{activations}; {self._learns_from_updates(part, random_adam_moments)}" if part.share else activations

    def _learns_from_updates(self, part: Part, random_adam_moments: float) -> str:
        """Describes in words what the adapters of different steps reveal together."""
        noise = 0.0 if self.shares is None else self.backprop.adapter_noise
        if noise > 0:
            return f"noise of {noise:g} on adapters hides what a step changed, if it is large enough"
        labels = "the labels" if self.learned == "the labels" else "those labels"
        if not part.consecutive:
            return (
                f"what adapters change between its steps holds their gradients (optimizer inversion), and so {labels}"
            )
        exception = "; not the first steps': random Adam moments" if random_adam_moments > 0 else ""
        return (
            f"consecutive adapters can tell each step's gradient (optimizer inversion), and so {labels}, although "
            f"shares hide it{exception}"
        )


def method_class(name: str) -> type[Method]:
    """Returns the class of the method with this name.

    Raises:
        ConfigError: no method has this name.
    """
    if name not in METHODS:
        raise ConfigError(f"There is no method {name!r}.", remedy=f"Use one of: {', '.join(METHODS)}.")
    return METHODS[name]


def _composed(cls: type[Any]) -> dict[str, Any]:
    """Returns the default values of the options that are dataclasses themselves, by field."""
    defaults = {o.name: o.default_factory() for o in fields(cls) if o.init and o.default_factory is not MISSING}
    return {name: value for name, value in defaults.items() if is_dataclass(value)}


def option_names(cls: type[Any]) -> dict[str, str | None]:
    """Returns the names of a method's options, each with the name of the composed option that holds it, or None."""
    composed = _composed(cls)
    names: dict[str, str | None] = {o.name: None for o in fields(cls) if o.init and o.name not in composed}
    for holder, value in composed.items():
        names |= {inner.name: holder for inner in fields(value) if inner.init}
    return names


def make_method(name: str, options: Mapping[str, Any] | None = None, **defaults: Any) -> Method:
    """Creates the method with this name.

    Args:
        options: options of the method, with the fields of composed options among them (`m` for `backprop.m`).
        defaults: values of options that `options` doesn't contain. Those that the method doesn't have are ignored.
    Raises:
        ConfigError: the name or an option is unknown.
    """
    cls = method_class(name)
    known = option_names(cls)
    given = {**{key: value for key, value in defaults.items() if key in known}, **(options or {})}
    unknown = set(given) - set(known)
    if unknown:
        raise ConfigError(f"{name} has no option {sorted(unknown)}.", remedy=f"It has: {', '.join(sorted(known))}.")
    options = {key: value for key, value in given.items() if known[key] is None}
    for holder, value in _composed(cls).items():
        options[holder] = replace(value, **{key: given[key] for key in given if known[key] == holder})
    return cls(**options)


def options_of(made: Method) -> dict[str, Any]:
    """Returns the options of a method as a flat mapping, as `make_method` accepts them."""
    known = option_names(type(made))
    return {key: getattr(made if holder is None else getattr(made, holder), key) for key, holder in known.items()}
