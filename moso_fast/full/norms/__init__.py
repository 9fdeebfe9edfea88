"""Exact squared norms of per-sample gradients, layer by layer, from one batched backward pass.

`trace.Trace` watches the calls of a forward pass; a call that uses a parameter is replaced by an
autograd function that computes the same output and input gradient, and whose backward also adds
each sample's |dl/dp|^2 to a `tape.Tape`. One family of layers a file.
"""

from __future__ import annotations
