"""The kinds of rounds: each goes over the models once, shard by shard."""
