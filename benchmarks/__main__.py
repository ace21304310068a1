"""`python -m benchmarks`: all of them."""

from benchmarks import equivalence, inversion, resilience, steps, wire_bytes

for benchmark in (equivalence, wire_bytes, resilience, steps, inversion):
    print(f"== {benchmark.__name__}: {benchmark.__doc__}", flush=True)
    benchmark.main()
