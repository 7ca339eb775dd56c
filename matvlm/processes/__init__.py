"""One command in several processes of this machine, or of several machines: started, watched, and ended together."""

from matvlm.processes.nodes import ONE_NODE, Nodes, ProcessError
from matvlm.processes.starting import end_with_launcher, explain, num_processes, run

__all__ = ["ONE_NODE", "Nodes", "ProcessError", "end_with_launcher", "explain", "num_processes", "run"]
