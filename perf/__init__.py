"""Benchmarks of ringshm against other channels between processes: ``python -m perf --help``.

One file per question (``perf/README.md`` lists them), one adapter per contender in ``perf.contenders`` and
``perf.vector_envs``, and in ``targets`` the ratios that are asked for. Every contender passes a correctness check
before it is timed, contenders alternate within one run, and every run is kept.
"""
