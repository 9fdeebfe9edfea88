"""``python -m moso_fast.compat``: the authors' scoring script over their folders."""

from __future__ import annotations

import argparse
import random
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from ..core.errors import DataError
from ..sources.checkpoints.checkpoint import Checkpoint
from ..sources.import_path import import_object
from ..util.devices import usable_device
from ..util.files import atomic_path

_IMAGES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_NAME = re.compile(r"trial_(\d+)_(\d+)\.pth")

_NOTES = """
What differs from the published script: inputs are read without random augmentation (there, the two
passes see different crops and flips); the same epochs are drawn for every part, by --seed (there,
other epochs for every part, from an unseeded generator). The parts are contiguous ranges, as there,
since the surrogates were trained on them; on data stored class by class each part then holds a few
classes only, which is pointed out.
"""


class ImageFolder(Dataset[tuple[Tensor, int]]):
    """Images in one folder a class, in the order of torchvision's class of this name.

    Parameters
    ----------
    root
        ``root/<class>/**/<image>``.
    size
        Side of the square images: the shorter side is scaled to it, and the centre cut out.
    mean, std
        Per channel, of values in [0, 1].
    """

    def __init__(self, root: Path, size: int, mean: Sequence[float], std: Sequence[float]) -> None:
        try:
            import PIL.Image  # noqa: F401
        except ImportError:
            raise ValueError(
                "--data: a folder of images needs pillow: pip install pillow"
            ) from None
        if not root.is_dir():
            raise ValueError(f"--data {root} is no folder")
        classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
        self.files, self.targets = [], []
        for number, name in enumerate(classes):
            for path in _walk(root / name):
                self.files.append(path)
                self.targets.append(number)
        if not self.files:
            raise ValueError(f"--data {root} has no images in one folder a class")
        self.size = size
        self.mean, self.std = (torch.tensor(v, device="cpu").view(-1, 1, 1) for v in (mean, std))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """(3, size, size) float32 and the number of the class."""
        import numpy as np
        from PIL import Image

        with Image.open(self.files[index]) as file:
            image = file.convert("RGB")
        width, height = image.size
        scale = self.size / min(width, height)
        if scale != 1:
            sides = max(self.size, round(width * scale)), max(self.size, round(height * scale))
            image = image.resize(sides, Image.Resampling.BILINEAR)
        left, top = (image.width - self.size) // 2, (image.height - self.size) // 2
        image = image.crop((left, top, left + self.size, top + self.size))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        return (pixels - self.mean) / self.std, self.targets[index]


def _walk(folder: Path) -> list[Path]:
    """Images below a folder, files before subfolders at no level mixed, as os.walk sorts them."""
    found = [p for p in folder.rglob("*") if p.is_file() and p.suffix.lower() in _IMAGES]
    return sorted(found, key=lambda p: (str(p.parent), p.name))


def main(words: Sequence[str] | None = None) -> int:
    """Run the script; 0 done, 2 bad input."""
    options = _parser().parse_args(words)
    try:
        _run(options)
    except (ValueError, TypeError, OSError) as error:
        print(f"moso_fast.compat: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m moso_fast.compat",
        description="Score a data set with the surrogates of the authors' surrogate_training.py.",
        epilog=_NOTES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--path", required=True, type=Path, help="experiment folder: checkpoint/trial_T_EPOCH.pth")
    add("--data", required=True, help="folder with one folder a class, or MODULE:NAME of a dataset")
    add("--model", required=True, help="MODULE:NAME of the network, or of what returns it")
    add("--num_trails", type=int, default=8, help="number of parts (default 8)")
    add("--samples", type=int, default=10, help="epochs to draw (default 10)")
    add("--seed", type=int, default=0, help="of the drawn epochs (default 0)")
    add("--formula", default="official_exact", choices=("official_exact", "official"))
    add("--bs", type=int, default=256, help="batch size (default 256)")
    add("--device", default=None, help="default: cuda where there is one")
    add("--size", type=int, default=32, help="side of the images (default 32)")
    add("--mean", type=float, nargs=3, default=(0.4914, 0.4822, 0.4465))
    add("--std", type=float, nargs=3, default=(0.2023, 0.1994, 0.2010))
    add("--output", type=Path, default=None, help="default: PATH/score/moso_score.pth")
    add("--resume", type=Path, default=None, help="folder in which finished epochs are kept")
    return parser


def _run(options: argparse.Namespace) -> None:
    from ..scorer import MoSoScorer

    device = usable_device(
        options.device or ("cuda" if torch.cuda.is_available() else "cpu"), "--device"
    )
    data: Any
    if ":" in options.data and not Path(options.data).exists():
        data = import_object(options.data, "--data")
    else:
        data = ImageFolder(Path(options.data), options.size, options.mean, options.std)
    model = import_object(options.model, "--model", finished=nn.Module)
    if not isinstance(model, nn.Module):
        raise ValueError(f"--model {options.model} must give an nn.Module")
    parts = contiguous_parts(len(data), options.num_trails)
    files = checkpoint_files(options.path / "checkpoint", options.num_trails)
    epochs = draw_epochs(files, options.samples, options.seed)
    _point_out_sorted(data, parts)
    scorer = MoSoScorer(model.to(device), gradient="full", device=device, batch_size=options.bs)
    scores = torch.empty(len(data), device="cpu")
    for number, part in enumerate(parts):
        try:
            table = scorer.score(
                Subset(data, list(part)),
                [Checkpoint(files[number][epoch]) for epoch in epochs],
                formula=options.formula,
                resume=None if options.resume is None else options.resume / f"trial_{number}",
            )
        except DataError as error:
            raise error.moved(part[error.row], f"part {number}: ") from error
        # Theirs is a sum over the epochs, each weighted by its learning rate.
        scores[part.start : part.stop] = table.scores.float() * len(epochs)
        print(f"part {number}: {len(part)} samples, {len(epochs)} epochs", file=sys.stderr)
    output = options.output or options.path / "score" / "moso_score.pth"
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(output) as path:
        torch.save(scores, path)
    print(f"{output}: {len(scores)} scores, epochs {', '.join(map(str, epochs))}")


def contiguous_parts(samples: int, parts: int) -> list[range]:
    """Cut as the authors do: equal ranges, the last one takes the rest."""
    if not 1 <= parts <= samples // 2:
        raise ValueError(f"--num_trails must be from 1 to {samples // 2}, got {parts}")
    size = samples // parts
    ends = [*(size * (k + 1) for k in range(parts - 1)), samples]
    return [range(size * k, end) for k, end in enumerate(ends)]


def checkpoint_files(folder: Path, parts: int) -> list[dict[int, Path]]:
    """Find the files of each part: epoch -> path."""
    found: list[dict[int, Path]] = [{} for _ in range(parts)]
    for path in sorted(folder.glob("trial_*.pth")) if folder.is_dir() else []:
        match = _NAME.fullmatch(path.name)
        if match and int(match[1]) < parts:
            found[int(match[1])][int(match[2])] = path
    for part, files in enumerate(found):
        if not files:
            raise ValueError(f"{folder} has no trial_{part}_EPOCH.pth (--num_trails {parts})")
    return found


def draw_epochs(files: Sequence[dict[int, Path]], count: int, seed: int) -> list[int]:
    """Draw epochs that every part has, by a seed of their own."""
    common = sorted(set.intersection(*(set(one) for one in files)))
    if not 1 <= count <= len(common):
        raise ValueError(
            f"--samples must be from 1 to {len(common)}, the common epochs; got {count}"
        )
    return sorted(random.Random(seed).sample(common, count))


def _point_out_sorted(data: Any, parts: Sequence[range]) -> None:
    targets = getattr(data, "targets", None)
    if targets is None or len(parts) < 2:
        return
    classes = len(set(map(int, targets)))
    fewest = min(len({int(targets[k]) for k in part}) for part in parts)
    if fewest < classes / 2:
        print(
            f"moso_fast.compat: the data are stored class by class: one of the parts holds "
            f"{fewest} of {classes} classes (moso_fast.train_surrogates shuffles first)",
            file=sys.stderr,
        )
