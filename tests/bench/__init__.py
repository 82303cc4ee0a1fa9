"""How fast webhookd is, measured against what its users would take instead: see docs/benchmarks.md.

    make bench            everything, and docs/benchmarks.md written anew
    make bench-check      the same, and exit code 1 where a "must" is missed

    .venv-dev/bin/python -m tests.bench --quick                the comparison alone, short runs
    .venv-dev/bin/python -m tests.bench --only growth floor    some sections, at full length

Nothing here is a test, and no test asserts a time. tests/unit/project/test_bench.py tests the arithmetic.
"""
