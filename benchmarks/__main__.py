"""`python -m benchmarks`: all of them."""

from benchmarks import equivalence, resilience, steps, wire_bytes

for benchmark in (equivalence, wire_bytes, resilience, steps):
    print(f"== {benchmark.__name__}: {benchmark.__doc__}", flush=True)
    benchmark.main()
