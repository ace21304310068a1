"""Speed, memory and bytes on the wire: ratios measured in one run, written to benchmarks/results/."""
