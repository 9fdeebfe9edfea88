"""Bits of some 600 scoring problems, to compare before and after a change of structure.

    python tools/golden.py record before.npz    # in the tree before the change, once it is built
    python tools/golden.py record after.npz     # in the tree after it, on the same machine
    python tools/golden.py compare before.npz after.npz

Problems go over losses, labels, dtypes, heads, sequences, chunk sizes, precisions and options, on
every backend that runs here (the C++ kernels with each instruction set, Triton in its interpreter),
and over models with both gradients. Only what the package exports is called, so that a tree of any
age can be recorded. Different processors round differently: record both trees on one machine.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

sys.path.insert(0, os.getcwd())  # the tree that this runs in, whatever is installed

FIELDS = ("alignment", "grad_sqnorm", "loss", "el2n", "margin", "entropy", "mean_grad_sqnorm")
# Sizes that reach every regime: few, some and many classes, one column, an odd number of them.
SIZES = ((97, 2, 33), (300, 10, 64), (130, 17, 48), (210, 33, 40), (64, 100, 24), (50, 300, 72))
SMALL = ((37, 2, 17), (40, 10, 32), (24, 40, 16))  # for Triton's interpreter
LOSSES = ("cross_entropy", "binary_cross_entropy", "mse")


def problem(size: tuple[int, int, int], seed: int, **choice: Any) -> dict[str, Any]:
    """Arguments of ``last_layer_stats`` for a seeded problem of (N, C, D)."""
    n, c, d = size
    g = torch.Generator().manual_seed(seed)
    heads, loss = choice.pop("heads", None), choice.get("loss", "cross_entropy")
    dtype, soft = choice.pop("dtype", torch.float32), choice.pop("soft", False)
    shape = (c,) if heads is None else (heads, c)
    features = torch.randn(n, d, generator=g).to(dtype)
    if choice.pop("strided", False):
        features = features.T.contiguous().T
    weight = torch.randn(*shape, d, generator=g) / d**0.5
    labels: Tensor = torch.randint(c, (n,), generator=g)
    labels[::7] = -100
    if loss == "mse":
        labels = torch.randn(n, c, generator=g)
    elif loss == "binary_cross_entropy" or soft:
        labels = torch.rand(n, c, generator=g)
        labels = labels / labels.sum(1, keepdim=True) if loss == "cross_entropy" else labels
    given = {"features": features, "weight": weight.to(choice.pop("head", dtype)), "labels": labels}
    if choice.pop("bias", True):
        given["bias"] = torch.randn(*shape, generator=g).to(given["weight"].dtype)
    if choice.pop("weighted", False):
        given["sample_weight"] = torch.rand(n, generator=g) + 0.5
    if choice.pop("sequences", False):
        cuts = torch.randperm(n - 1, generator=g)[: n // 5].sort().values + 1
        given["cu_seqlens"] = torch.cat([cuts.new_tensor([0]), cuts, cuts.new_tensor([n])])
    return {**given, **choice}


def problems(sizes: tuple[tuple[int, int, int], ...], backend: str) -> Iterator[tuple[str, Any]]:
    """Every problem of a backend by name."""
    for seed, size in enumerate(sizes):
        choices: list[dict[str, Any]] = [
            {},
            {"bias": False},
            {"chunk_size": 16},
            {"weighted": True},
        ]
        choices += [{"loss": loss} for loss in LOSSES[1:]] + [{"soft": True}]
        choices += [{"label_smoothing": 0.1}, {"heads": 3}, {"sequences": True}, {"strided": True}]
        choices += [{"sequences": True, "per": "token", "chunk_size": 20}]
        choices += [{"dtype": torch.bfloat16}, {"dtype": torch.float16, "heads": 2}]
        choices += [{"dtype": torch.bfloat16, "precision": "highest", "head": torch.float32}]
        choices += [{"precision": "medium"}, {"precision": "high", "loss": "binary_cross_entropy"}]
        if backend == "torch":
            choices += [{"dtype": torch.float64}, {"dtype": torch.float64, "sequences": True}]
        for choice in choices:
            words = "-".join(f"{k}={v}".replace("torch.", "") for k, v in choice.items())
            name = f"{'x'.join(map(str, size))}-{words or 'plain'}"
            yield name, problem(size, seed, **choice)


def record_backend(backend: str, sizes: Any) -> dict[str, Any]:
    """Results of every problem by name."""
    import moso_fast

    found: dict[str, Any] = {}
    for name, given in problems(sizes, backend):
        stats = moso_fast.last_layer_stats(**given, backend=backend)
        for field in FIELDS:
            value = getattr(stats, field)
            found[f"{name}/{field}"] = torch.as_tensor(value).numpy()
        for formula in moso_fast.FORMULAS:
            found[f"{name}/{formula}"] = stats.scores(formula).numpy()
        found[f"{name}/scores"] = moso_fast.moso_scores(**given, backend=backend).numpy()
    return found


def networks() -> dict[str, tuple[nn.Module, TensorDataset, dict[str, Any]]]:
    """Models with data and options of the scorer, by name."""
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(1)
    images, classes = torch.randn(40, 3, 8, 8, generator=g), torch.randint(4, (40,), generator=g)
    words = torch.randint(11, (24, 7), generator=g)
    tokens = words.clone()
    tokens[:, 5:] = -100
    conv = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 4)
    )
    norm = nn.Sequential(
        nn.Flatten(), nn.Linear(192, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 4)
    )
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    language = nn.Sequential(nn.Embedding(11, 8), layer, nn.Linear(8, 11))
    narrow = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.Tanh(), nn.Linear(16, 4))
    pictures = TensorDataset(images, classes)
    return {
        "conv": (conv, pictures, {}),
        "norm": (norm, pictures, {}),
        "language": (language, TensorDataset(words, tokens), {"shift_labels": True}),
        "language_sums": (
            language,
            TensorDataset(words, tokens),
            {"per": "sample", "shift_labels": False},
        ),
        "bfloat16": (narrow, pictures, {"dtype": torch.bfloat16}),
    }


def record_models() -> dict[str, Any]:
    """Tables of models for both gradients, three checkpoints, parts and combinations."""
    import moso_fast

    found: dict[str, Any] = {}
    for name, (model, data, options) in networks().items():
        for gradient in ("last_layer", "full"):
            if gradient == "full" and "dtype" in options:
                continue
            scorer = moso_fast.MoSoScorer(
                model, gradient=gradient, batch_size=9, progress=False, **options
            )
            checkpoints = []
            for step in range(3):
                g = torch.Generator().manual_seed(step)
                state = {k: v.clone() for k, v in model.state_dict().items()}
                for value in state.values():
                    if value.is_floating_point():
                        value += 0.05 * torch.randn(value.shape, generator=g)
                        if step == 0:
                            value.abs_()
                checkpoints.append(moso_fast.Checkpoint(state, lr=0.1 / (step + 1), step=step))
            calls: dict[str, dict[str, Any]] = {
                "plain": {},
                "parts": {"partition": 2, "combine": "zscore"},
                "exact": {"formula": "official_exact", "num_steps": 100},
            }
            for call, arguments in calls.items():
                table = scorer.score(data, checkpoints, **arguments)
                key = f"{name}-{gradient}-{call}"
                found[f"{key}/scores"] = table.scores.numpy()
                for metric, values in table.metrics.items():
                    found[f"{key}/{metric}"] = values.numpy()
    return found


def record(path: Path) -> None:
    """Write the results of everything that runs here to ``path``."""
    import moso_fast

    found: dict[str, Any] = {}
    runs = [("models", "", {}), ("torch", "torch", {})]
    if moso_fast.backends()["cpu"].available:
        from moso_fast import _cpu  # type: ignore[attr-defined]

        runs += [(f"cpu-{v}", "cpu", {"MOSO_FAST_SIMD": v}) for v in _cpu.variants()]
    runs.append(("triton", "triton", {"TRITON_INTERPRET": "1"}))
    with tempfile.TemporaryDirectory() as folder:
        for label, backend, environment in runs:
            part = Path(folder) / f"{label}.npz"
            command = [sys.executable, __file__, "part", str(part), backend]
            # One thread: products by BLAS round by the number of threads.
            extra = {**environment, "OMP_NUM_THREADS": "1"}
            subprocess.run(command, check=True, env={**os.environ, **extra})
            with np.load(part) as results:
                found.update({f"{label}/{key}": results[key] for key in results.files})
            print(f"{label}: {len({k.rsplit('/', 1)[0] for k in found})} problems so far")
    np.savez_compressed(path, **found)


def compare(before: Path, after: Path) -> int:
    """Print what differs, and return 1 if anything does."""
    with np.load(before) as one, np.load(after) as other:
        mine, theirs = dict(one.items()), dict(other.items())
    moved: dict[str, float] = {}
    for key in sorted(mine.keys() & theirs.keys()):
        a, b = mine[key], theirs[key]
        if a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes():
            continue
        if a.shape != b.shape:
            moved[key] = float("inf")
            continue
        gap = torch.from_numpy(np.abs(a.astype(np.float64) - b.astype(np.float64))).nan_to_num(0)
        largest = F.relu(torch.from_numpy(np.abs(a.astype(np.float64)))).nan_to_num(0).amax()
        moved[key] = float(gap.amax() / largest.clamp_min(1e-300))
    problems_seen = {key.rsplit("/", 1)[0] for key in mine}
    for key, gap in moved.items():
        print(f"{key}: differs by {gap:.1e} of the largest")
    for name, keys in (("only before", mine.keys() - theirs), ("only after", theirs.keys() - mine)):
        for key in sorted(keys):
            print(f"{key}: {name}")
    same = mine.keys() == theirs.keys() and not moved
    print(f"{len(problems_seen)} problems, {len(mine)} results, {len(moved)} differ")
    return 0 if same else 1


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("record").add_argument("path", type=Path)
    pair = commands.add_parser("compare")
    pair.add_argument("before", type=Path)
    pair.add_argument("after", type=Path)
    part = commands.add_parser("part", help="what `record` starts for every backend")
    part.add_argument("path", type=Path)
    part.add_argument("backend", nargs="?", default="")
    given = parser.parse_args()
    if given.command == "compare":
        return compare(given.before, given.after)
    if given.command == "record":
        record(given.path)
        return 0
    warnings.simplefilter("ignore")
    sizes = SMALL if given.backend == "triton" else SIZES
    results = record_backend(given.backend, sizes) if given.backend else record_models()
    np.savez(given.path, **results)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
