"""How work is cut: weight files, parts, shards, blocks, and the byte ranges that a block reads."""
