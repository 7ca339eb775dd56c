"""The smallest flow that uses what matters on a cluster: a foreach, a retry, resources, artifacts."""

import importlib.util
import os

from metaflow import FlowSpec, current, resources, retry, step


class HelloFlow(FlowSpec):
    @step
    def start(self):
        self.words = ["hello", "world"]
        self.next(self.shout, foreach="words")

    @retry(times=1, minutes_between_retries=0)
    @resources(cpu=2, memory=5000, gpu=1)
    @step
    def shout(self):
        if current.retry_count == 0 and self.input == "world":
            raise RuntimeError("the first attempt fails")
        self.said = self.input.upper()
        print(f"{self.said} from {os.environ['METAFLOW_KUBERNETES_POD_NAME']} with {os.environ['GREETING']}")
        self.next(self.join)

    @step
    def join(self, inputs):
        self.said = [task.said for task in inputs]
        self.library = importlib.util.find_spec("matvlm")
        self.home, self.here = os.environ["HOME"], os.getcwd()
        self.next(self.end)

    @step
    def end(self):
        print("and".join(self.said))


if __name__ == "__main__":
    HelloFlow()
