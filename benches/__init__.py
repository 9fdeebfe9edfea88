"""What measures moso_fast in its source tree; no part of the installed package.

``python -m benches --help`` at the root of the tree lists the commands. The folders: ``suites``
(files for pytest-benchmark, and scripts that measure one thing), ``peers`` (other libraries as
providers), ``gate`` (notices regressions without absolute times), ``charts`` (charts and pages of
results), ``gpu`` (what needs a GPU, and predictions for one) and ``results`` (what was measured).
Nothing of moso_fast imports from here.
"""
