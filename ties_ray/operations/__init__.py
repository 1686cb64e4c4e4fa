"""What a user asks for: merge, verify, inspect, status, promote, and manifests for Kubernetes."""
