"""Label privacy on real tasks: every method, its accuracy, and what the strongest attacks read from its transcripts."""
