"""Benchmarks of ringshm against other channels between processes: ``python -m perf --help``.

One file per question (``throughput``, ``one_process``, ``in_place``, ``round_trip``, ``idle``, ``table``, ``pipeline``,
``counts``, ``memory``, ``vector_env``, ``top``), one adapter per contender in ``perf.contenders``, and in ``targets``
the ratios that are asked for. Every contender passes a correctness check before it is timed, contenders alternate
within one run, and every run is kept.
"""
