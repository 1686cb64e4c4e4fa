"""The operations of the command line: merge, verify, inspect, status, promote, manifests for Kubernetes."""
