"""The benchmark suite behind ``moso-fast bench``: cases, providers, measures, charts, gate.

A *case* is a scoring problem of one size; a *provider* is one way to compute it, ours or an
opponent's; a provider whose result is wrong gets no number. :mod:`.runner` measures,
:mod:`.store` keeps the results as JSON, :mod:`.compare` sets two runs side by side, :mod:`.gate`
notices regressions without absolute times.
"""
