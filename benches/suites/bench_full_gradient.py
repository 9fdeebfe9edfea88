"""Whole-network MoSo: speed against what else is exact, memory, and what the last layer gives up.

    python -m benches.suites.bench_full_gradient speed [--save FILE.json] [--threads 2] [--rounds 5]
    python -m benches.suites.bench_full_gradient memory [--save FILE.json]
    python -m benches.suites.bench_full_gradient study [--data-root MNIST_FOLDER] [--save FOLDER]

speed: samples a second of two passes over the data for one checkpoint, against the authors' loop
(batch size 1, two backward passes a sample) and against two passes of vmap(grad) at the best of
several chunk sizes; in turn in every round, medians; nothing is timed before its results agree.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moso_fast.bench.measure import interleaved, medians
from moso_fast.full.batches import Batch
from moso_fast.full.engine import FullGradient, choose_parameters
from moso_fast.full.loss import OutputLoss
from moso_fast.full.passes import Network, alignment_forward

from .scorer_overhead import ResNet18

CHUNKS = (1, 4, 16, 64, 256)


def small_cnn() -> nn.Module:
    """Network for 8 x 8 images, under a million operations a sample."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, int, int]] = {
    # name: model, shape of a sample, samples of the loop a round, of the others, batch size
    "ResNet-18, 3 x 32 x 32": (ResNet18, (3, 32, 32), 16, 128, 64),
    "small CNN, 1 x 8 x 8": (small_cnn, (1, 8, 8), 256, 4096, 256),
}


def authors_loop(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """<G - g / N, g> with two backward passes a sample."""
    parameters = list(model.parameters())

    def gradient(k: int) -> Tensor:
        loss = F.cross_entropy(model(inputs[k : k + 1]), labels[k : k + 1])
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])

    count = len(labels)
    mean = torch.zeros(())
    for k in range(count):
        mean = mean * k / (k + 1) + gradient(k) / (k + 1)
    scores = []
    for k in range(count):
        g = gradient(k)
        scores.append(((mean - g / count) * g).sum())
    return torch.stack(scores)


def vmap_passes(model: nn.Module, inputs: Tensor, labels: Tensor, chunk: int) -> Tensor:
    """Compute the same by vmap(grad), ``chunk`` samples at a time."""
    values = {name: p.detach() for name, p in model.named_parameters()}

    def loss(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, values, (x[None],)), y[None])

    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))
    count = len(labels)
    mean = {name: torch.zeros_like(v) for name, v in values.items()}
    for start in range(0, count, chunk):
        some = slice(start, start + chunk)
        for name, g in each(values, inputs[some], labels[some]).items():
            mean[name] += g.sum(0) / count
    scores = torch.zeros(count)
    for start in range(0, count, chunk):
        some = slice(start, start + chunk)
        for name, g in each(values, inputs[some], labels[some]).items():
            flat = g.flatten(1)
            scores[some] += flat @ mean[name].flatten() - flat.square().sum(1) / count
    return scores


class Ours:
    """One checkpoint's two passes, and each of them alone."""

    def __init__(self, model: nn.Module, inputs: Tensor, labels: Tensor, batch: int) -> None:
        parameters = choose_parameters(model)
        device = inputs.device
        self.network = Network(model, OutputLoss("cross_entropy"), parameters, device)
        self.engine = FullGradient(self.network)
        index = torch.arange(len(labels))
        self.batches = [
            Batch((x,), {}, y, i)
            for x, y, i in zip(
                inputs.split(batch), labels.split(batch), index.split(batch), strict=True
            )
        ]
        self.tangents = {id(p): 0.01 * torch.randn_like(p) for p in parameters.values()}

    @torch.no_grad()
    def scores(self) -> Tensor:
        """<G - g / N, g>."""
        result = self.engine.part(lambda: self.batches)
        return result.fields["alignment"] - result.fields["grad_sqnorm"] / result.count

    @torch.no_grad()
    def first_pass(self) -> None:
        """Mean gradient and norms."""
        for batch in self.batches:
            self.engine._first(batch)

    def second_pass(self) -> None:
        """Alignments."""
        for batch in self.batches:
            alignment_forward(self.network, batch, self.tangents)

    @torch.no_grad()
    def forward(self) -> None:
        """One forward pass."""
        for batch in self.batches:
            self.network.forward(batch)

    def backward(self) -> None:
        """One forward and backward pass: the mean gradient alone."""
        for batch in self.batches:
            loss = F.cross_entropy(self.network.forward(batch), batch.labels)
            torch.autograd.grad(loss, self.network.parameters)


def check(name: str, found: Tensor, expected: Tensor) -> None:
    """Raise unless the scores agree: no number for a wrong result."""
    error = float((found - expected).abs().max() / expected.abs().max())
    if not error <= 1e-3:
        raise RuntimeError(f"{name}: scores differ by {error:.2g} of the largest")


def speed_case(name: str, rounds: int) -> dict[str, Any]:
    """Time one model; milliseconds a sample."""
    build, shape, few, many, batch = CASES[name]
    torch.manual_seed(0)
    model = build().eval()
    inputs, labels = torch.randn(many, *shape), torch.randint(10, (many,))
    ours = Ours(model, inputs, labels, batch)
    start, targets = inputs[:few], labels[:few]
    expected = authors_loop(model, start, targets)
    check("ours", Ours(model, start, targets, batch).scores(), expected)
    ours.scores()
    chunks = [c for c in CHUNKS if c <= few]
    for chunk in chunks:
        check(f"vmap {chunk}", vmap_passes(model, start, targets, chunk), expected)
    work: dict[str, tuple[Callable[[], object], int]] = {
        "ours": (ours.scores, many),
        "authors' loop": (lambda: authors_loop(model, start, targets), few),
        **{
            f"vmap(grad), chunk {c}": (lambda c=c: vmap_passes(model, start, targets, c), few)
            for c in chunks
        },
        "forward": (ours.forward, many),
        "forward + backward": (ours.backward, many),
        "mean gradient and norms": (ours.first_pass, many),
        "alignment": (ours.second_pass, many),
    }
    times = medians(interleaved({n: f for n, (f, _) in work.items()}, rounds, warm_up=True))
    each = {n: 1000 * times[n] / count for n, (_, count) in work.items()}
    best = min((n for n in each if n.startswith("vmap")), key=each.__getitem__)
    return {
        "case": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "ms_per_sample": {n: round(v, 4) for n, v in each.items()},
        "times_faster_than_loop": round(each["authors' loop"] / each["ours"], 2),
        "times_faster_than_vmap": round(each[best] / each["ours"], 2),
        "best_vmap": best,
    }


def machine() -> dict[str, Any]:
    """Facts about where the numbers come from."""
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8").splitlines()
        processor = next((x.split(": ")[1] for x in lines if "model name" in x), processor)
    return {
        "processor": processor,
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "dtype": "float32",
    }


def speed(options: argparse.Namespace) -> None:
    """Measure and print all cases."""
    torch.set_num_threads(options.threads)
    names = [name for name in CASES if options.case in name]
    rows = []
    for name in names:
        row = speed_case(name, options.rounds)
        rows.append(row)
        print(f"\n{row['case']}: {row['parameters']:,} parameters; milliseconds a sample")
        for name, value in row["ms_per_sample"].items():
            print(f"  {name:28} {value:9.3f}")
        print(
            f"  {row['times_faster_than_loop']} times as fast as the authors' loop, "
            f"{row['times_faster_than_vmap']} times as fast as {row['best_vmap']}"
        )
    if options.save:
        kept = read(options.save)
        rows += [row for row in kept.get("rows", []) if row["case"] not in names]
        content = {"machine": machine(), "rounds": options.rounds, "rows": rows}
        write(options.save, kept | content)


def read(file: Path) -> dict[str, Any]:
    """Return what an earlier run has saved."""
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return found


def write(file: Path, content: dict[str, Any]) -> None:
    """Save results."""
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def memory(options: argparse.Namespace) -> None:
    """Peak memory of a process that scores a network of 25 million parameters at batch 64."""
    torch.set_num_threads(options.threads)
    width = 2048
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(8),
        nn.Flatten(),
        *(nn.Linear(4096, width), nn.ReLU(), nn.Linear(width, 4096), nn.ReLU()),
        *(nn.Linear(4096, width), nn.ReLU(), nn.Linear(width, 10)),
    ).eval()
    count = sum(p.numel() for p in model.parameters())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    Ours(model, torch.randn(128, 3, 32, 32), torch.randint(10, (128,)), 64).scores()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    explicit = 64 * 4 * count / 2**30
    print(
        f"{count / 1e6:.1f}M parameters, batch 64: peak {peak:.2f} GiB, {before:.2f} GiB before "
        f"scoring; per-sample gradients alone would take {explicit:.2f} GiB"
    )
    if options.save:
        found = {"parameters": count, "batch": 64, "peak_gib": round(peak, 2)}
        found |= {"before_gib": round(before, 2), "per_sample_gradients_gib": round(explicit, 2)}
        write(options.save, read(options.save) | {"memory": found})


def main() -> None:
    """Parse the words of the command line and run one part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(dest="part", required=True)
    for name in ("speed", "memory", "study"):
        part = parts.add_parser(name)
        part.add_argument("--threads", type=int, default=2)
        if name == "speed":
            part.add_argument("--rounds", type=int, default=5)
            part.add_argument("--case", default="")
        if name == "study":
            part.add_argument("--data-root", type=Path)
            part.add_argument("--samples", type=int, default=6000)
            part.add_argument("--seeds", type=int, default=3)
        part.add_argument("--save", type=Path)
    options = parser.parse_args()
    if options.part == "study":
        from .full_gradient_study import study

        study(options)
        return
    {"speed": speed, "memory": memory}[options.part](options)


if __name__ == "__main__":
    main()
