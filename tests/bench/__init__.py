"""The speed of webhookd, compared with what its users would write instead: see docs/benchmarks.md.

    make bench            everything; writes docs/benchmarks.md
    make bench-check      everything; exit code 1 if a "must" is missed

    .venv-dev/bin/python -m tests.bench --quick                only the comparison, with short runs
    .venv-dev/bin/python -m tests.bench --only growth floor    some sections, at full length

Nothing here is a test, and no test asserts a time. tests/unit/project/test_bench.py tests the arithmetic.
"""
