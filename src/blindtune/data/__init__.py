"""Training data: tables of labelled texts, questions, public text, and their division into batches."""

from blindtune.data.batches import BatchPlan
from blindtune.data.tables import Columns, Examples, load_examples, split_examples

__all__ = ["BatchPlan", "Columns", "Examples", "load_examples", "split_examples"]
