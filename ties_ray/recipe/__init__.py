"""The recipe, its parser and its JSON schema."""
