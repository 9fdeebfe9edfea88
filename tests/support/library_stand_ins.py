"""What the package sees of pandas, peft and transformers, for tests without those libraries.

The tier ``models`` holds the same against the libraries themselves. These have the modules, names
and attributes that are looked at, and nothing else.
"""

from __future__ import annotations

from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def of_module(cls: type, module: str) -> type:
    """Let a class be one of ``module``."""
    cls.__module__ = module
    return cls


class Lora(nn.Module):
    """The wrapper that peft puts around a linear layer: the layer, and an adapter beside it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = layer
        self.lora = nn.Linear(layer.in_features, layer.out_features, bias=False)
        self._merged = self._disabled = False

    @property
    def merged(self) -> bool:
        return self._merged

    @property
    def disable_adapters(self) -> bool:
        return self._disabled

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora(x)


class ModulesToSaveWrapper(nn.Module):
    """The wrapper that peft puts around a layer which is trained whole beside an adapter."""

    def __init__(self, layer: nn.Module, active: Any = "default") -> None:
        super().__init__()
        self.original_module = layer
        copies = {"default": nn.Linear(4, 3), "other": nn.Linear(4, 3)}
        self.modules_to_save = nn.ModuleDict(copies)
        self.active_adapter = active


class PeftModel(nn.Module):
    """A network with an adapter, its configuration and the names of the adapters in force."""

    def __init__(self, network: nn.Module, **config: Any) -> None:
        super().__init__()
        self.base_model = network
        config = {"r": 2, "lora_alpha": 8, "use_dora": False, "rank_pattern": {}, **config}
        self.peft_config = {"default": SimpleNamespace(to_dict=lambda: config)}
        self.active_adapter = "default"

    def get_base_model(self) -> nn.Module:
        return self.base_model


for _cls in (Lora, ModulesToSaveWrapper):
    of_module(_cls, "peft.tuners.layer")
of_module(PeftModel, "peft.peft_model")


def adapter_state(network: Any, *, state_dict: Any, adapter_name: str, **options: bool) -> Any:
    """As peft's own: the adapter's tensors without the prefix of the network, embeddings if asked.

    ``network`` and ``adapter_name`` are for peft to say which; here is one of each.
    """
    assert isinstance(network, PeftModel) and adapter_name == "default"
    wanted = ("lora", "embed") if options["save_embedding_layers"] else ("lora",)
    return {
        f"saved.{name.removeprefix('base_model.')}": tensor
        for name, tensor in state_dict.items()
        if any(word in name.split(".") for word in wanted)
    }


def peft() -> ModuleType:
    """Return a module in the place of peft."""
    module = ModuleType("peft")
    module.get_peft_model_state_dict = adapter_state  # type: ignore[attr-defined]
    return module


class Column:
    """A column of pandas: numbers, and the dtype of them that may have room for missing values."""

    def __init__(self, values: Any, dtype: Any = None, missing: Any = ()) -> None:
        self.values = np.asarray(values)
        self.dtype = self.values.dtype if dtype is None else dtype
        self.missing = np.isin(np.arange(len(self.values)), missing)

    def isna(self) -> np.ndarray:
        return self.missing

    def to_numpy(self, dtype: Any = None, **how: Any) -> np.ndarray:
        if dtype is None:
            return self.values
        found = self.values.astype(dtype)
        if how:
            found[self.missing] = how["na_value"]
        return found


class Frame:
    """A frame of pandas: columns by name; ``joined`` is what it makes of them together."""

    def __init__(self, joined: Any, columns: Any) -> None:
        self.joined, self.by_name = np.asarray(joined), dict(columns)
        self.columns = [name for name, _ in columns]

    def __getitem__(self, name: Any) -> Any:
        return self.by_name[name]

    def to_numpy(self) -> np.ndarray:
        return self.joined


def with_room(numbers: Any, text: str) -> Any:
    """Return a dtype of pandas that has room for missing values, over these numbers of NumPy."""

    class Dtype:
        numpy_dtype = np.dtype(numbers)

        def __repr__(self) -> str:
            return text

    return Dtype()


def pandas() -> ModuleType:
    """Return a module in the place of pandas."""
    module: Any = ModuleType("pandas")
    module.Series, module.DataFrame = Column, Frame
    module.Index = type("Index", (Column,), {})
    extension = type("ExtensionArray", (), {})
    module.api = SimpleNamespace(extensions=SimpleNamespace(ExtensionArray=extension))
    return module


def schedules(kind: str, optimizer: Any, warmup: int, total: int, options: Any) -> Any:
    """As ``transformers.get_scheduler``: a linear rise and fall, or what is no function of steps.

    Raises
    ------
    ValueError
        A schedule of another kind.
    """
    assert isinstance(warmup, int) and isinstance(options, dict)
    if kind == "plateau":
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    if kind not in ("linear", "rising"):
        raise ValueError(kind)

    def factor(step: int) -> float:
        if step < warmup:
            return step / warmup
        fall = max(0.0, (total - step) / (total - warmup))
        return fall ** options.get("power", 1)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def transformers() -> ModuleType:
    """Return a module in the place of transformers, which can be looked for too."""
    module: Any = ModuleType("transformers")
    module.__spec__ = ModuleSpec("transformers", None)
    module.get_scheduler = schedules
    return module


class PreTrainedModel(nn.Module):
    """A model of transformers, which saves its weights under other names than it has them."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.dense = nn.Linear(2, 3)

    @classmethod
    def from_pretrained(cls, path: None, **given: Any) -> Any:
        """Return the model and a report, as the library does with ``output_loading_info``."""
        assert path is None and given["output_loading_info"]
        torch.rand(1)  # its initial weights are drawn
        given["config"].loads.append(given)
        if given["config"].fails:
            raise given["config"].fails
        made = cls(given["config"]).to(given["dtype"])
        state = {name.replace("gamma", "weight"): t for name, t in given["state_dict"].items()}
        lost, odd = made.load_state_dict(state, strict=False)
        report = {"missing_keys": lost, "unexpected_keys": odd, "mismatched_keys": []}
        return made, {**report, **given["config"].report}


of_module(PreTrainedModel, "transformers.modeling_utils")
