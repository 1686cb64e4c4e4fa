"""The inputs of a merge: the folders of base and models, their contents by headers alone, and their agreement."""
