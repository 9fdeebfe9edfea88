"""Small networks of every kind, and their MoSo statistics by batch-size-1 autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 5


class ConvNet(nn.Module):
    """Convolutions with stride, groups and dilation; batch, group and layer norms."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2, bias=False)
        self.gn = nn.GroupNorm(2, 8)
        self.fc = nn.Linear(8, CLASSES)
        nn.init.uniform_(self.bn.running_mean, -1, 1)
        nn.init.uniform_(self.bn.running_var, 0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv1(x)), inplace=True)
        return self.fc(F.relu(self.gn(self.conv2(x))).mean((2, 3)))


class ResNet(nn.Module):
    """A residual block with stride, groups and a projected shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn0 = nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=4, bias=False)
        self.bn1 = nn.BatchNorm2d(12)
        self.conv2 = nn.Conv2d(12, 12, 3, padding="same", bias=False)
        self.short = nn.Conv2d(8, 12, 1, stride=2, bias=False)
        self.fc = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn0(self.stem(x)))
        y = self.conv2(torch.relu(self.bn1(self.conv1(x))))
        return self.fc(torch.relu(y + self.short(x)).mean((2, 3)))


class Vit(nn.Module):
    """Class token, positions, layer scale, attention by scaled_dot_product_attention."""

    def __init__(self, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.patch = nn.Linear(12, width)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(0.1 * torch.randn(1, 5, width))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.scale = nn.Parameter(torch.full((width,), 0.7))
        self.mlp = nn.Sequential(nn.Linear(width, 16), nn.GELU(), nn.Linear(16, width))
        self.fc = nn.Linear(width, CLASSES)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x.flatten(1)[:, :48].unflatten(1, (4, 12)))
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        mixed = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
        x = x + self.scale * self.out(mixed.transpose(1, 2).flatten(2))
        return self.fc((x + self.mlp(self.norm2(x)))[:, 0])


class Encoder(nn.Module):
    """nn.TransformerEncoder, with the samples in the first or the second dimension."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(12, 2, 16, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.fc = nn.Linear(12, CLASSES)
        self.batch_first = batch_first

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)[:, :48].unflatten(1, (4, 12))
        if self.batch_first:
            return self.fc(self.encoder(x).mean(1))
        return self.fc(self.encoder(x.transpose(0, 1)).mean(0))


class Text(nn.Module):
    """Embeddings of tokens and positions, a recurrent network, and a head, tied or not."""

    def __init__(self, kind: type[nn.RNNBase], tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6, padding_idx=0)
        self.positions = nn.Embedding(7, 6)
        self.rnn = kind(6, 3, num_layers=2, bidirectional=True, batch_first=True)
        self.fc = nn.Linear(6, 11)
        if tied:
            self.fc.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x) + self.positions(torch.arange(x.shape[1], device=x.device))
        return self.fc(self.rnn(h)[0].mean(1))


class Shared(nn.Module):
    """One layer called three times, and a weight used forwards and backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(48, 6)
        self.again = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x.flatten(1)[:, :48]))
        for _ in range(3):
            h = h + torch.tanh(self.again(self.norm(h)))
        return self.fc(F.linear(h @ self.first.weight, self.first.weight))


class Odd(nn.Module):
    """What no rule knows: a bilinear layer, a scaled weight, a learned slope, a 1-d convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 4, 3, padding=1)
        self.slope = nn.PReLU(4)
        self.pair = nn.Bilinear(4, 4, 6)
        self.fc = nn.utils.parametrizations.weight_norm(nn.Linear(6, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        h = self.slope(self.conv(x.flatten(2)[:, :, :16])).mean(2)
        return self.fc(self.pair(h, h.flip(1)))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "cnn": ConvNet,
    "resnet": ResNet,
    "vit": Vit,
    "encoder": lambda: Encoder(True),
    "encoder, samples second": lambda: Encoder(False),
    "lstm": lambda: Text(nn.LSTM),
    "gru, tied": lambda: Text(nn.GRU, tied=True),
    "shared": Shared,
    "odd": Odd,
}


def build(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Return a model with fixed random weights, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(sum(map(ord, name)))
        return MODELS[name]().to(dtype).eval()


def data(name: str, count: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Return inputs and labels that go with a model of `MODELS`."""
    generator = torch.Generator().manual_seed(3)
    if name.startswith(("lstm", "gru")):
        return (
            torch.randint(11, (count, 7), generator=generator),
            torch.randint(11, (count,), generator=generator),
        )
    inputs = torch.randn(count, 3, 6, 6, dtype=dtype, generator=generator)
    return inputs, torch.randint(CLASSES, (count,), generator=generator)


def gradients(
    model: nn.Module,
    inputs: Any,
    labels: Tensor,
    loss: Callable[..., Tensor] = F.cross_entropy,
    copies: int = 1,
) -> Tensor:
    """Per-sample gradients of all parameters that require grad, (N, P), one sample at a time.

    ``copies=2`` keeps clear of a fault of torch 2.13: batch norm's gradient of a single image is
    wrong where the gradient that comes in is permuted.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for x, y in zip(inputs, labels, strict=True):
        outputs = model(torch.stack([x] * copies))[:1]
        value = loss(outputs, y[None]).sum()
        found = torch.autograd.grad(value, parameters, allow_unused=True)
        pairs = zip(found, parameters, strict=True)
        dense = [p * 0 if g is None else g.to_dense() for g, p in pairs]
        rows.append(torch.cat([g.flatten() for g in dense]))
    return torch.stack(rows).detach()


def scores(g: Tensor, formula: str) -> Tensor:
    """Scores of one checkpoint from explicit gradients (N, P), as the formulas are written."""
    n, mean = len(g), g.mean(0)
    a, q, g2 = g @ mean, g.square().sum(1), mean @ mean
    if formula == "moso":
        return torch.stack([((g.sum(0) - one) / (n - 1)) @ one for one in g])
    return {
        "one_step": ((n + 1) * a - n * g2 - q) / (n - 1) ** 2,
        "official": ((mean - g / n) * g).sum(1),
        "official_exact": ((2 * n - 3) * g2 - q + (2 * n - 4) * (a - q / n)) / (n - 1) ** 2,
        "alignment": a,
        "cosine": a / (q * g2).sqrt(),
    }[formula]
