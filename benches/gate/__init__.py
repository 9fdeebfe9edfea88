"""Notices regressions by counts and by ratios inside one run, never by absolute times.

Three kinds of numbers: instructions of the C++ passes under valgrind's callgrind (exact, so that
a few per cent can be held; valgrind shows programs a processor with AVX2), PyTorch operations and
Python calls of one small scoring call, and the speed ratio to plain PyTorch. What a machine
cannot count (no valgrind, no C++ module, another compiler or torch) is skipped by name.
"""
