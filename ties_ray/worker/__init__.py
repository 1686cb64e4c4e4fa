"""The side that does the work: reads slices ahead, merges blocks, writes parts behind."""
