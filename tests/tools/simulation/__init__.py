"""A deterministic simulation of merges: one process, virtual time, one seed.

The driver, the worker and the store of S3 are the real ones. Simulated are the clock, the threads, the network, the
server and the processes.
"""
