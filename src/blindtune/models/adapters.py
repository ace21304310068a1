"""The client's LoRA adapters. They take PEFT's configuration and are saved in PEFT's checkpoint format.

The client needs only the names and shapes of the hosted layers, never their weights.
"""

from __future__ import annotations

import copy
import json
import math
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from blindtune.errors import CheckpointError, ConfigError, UnknownTargetModule
from blindtune.files import PRIVATE, replace_file
from blindtune.models.lora import LoraLayout
from blindtune.wire import LoraSpec, ModelInfo

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_SUPPORTED = {
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
}
_WITHOUT_EFFECT = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "runtime_config", "megatron_core", "loftq_config", "qalora_group_size"),
}
"""Options of `LoraConfig` that have no effect, or have one only together with another option, which is rejected."""
PEFT_PREFIX = "base_model.model."


def lora_spec(config: LoraConfig, info: ModelInfo, *, a_seed: str | None = None) -> LoraSpec:
    """Returns the layers and hyperparameters that a PEFT configuration means for a hosted model.

    Args:
        a_seed: see `LoraSpec`.
    Raises:
        UnknownTargetModule: no hosted layer matches `target_modules`.
        ConfigError: the API doesn't support an option of the `LoraConfig`.
    """
    neutral_config = LoraConfig()
    for option in sorted({field.name for field in fields(config)} - _SUPPORTED - _WITHOUT_EFFECT):
        value, neutral = getattr(config, option), getattr(neutral_config, option, None)
        if value and value != neutral:
            raise ConfigError(
                f"LoraConfig has {option}={value!r}, which isn't offered.", remedy=f"Set it to {neutral!r}."
            )
    names = _matching(config, info)
    if not names:
        some = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in info.modules}))
        raise UnknownTargetModule(
            f"No layer of {info.name!r} matches target_modules={_readable(config.target_modules)}.",
            remedy=f"Choose among: {some}.",
        )
    root = math.sqrt(config.r) if config.use_rslora else config.r
    scaling = config.lora_alpha / root
    return LoraSpec(modules=names, rank=config.r, scaling=scaling, dropout=config.lora_dropout, a_seed=a_seed)


def _matching(config: LoraConfig, info: ModelInfo) -> list[str]:
    """Returns the names of the hosted layers that match the configuration by PEFT's rules."""
    if config.target_modules == "all-linear":
        return list(info.modules)
    if config.target_modules is None:
        defaults = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(info.model_type)
        if defaults is None:
            return []
        config = copy.copy(config)
        config.target_modules = list(defaults)
    # PEFT recognises a layer's index only after a prefix, which names in a model without head don't have
    prefix = "" if config.layers_to_transform is None else "model."
    return [name for name in info.modules if check_target_module_exists(config, prefix + name)]


def _readable(targets: object) -> str:
    return repr(sorted(cast("set[str]", targets)) if isinstance(targets, set) else targets)


class LoraAdapter(nn.Module):
    """The weights θ of one adapter: matrices A `(r, in)` and B `(out, r)` for each module, float32.

    Initialised as in PEFT (`init_lora_weights`): A Kaiming-uniform, or Gaussian with standard deviation 1/r; B zero.

    Args:
        config: PEFT's configuration.
        info: the hosted model's description.
        generator: source of the initial weights; torch's default generator if None.
        a_seed: 32 public bytes in hexadecimal from which A is expanded. Then A is fixed, only B is trained and sent
            (LoRA-FA: Zhang et al. 2023), and P counts B alone.
    """

    def __init__(
        self,
        config: LoraConfig,
        info: ModelInfo,
        *,
        generator: torch.Generator | None = None,
        a_seed: str | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.info = info
        self.layout = LoraLayout(lora_spec(config, info, a_seed=a_seed), info.modules)
        self._a: list[nn.Parameter] = []
        self._b: list[nn.Parameter] = []
        fixed = self.layout.fixed_a()
        for index, (_, out_features, in_features) in enumerate(self.layout.shapes):
            a, b = _initial(config, out_features, in_features, generator)
            self._a.append(nn.Parameter(fixed[index].clone() if fixed else a, requires_grad=not fixed))
            self._b.append(nn.Parameter(torch.zeros_like(b) if fixed else b))
            self.register_parameter(f"a_{index}", self._a[-1])
            self.register_parameter(f"b_{index}", self._b[-1])

    def named_matrices(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Returns the matrices by module: name -> (A, B)."""
        return {name: (a, b) for (name, _, _), a, b in zip(self.layout.shapes, self._a, self._b, strict=True)}

    def vector(self) -> Tensor:
        """Returns all weights as one vector `(P,)`, differentiable in them."""
        return self.layout.join(self.named_matrices())

    def save_pretrained(self, folder: Path, *, run: str = "") -> None:
        """Writes PEFT's `adapter_config.json` and `adapter_model.safetensors`. Only the owner can read the weights.

        Args:
            run: id of the run in which the adapter was trained; `load_pretrained` returns it.
        """
        folder.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {}
        for name, (a, b) in self.named_matrices().items():
            tensors[f"{PEFT_PREFIX}{name}.lora_A.weight"] = a.detach().contiguous()
            tensors[f"{PEFT_PREFIX}{name}.lora_B.weight"] = b.detach().contiguous()
        replace_file(folder / WEIGHTS_FILE, save(tensors, {"format": "pt", "run": run}), PRIVATE)
        config = copy.deepcopy(self.config)
        config.base_model_name_or_path = self.info.base_model_name
        config.target_modules = [str(name) for name in self.layout.spec.modules]
        config.layers_to_transform = config.layers_pattern = None
        config.inference_mode = True
        with TemporaryDirectory() as temporary:
            config.save_pretrained(temporary)
            replace_file(folder / CONFIG_FILE, (Path(temporary) / CONFIG_FILE).read_bytes())

    def load_pretrained(self, folder: Path, *, allow_nonfinite: bool = False) -> str:
        """Loads weights that `save_pretrained` (or PEFT) wrote for the same layers and rank.

        Args:
            allow_nonfinite: whether to accept NaN and infinity.
        Returns:
            The run's id that was given to `save_pretrained`; empty if there is none.
        Raises:
            CheckpointError: the file is missing or damaged, or its weights are of other layers or another rank, or
                aren't finite. The adapter is unchanged then.
        """
        path = folder / WEIGHTS_FILE
        if not path.is_file():
            raise CheckpointError(f"There is no {path}.", remedy="Name a folder that holds a PEFT checkpoint.")
        try:
            with safe_open(path, framework="pt") as file:
                run = (file.metadata() or {}).get("run", "")
            tensors = load_file(path)
        except SafetensorError as error:
            raise CheckpointError(f"{path} is damaged: {error}.", remedy="Use another copy of it.") from None
        loaded: list[tuple[nn.Parameter, Tensor]] = []
        for name, matrices in self.named_matrices().items():
            for part, parameter in zip(("lora_A", "lora_B"), matrices, strict=True):
                key = f"{PEFT_PREFIX}{name}.{part}.weight"
                tensor = tensors.pop(key, None)
                if tensor is None or tensor.shape != parameter.shape:
                    shape = None if tensor is None else tuple(tensor.shape)
                    raise CheckpointError(
                        f"{path} has {key} with shape {shape}; this model needs {tuple(parameter.shape)}.",
                        remedy="Load it onto the model and the LoraConfig that it was trained with.",
                    )
                if not (allow_nonfinite or bool(torch.isfinite(tensor).all())):
                    raise CheckpointError(f"{path} has NaN or infinity in {key}.", remedy="Use an earlier checkpoint.")
                if not parameter.requires_grad and not torch.equal(parameter, tensor):
                    raise CheckpointError(
                        f"{path} has another {key} than the seed of this run gives.", remedy="Use the run's own seed."
                    )
                loaded.append((cast(nn.Parameter, parameter), tensor))
        if tensors:
            raise CheckpointError(
                f"{path} has weights for layers that this adapter doesn't change, e.g. {next(iter(tensors))}.",
                remedy="Use the LoraConfig that it was trained with.",
            )
        with torch.no_grad():
            for parameter, tensor in loaded:
                parameter.copy_(tensor)
        return run


def read_lora_config(folder: Path) -> LoraConfig:
    """Returns the PEFT configuration in a checkpoint.

    Raises:
        CheckpointError: there is no `adapter_config.json`, or it isn't one of LoRA.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(f"There is no {path}.", remedy="Name a folder that holds a PEFT checkpoint.")
    try:
        kind = json.loads(path.read_text())["peft_type"]
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path} is no PEFT configuration.", remedy="Use another copy of it.") from None
    if kind != "LORA":
        raise CheckpointError(f"{path} describes {kind!r}.", remedy="Only LoRA adapters are offered.")
    return cast(LoraConfig, LoraConfig.from_pretrained(str(folder)))


def _initial(
    config: LoraConfig, out_features: int, in_features: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Returns initial matrices A `(r, in)` and B `(out, r)`."""
    a, b = torch.empty(config.r, in_features), torch.zeros(out_features, config.r)
    init = config.init_lora_weights
    if init == "gaussian":
        nn.init.normal_(a, std=1 / config.r, generator=generator)
    elif isinstance(init, bool):
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        if not init:
            nn.init.kaiming_uniform_(b, a=math.sqrt(5), generator=generator)
    else:
        raise ConfigError(
            f"LoraConfig has init_lora_weights={init!r}, which needs the pretrained weights.",
            remedy="Use True, False or 'gaussian'.",
        )
    return a, b
