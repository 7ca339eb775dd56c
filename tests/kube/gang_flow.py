"""A step in one pod or, if there are several nodes, a gang of pods that find each other and agree on a sum.

Metaflow takes no gang of one on Kubernetes: hence the two ways.
"""

import subprocess
import sys

from metaflow import FlowSpec, Parameter, current, parallel, resources, retry, step

SUM = """
import torch.distributed as dist, torch
dist.init_process_group("gloo")
mine = torch.tensor([10.0 ** dist.get_rank()])
dist.all_reduce(mine)
print(f"rank {dist.get_rank()} of {dist.get_world_size()}: {mine.item():g}")
dist.destroy_process_group()  # else a thread of gloo's may abort an interpreter that ends
"""


class GangFlow(FlowSpec):
    nodes = Parameter("nodes", type=int, default=1)

    @step
    def start(self):
        self.how = "gang" if self.nodes > 1 else "alone"
        self.next({"gang": self.spread, "alone": self.alone}, condition="how")

    @step
    def spread(self):
        self.next(self.together, num_parallel=self.nodes)

    @step
    def alone(self):
        self.places, self.printed = [], []
        self.next(self.end)

    @retry(times=1, minutes_between_retries=0)
    @resources(gpu=2, shared_memory=1024)
    @parallel
    @step
    def together(self):
        place = current.parallel
        if current.retry_count == 0 and place.node_index == 1:
            raise RuntimeError("the first attempt of one node fails")
        command = [sys.executable, "-m", "torch.distributed.run", "--no-python"]
        command += [f"--nnodes={place.num_nodes}", f"--node-rank={place.node_index}", "--nproc-per-node=1"]
        command += [f"--master-addr={place.main_ip}", "--master-port=29517", sys.executable, "-c", SUM]
        self.printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
        self.place = {"index": place.node_index, "nodes": place.num_nodes, "address": place.main_ip}
        self.next(self.join)

    @step
    def join(self, inputs):
        self.places = [task.place for task in inputs]
        self.printed = [task.printed for task in inputs]
        self.next(self.end)

    @step
    def end(self):
        print(self.places, self.printed)


if __name__ == "__main__":
    GangFlow()
