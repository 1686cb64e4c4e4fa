"""What is asked for: the recipe, and its JSON Schema."""
