"""Private texts: what the GuardedTuning designs cost and hide, on four question-answering tasks."""
