"""What other libraries store and open: names of tensors, weight files, and the files that make a model load."""
