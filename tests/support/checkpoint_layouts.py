"""A small network and the layouts in which training scripts leave its weights."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import enum
import functools
import pathlib
import random
import types
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class EasyDict(dict):
    """A dictionary with attributes, as many configuration libraries have one."""


class Log(list):
    pass


class Phase(enum.Enum):
    WARM = 1


@dataclasses.dataclass
class Config:
    rate: float = 0.1
    folder: pathlib.Path = pathlib.Path("runs")


def network(seed: int = 0) -> nn.Sequential:
    """A head (3, 8) whose shape no other parameter has, behind a layer and BatchNorm."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 2.0)
        model[1].num_batches_tracked += seed
    return model.eval()


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


SOURCE, OTHER = network(1), network(2)
STATE, OTHER_STATE = state_of(SOURCE), state_of(OTHER)


def under(prefix: str, state: dict[str, Tensor] = STATE) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def stepped(lr: float, *head: float, momentum: float = 0.9) -> dict[str, Any]:
    """State of an optimiser after a step; a second number is the rate of the head's group."""
    model = network(1)
    groups: list[dict[str, Any]] = [{"params": list(model.parameters())}]
    if head:
        groups = [
            {"params": list(model[:3].parameters())},
            {"params": list(model[3].parameters()), "lr": head[0]},
        ]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=momentum)
    model(torch.ones(2, 5)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


def averaged(model: nn.Module) -> dict[str, Tensor]:
    return torch.optim.swa_utils.AveragedModel(model).state_dict()


def inside(wrapper: str) -> dict[str, Tensor]:
    """Names with a wrapper around every layer."""
    return {name.replace(".", f".{wrapper}.", 1): tensor for name, tensor in STATE.items()}


# name: (content, learning rate that it states). All of them hold STATE.
LOADS: dict[str, tuple[Any, float | None]] = {
    "bare": (STATE, None),
    "module.": (under("module."), None),
    "_orig_mod.": (under("_orig_mod."), None),
    "module._orig_mod.": (under("module._orig_mod."), None),
    "_orig_mod.module.": (under("_orig_mod.module."), None),
    "_forward_module.module._orig_mod.model.net.": (
        under("_forward_module.module._orig_mod.model.net."),
        None,
    ),
    "model.module.": (under("model.module."), None),
    "FSDP": ({"model": under("_fsdp_wrapped_module.")}, None),
    "activation checkpointing": (inside("_checkpoint_wrapped_module"), None),
    "compiled layers": (inside("_orig_mod"), None),
    "data parallel layers": (inside("module"), None),
    "Lightning model.": ({"state_dict": under("model."), "epoch": 3, "global_step": 7}, None),
    "Lightning backbone.": ({"state_dict": under("backbone.")}, None),
    "Lightning any name": ({"state_dict": under("my_student_net.")}, None),
    "Lightning, compiled": ({"state_dict": under("model._orig_mod.")}, None),
    "Lightning and a metric": (
        {"state_dict": {**under("model."), "acc.total": torch.tensor(1), "loss.w": torch.ones(3)}},
        None,
    ),
    "timm with args": (
        {"state_dict": STATE, "epoch": 1, "arch": "x", "args": argparse.Namespace(lr=0.1)},
        None,
    ),
    "numpy number": ({"state_dict": STATE, "best_acc": np.float64(0.5)}, None),
    "numpy random state": ({"state_dict": STATE, "rng": np.random.get_state()}, None),
    "numpy array beside": ({"state_dict": STATE, "seen": np.arange(6).reshape(2, 3)}, None),
    "numpy weights": ({"state_dict": {n: t.numpy() for n, t in STATE.items()}}, None),
    "random states": (
        {"model": STATE, "rng": torch.get_rng_state(), "py": random.getstate()},
        None,
    ),
    "pathlib": ({"state_dict": STATE, "dir": pathlib.Path("x")}, None),
    "objects of the script": (
        {
            "state_dict": STATE,
            "config": Config(),
            "phase": Phase.WARM,
            "time": datetime.datetime(2024, 1, 1),
            "hook": functools.partial(print, 1),
            "space": types.SimpleNamespace(a=1),
            "by phase": {Phase.WARM: 1},
        },
        None,
    ),
    "subclasses of dict and list": (
        {
            "config": EasyDict(a=1, b=EasyDict(c=[1])),
            "log": collections.defaultdict(list, {"loss": [1.0]}),
            "list": Log([1, 2]),
            "last": collections.deque([1, 2], maxlen=3),
            "state_dict": STATE,
        },
        None,
    ),
    "optimiser pickled whole": (
        {"model": STATE, "optimizer": torch.optim.SGD(SOURCE.parameters(), lr=0.25)},
        0.25,
    ),
    "DeepSpeed": (
        {
            "module": STATE,
            "optimizer": None,
            "dp_world_size": 1,
            "lr_scheduler": {"_last_lr": [2.0]},
        },
        2.0,
    ),
    "AveragedModel": (averaged(SOURCE), None),
    "model_ema alone": ({"model_ema": averaged(SOURCE)}, None),
    "model and equal ema": ({"model": STATE, "model_ema": averaged(SOURCE)}, None),
    "params": ({"params": STATE}, None),
    "weights": ({"weights": STATE}, None),
    "weights and their gradients": ({"weights": STATE, "grads": OTHER_STATE}, None),
    "state_dict with a number": ({**STATE, "epoch": 3}, None),
    "state_dict with its metadata": (SOURCE.state_dict(), None),
    "without counters of batches": (
        {name: t for name, t in STATE.items() if "num_batches" not in name},
        None,
    ),
    "with position_ids": ({**STATE, "position_ids": torch.arange(4)[None]}, None),
    "whole model": (SOURCE, None),
    "whole model in a dictionary": ({"model": SOURCE, "ema": None, "updates": 3}, None),
    "whole DataParallel": (nn.DataParallel(SOURCE), None),
    "nested state/model": ({"state": {"model": STATE}}, None),
    "one dictionary a part": ({n: SOURCE[int(n)].state_dict() for n in ("0", "1", "3")}, None),
    "fairseq": (
        {
            "args": argparse.Namespace(lr=[0.1]),
            "model": under("module."),
            "extra_state": {"epoch": 3},
            "last_optimizer_state": stepped(0.5),
        },
        0.5,
    ),
    "mmengine": (
        {
            "meta": {"epoch": 3, "time": datetime.datetime(2024, 1, 1)},
            "state_dict": under("backbone."),
            "message_hub": {"loss": np.array([1.0, 2.0])},
            "optimizer": stepped(0.5),
            "param_schedulers": [{"_last_lr": [0.25]}],
        },
        0.5,
    ),
    "state_dict under meta": ({"meta": {"state_dict": STATE, "epoch": 3}}, None),
    "detectron2": (
        {"model": STATE, "scheduler": {"_last_lr": [0.25], "last_epoch": 4}, "iteration": 9},
        0.25,
    ),
    "Composer": (
        {"state": {"model": under("module."), "optimizers": {"SGD": stepped(0.125)}}, "rng": []},
        0.125,
    ),
    "torchtune": ({"model": STATE, "optimizer": stepped(0.5), "epoch": 1}, 0.5),
    "Fabric": ({"model": under("_forward_module."), "optimizer": stepped(0.5)}, 0.5),
    "distillation": ({"state_dict": {**under("student."), "teacher.w": torch.ones(2)}}, None),
    "lr as a tensor": ({"model": STATE, "optimizer": {"param_groups": [{"lr": torch.ones(1)}]}}, 1),
    "lr as a numpy number": ({"state_dict": STATE, "lr": np.float32(0.5)}, 0.5),
    "lr in a list": ({"net": STATE, "lr": [np.float64(0.1), np.float64(0.5)], "epoch": 3}, 0.5),
    "lr of the head's group": ({"model": STATE, "optimizer": stepped(1e-4, 0.5)}, 0.5),
}

# name: (content, what the message says, the entry that the message offers or None).
REFUSED: dict[str, tuple[Any, str, str | None]] = {
    "student and teacher": (
        {"student": under("module."), "teacher": OTHER_STATE},
        "different weights that fit the model under 'student.module' and 'teacher'; choose one "
        r"with Checkpoint\(source, entry='student.module'\)",
        "student",
    ),
    "momentum contrast": (
        {"state_dict": {**under("module.encoder_q."), **under("module.encoder_k.", OTHER_STATE)}},
        "choose one with",
        "state_dict.module.encoder_q",
    ),
    "two epochs": ({"epoch_1": OTHER_STATE, "epoch_2": STATE}, "choose one with", "epoch_2"),
    "generator and discriminator": (
        {"generator": OTHER_STATE, "discriminator": STATE},
        "choose one with",
        "discriminator",
    ),
    "a copy inside the weights": (
        {"state_dict": {**STATE, **under("ema.", OTHER_STATE)}},
        r"8 unexpected \(state_dict.ema.0.weight, .*others that fit it alone lie below",
        None,
    ),
    "a teacher inside the weights": (
        {**OTHER_STATE, **under("teacher.")},
        r"8 unexpected .*entry='teacher'",
        "teacher",
    ),
    "parameters without buffers": (
        dict(SOURCE.named_parameters()),
        r"2 missing \(1.running_mean, 1.running_var\)",
        None,
    ),
    "a missing layer": (
        {"state_dict": {n: t for n, t in STATE.items() if n != "3.bias"}, "epoch": 1},
        r"1 missing \(3.bias\); it holds state_dict \(dictionary of 8\), epoch \(int\)",
        None,
    ),
    "one more layer": (
        {"state_dict": {**STATE, "4.weight": torch.ones(2, 3)}},
        r"1 unexpected \(state_dict.4.weight\)",
        None,
    ),
    "another width": (
        {**STATE, "3.weight": torch.ones(4, 8), "3.bias": torch.ones(4)},
        r"3.weight has shape \(4, 8\), in the model \(3, 8\)",
        None,
    ),
    "gradients alone": ({"grads": STATE}, "9 missing .*names of optimisers, gradients", "grads"),
    "fisher information": ({"fisher_diag": STATE}, "9 missing", "fisher_diag"),
    "integers": (
        {"state_dict": {n: (10 * t).to(torch.int8) for n, t in STATE.items()}},
        "holds torch.int8, and the model torch.float32; quantised",
        None,
    ),
    "complex": (
        {n: t.to(torch.complex64) for n, t in STATE.items()},
        "holds torch.complex64",
        None,
    ),
    "meta tensors": (
        {n: t.to("meta") for n, t in STATE.items()},
        r"holds no values \(a meta",
        None,
    ),
    "position_ids of another order": (
        {**STATE, "position_ids": torch.tensor([[1, 0]])},
        r"1 unexpected \(position_ids\)",
        None,
    ),
    "both ways to name": (
        {"a": {"b": torch.ones(1)}, "a.b": torch.ones(1), **STATE},
        "two tensors named 'a.b'",
        None,
    ),
    "nothing": ({}, "must be a state dict of tensors, or hold one; it is empty", None),
    "settings alone": (
        {"epoch": 1, "config": {"a": 1}},
        r"it holds epoch \(int\), config \(dictionary of 1\)",
        None,
    ),
    "a list": ([STATE], "must hold a state dict, got list; save model.state_dict", None),
    "an object": (Config(), "must hold a state dict, got an object .*Config; save model", None),
}

# name: (content, entry that is taken, entry that the warning offers and that holds OTHER_STATE).
WITH_A_CHOICE: dict[str, tuple[Any, str, str]] = {
    "timm": (
        {"state_dict": STATE, "state_dict_ema": OTHER_STATE},
        "state_dict",
        "state_dict_ema",
    ),
    "torchvision": ({"model": STATE, "model_ema": averaged(OTHER)}, "model", "model_ema.module"),
    "swa first": (
        {"swa_state_dict": averaged(OTHER), "state_dict": STATE},
        "state_dict",
        "swa_state_dict.module",
    ),
    "BasicSR": ({"params": STATE, "params_ema": OTHER_STATE}, "params", "params_ema"),
    "best so far": ({"net": STATE, "best_net": OTHER_STATE}, "net", "best_net"),
    "Lightning callback": (
        {"state_dict": {**under("model."), **under("ema_model.module.", OTHER_STATE)}},
        "state_dict.model",
        "state_dict.ema_model.module",
    ),
}
