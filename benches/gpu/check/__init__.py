"""Tests and timings that need a GPU, such that no fault of one kernel costs another's result.

main.py plans; run.py runs stage after stage (stages.py). A stage is a list of units; a unit runs in
a process of its own (pool.py, worker.py), under a limit, and every line that it finds is on disk at
once (record.py, log.py). The process that runs them imports neither torch nor anything else that a
GPU could take along; what is run stands in work/, behind layer.py.
"""
