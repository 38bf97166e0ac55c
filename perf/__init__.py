"""Benchmarks of ringshm against other channels between processes: ``python -m perf --help``.

One file per question (``throughput``, ``in_place``, ``round_trip``, ``idle``, ``table``, ``pipeline``, ``counts``,
``memory``, ``vector_env``), one adapter per contender in ``perf.contenders``. Every contender passes a correctness
check before it is timed, contenders alternate within one run, and every run is kept.
"""
