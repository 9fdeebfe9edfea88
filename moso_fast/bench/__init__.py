"""The benchmarks behind ``moso-fast bench``: cases, providers, measures, results.

A *case* is a scoring problem of one size; a *provider* is one way to compute it, ours or plain
PyTorch; a provider whose result is wrong gets no number. :mod:`.runner` measures one case,
:mod:`.session` several into one file, and :mod:`.store` keeps the results as JSON.

What only a source tree needs builds on this and stays out of the installed package, in the folder
``benches``: other libraries as providers, charts and pages, the comparison of two runs, the gate.
"""
