"""Training data: sources, preparation into an Arrow data set, and encoding into model inputs."""
