"""Files for pytest-benchmark (``bench_*.py``), and scripts that measure one thing."""
