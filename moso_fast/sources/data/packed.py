"""Several documents in one row of tokens: where each of them lies, and each of them alone.

Collators that pack (``DataCollatorWithFlattening`` of transformers, packing in TRL) put documents
one after the other. Each is a sample of its own. They are told apart by offsets, by a number for
every token, or by positions that begin again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

OFFSETS = ("cu_seq_lens_q", "cu_seqlens_q", "cu_seqlens", "cu_seq_lens")
_TOKEN_KEYS = ("position_ids", "seq_idx")
PACKING_KEYS = (*OFFSETS, *_TOKEN_KEYS)
# What stands in a batch only to say where documents lie; a document alone has no use for it.
_ONLY_FOR_PACKING = (
    *OFFSETS,
    "cu_seq_lens_k",
    "cu_seqlens_k",
    "max_length_q",
    "max_length_k",
    "max_seqlen",
    "seq_idx",
)


def find_documents(
    entries: Mapping[str, Any],
    labels: Tensor,
    flattened: bool = False,
    ignore_index: int = -100,
) -> Tensor | None:
    """Return the document of each token, (B, T), or None where a row is one document.

    Parameters
    ----------
    entries
        The batch without its labels.
    labels
        (B, T) for tokens; anything else is not packed.
    flattened
        Whether the loader lays a whole batch into one row, which leaves nothing to pad.
    ignore_index
        The label of tokens that do not count.

    Returns
    -------
    Tensor or None
        int64, 0, 1, ... in order over all rows; -1 for padding.

    Raises
    ------
    ValueError
        Offsets that do not fit the tokens, or two descriptions that disagree.
    """
    if labels.dim() != 2 or labels.is_floating_point() or labels.shape[1] < 2:
        return None
    has_label = labels.cpu() != ignore_index
    found: dict[str, Tensor] = {}
    for name in OFFSETS:
        offsets = entries.get(name)
        if isinstance(offsets, Tensor) and offsets.dim() == 1 and not offsets.is_floating_point():
            found[name] = _by_offsets(name, offsets.long().cpu(), has_label)
    for name in _TOKEN_KEYS:
        values = entries.get(name)
        if not isinstance(values, Tensor) or values.is_floating_point():
            continue
        if values.dim() == 1:
            values = values[None]
        if values.dim() != 2 or values.shape[1] != labels.shape[1]:
            continue
        values = values.long().cpu().expand(labels.shape)
        if name == "seq_idx":
            found[name] = _numbered(values, values >= 0)
        else:
            mask = entries.get("attention_mask")
            by_position = _by_position(values, mask, has_label, flattened)
            if by_position is not None:
                found[name] = by_position
    if not found:
        return None
    (first, documents), *others = found.items()
    for name, other in others:
        if not torch.equal(documents, other):
            raise ValueError(f"data: {first} and {name} disagree where a document begins")
    if int(documents.max()) + 1 == len(labels) and bool((documents >= 0).any(1).all()):
        return None
    return documents


def _by_offsets(name: str, offsets: Tensor, has_label: Tensor) -> Tensor:
    tokens = has_label.numel()
    steps = offsets.diff()
    if not len(steps) or int(offsets[0]) != 0 or bool((steps <= 0).any()):
        raise ValueError(f"data: {name} must rise from 0, got {offsets.tolist()[:8]}")
    end = int(offsets[-1])
    if end > tokens or bool(has_label.flatten()[end:].any()):
        raise ValueError(f"data: {name} ends at {end}, but the batch has {tokens} tokens")
    documents = torch.full((tokens,), -1, device="cpu")
    documents[:end] = torch.arange(len(steps), device="cpu").repeat_interleave(steps)
    documents = documents.view(has_label.shape)
    return _numbered(documents, documents >= 0)


def _numbered(values: Tensor, used: Tensor) -> Tensor:
    """Count the runs of equal values, over all rows; -1 where not ``used``."""
    starts = torch.ones_like(used)
    starts[:, 1:] = (values[:, 1:] != values[:, :-1]) | ~used[:, :-1]
    numbers = (starts & used).flatten().cumsum(0).view(values.shape) - 1
    return torch.where(used, numbers, -1)


def _by_position(positions: Tensor, mask: Any, has_label: Tensor, flattened: bool) -> Tensor | None:
    """Documents whose positions count up from the same number; None for any other pattern.

    Padding has constant positions: single tokens without a label at the ends of a row. In a
    flattened batch those are documents too.
    """
    used = torch.ones_like(has_label)
    if isinstance(mask, Tensor) and mask.shape == has_label.shape:
        used = mask.cpu() != 0
    runs = torch.zeros_like(positions)
    breaks = (positions[:, 1:] != positions[:, :-1] + 1) | (used[:, 1:] != used[:, :-1])
    runs[:, 1:] = breaks.cumsum(1)
    if not flattened:
        single = torch.ones_like(used)
        single[:, 1:] &= breaks
        single[:, :-1] &= breaks
        skipped = ~used | (single & ~has_label)
        # At the ends of a row only: nothing but such tokens before it, or after it.
        used = ~(skipped.cumprod(1) | skipped.flip(1).cumprod(1).flip(1)).bool() & used
    documents = _numbered(runs, used)
    if int(documents.max()) + 1 <= int(used.any(1).sum()):
        return None
    flat = documents.flatten()
    inside = (flat >= 0).nonzero().squeeze(1)
    lengths = torch.bincount(flat[inside])
    starts = torch.full((len(lengths),), len(flat), device="cpu")
    starts = starts.scatter_reduce(0, flat[inside], inside, "amin")
    first = positions.flatten()[starts]
    if bool((first != first[0]).any()) or int(lengths.max()) == 1:
        return None
    return documents


def alone(kwargs: Mapping[str, Any], labels: Tensor, documents: Tensor, number: int) -> Any:
    """Keyword arguments and labels (1, T') of one document of a packed batch."""
    row, start = divmod(int((documents.flatten() == number).nonzero()[0]), documents.shape[1])
    stop = start + int((documents[row] == number).sum())

    def cut(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() < 2 or value.shape[1] != labels.shape[1]:
            return value
        return value[row if len(value) == len(labels) else 0, start:stop][None]

    chosen = {name: cut(v) for name, v in kwargs.items() if name not in _ONLY_FOR_PACKING}
    return chosen, labels[row, start:stop][None]


def mixes_documents(
    run: Callable[[dict[str, Any]], Any],
    kwargs: dict[str, Any],
    labels: Tensor,
    documents: Tensor,
) -> bool:
    """Tell whether a model reads a packed document otherwise than it would read it alone.

    Attention over the whole row, or positions counted through it, would make each score one of its
    neighbours too. The second document of a row is looked at: its logits must not change by a bit
    when the tokens of all others do, and must be those of the document alone up to rounding.

    Parameters
    ----------
    run
        Calls the model with keyword arguments, without gradients.
    kwargs, labels, documents
        A packed batch, see `find_documents`.
    """
    row = next(k for k, one in enumerate(documents) if len(one[one >= 0].unique()) > 1)
    inside = documents[row]
    number = int(inside[inside >= 0].min()) + 1
    at = inside == number
    changed = _with_other_neighbours(kwargs, labels, documents == number, row)
    if changed is None:
        return True
    logits, other = _logits(run(kwargs), labels), _logits(run(changed), labels)
    if logits is None or other is None:
        return True
    here = at.to(logits.device)
    own = logits[row][here]
    if not torch.equal(own, other[row][here]):
        return True
    single, single_labels = alone(kwargs, labels, documents, number)
    by_itself = _logits(run(single), single_labels)
    if by_itself is None:
        return True
    rounding = 0.03 if own.dtype in (torch.float16, torch.bfloat16) else 1e-4
    return bool((own - by_itself[0]).abs().max() > rounding * own.abs().max())


def _with_other_neighbours(
    kwargs: dict[str, Any], labels: Tensor, own: Tensor, row: int
) -> dict[str, Any] | None:
    """Exchange the tokens around a document; None where that cannot be done."""
    for name in ("input_ids", "inputs_embeds"):
        tokens = kwargs.get(name)
        if not isinstance(tokens, Tensor) or tokens.shape[:2] != labels.shape:
            continue
        # Within the range of the tokens that are there, hence within the vocabulary.
        other = tokens.min() + tokens.max() - tokens
        kept = own.to(tokens.device)
        differs = (other != tokens).reshape(*labels.shape, -1).any(2)
        if not bool((differs & ~kept)[row].any()):
            return None
        kept = kept.reshape(*labels.shape, *[1] * (tokens.dim() - 2))
        return {**kwargs, name: torch.where(kept, tokens, other)}
    return None


def _logits(outputs: Any, labels: Tensor) -> Tensor | None:
    found = outputs.get("logits") if isinstance(outputs, Mapping) else outputs
    if not isinstance(found, Tensor):
        found = getattr(outputs, "logits", None)
    if not isinstance(found, Tensor) or found.dim() != 3 or found.shape[:2] != labels.shape:
        return None
    return found
