"""A Kubernetes API on loopback whose pods are processes of this machine, for what Metaflow asks of a cluster."""
