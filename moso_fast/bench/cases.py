"""The problems that are timed: what a user scores, from two classes to a vocabulary.

Sizes come in two profiles: ``full`` for the committed results, ``small`` for a look in under three
minutes on two cores. Cases named ``grads-*`` have few rows, so that methods which build every
per-sample gradient (N x C x D elements) and the libraries that do take part. The small profile
compiles in COMPILED_CASES alone: ``torch.compile`` takes five to ten seconds a case.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch

__all__ = ["CASES", "COMPILED_CASES", "PROFILES", "Case", "select_cases"]

PROFILES = ("small", "full")
COMPILED_CASES = ("c10-d512", "c100-d512", "c1000-d512")


@dataclass(frozen=True)
class Case:
    """One problem.

    Attributes
    ----------
    kind
        ``"head"`` (one linear head over features), ``"heads"`` (K heads over the same features),
        ``"sequences"`` (a token head, the tokens of one sequence are one sample) or ``"network"``
        (all parameters of a network).
    small, full
        Rows (tokens for sequences, samples for networks) in each profile.
    heavy
        Whether methods take part that build per-sample gradients or use one sample at a time.
    """

    name: str
    title: str
    kind: str
    classes: int
    dim: int
    small: int
    full: int
    heads: int = 1
    dtype: torch.dtype = torch.float32
    tokens: int = 0
    heavy: bool = False
    network: str = ""

    def rows(self, profile: str) -> int:
        """Rows in this profile; ValueError for an unknown one."""
        if profile not in PROFILES:
            raise ValueError(f"profile must be one of {', '.join(PROFILES)}; got {profile!r}")
        return self.small if profile == "small" else self.full

    @property
    def flops_a_row(self) -> int:
        """Multiplications and additions of the three products, of one row; 0 for networks."""
        return 0 if self.kind == "network" else 6 * self.heads * self.classes * self.dim

    @property
    def bytes_a_row(self) -> int:
        """Bytes of one row of features, which each of two passes reads; 0 for networks."""
        if self.kind == "network":
            return 0
        return self.dim * torch.empty((), dtype=self.dtype, device="cpu").element_size()


def _head(classes: int, dim: int, small: int, full: int, title: str) -> Case:
    return Case(f"c{classes}-d{dim}", title, "head", classes, dim, small, full)


def _bf16(classes: int, dim: int, small: int, full: int) -> Case:
    return Case(
        f"c{classes}-d{dim}-bf16",
        f"{classes} classes, bfloat16 features",
        "head",
        classes,
        dim,
        small,
        full,
        dtype=torch.bfloat16,
    )


def _grads(classes: int, dim: int, small: int, full: int) -> Case:
    title = f"{classes} classes, few enough rows for per-sample gradients"
    return Case(f"grads-c{classes}-d{dim}", title, "head", classes, dim, small, full, heavy=True)


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        _head(2, 768, 8192, 65536, "2 classes: a yes/no head on text embeddings"),
        _head(10, 512, 8192, 65536, "CIFAR-10 head of a ResNet-18"),
        _head(10, 2048, 4096, 16384, "10 classes on ResNet-50 features"),
        _head(32, 1024, 8192, 32768, "32 classes"),
        _head(100, 512, 4096, 32768, "CIFAR-100 head of a ResNet-18"),
        _head(100, 2048, 2048, 16384, "CIFAR-100 head of a ResNet-50"),
        _head(1000, 512, 2048, 8192, "ImageNet head of a ResNet-18"),
        _head(1000, 2048, 1024, 4096, "ImageNet head of a ResNet-50"),
        _bf16(10, 512, 8192, 65536),
        _bf16(100, 512, 4096, 32768),
        Case(
            "heads12-c10-d512",
            "12 checkpoints of a 10-class head over frozen features",
            "heads",
            10,
            512,
            4096,
            32768,
            heads=12,
        ),
        Case("vocab-50257", "one vocabulary head (GPT-2), tokens as samples", "head", 50257, 768,
             128, 512),
        Case("few-rows", "256 rows: what a call costs before it does anything", "head", 10, 512,
             256, 256),
        Case("few-rows-c10-d64", "150 rows: a part of a small data set", "head", 10, 64, 150, 150),
        Case("few-rows-c2-d768", "512 rows of 2 classes", "head", 2, 768, 512, 512),
        Case("few-rows-c100-d512", "1,024 rows of 100 classes", "head", 100, 512, 1024, 1024),
        Case("sequences-c8192", "token head, 64 tokens a sequence", "sequences", 8192, 256,
             512, 4096, tokens=64),
        _grads(2, 768, 1024, 4096),
        _grads(10, 512, 1024, 4096),
        _grads(100, 512, 256, 1024),
        _grads(100, 2048, 128, 512),
        _grads(1000, 512, 64, 256),
        Case("grads-sequences", "token head of 2048 words, 32 tokens a sequence", "sequences",
             2048, 128, 256, 1024, tokens=32, heavy=True),
        Case("network-mlp", "all parameters of a perceptron, 784-256-256-10", "network", 10, 784,
             128, 512, network="mlp"),
        Case("network-cnn", "all parameters of a small convolutional network", "network", 10, 784,
             64, 512, network="cnn"),
    )
}  # fmt: skip


def select_cases(patterns: list[str] | None = None) -> list[Case]:
    """Return the cases that match one of ``patterns`` (shell wildcards), in their order; None: all.

    Raises
    ------
    ValueError
        A pattern that matches nothing.
    """
    if not patterns:
        return list(CASES.values())
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in CASES):
            raise ValueError(f"no case matches {pattern!r}; known: {', '.join(CASES)}")
    return [c for c in CASES.values() if any(fnmatchcase(c.name, p) for p in patterns)]
