"""Everything about GPUs that is no test: predictions (model) and the check on a real one (check).

Run as ``python -m benches.gpu COMMAND`` at the root of the source tree; ``__main__.py`` lists the
commands.
"""
