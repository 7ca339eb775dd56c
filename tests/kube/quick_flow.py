"""A step in a pod, and one beside whoever started the run."""

import os

from metaflow import FlowSpec, kubernetes, step


class QuickFlow(FlowSpec):
    @kubernetes
    @step
    def start(self):
        self.said = os.environ["GREETING"]
        print(f"{self.said}, says a pod")
        self.next(self.end)

    @step
    def end(self):
        print(f"the pod said {self.said}")


if __name__ == "__main__":
    QuickFlow()
