"""The papers' tables and figures, and ours: one command each, results as JSON in experiments/results/."""
