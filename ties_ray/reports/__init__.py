"""What is told about a merge: the result record, and the model card."""
