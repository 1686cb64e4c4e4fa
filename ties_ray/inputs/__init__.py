"""What exists: the folders of base and models, looked at without reading weights, and what they agree on."""
