"""What will be done: the plan of a merge, and the time that it takes."""
