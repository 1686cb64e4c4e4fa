"""Reports of a merge: progress, the records of plan and result, the model card."""
