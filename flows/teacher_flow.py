"""Trains a teacher on easy-VQA and measures it on the package's test split.

    python flows/teacher_flow.py run
    python flows/teacher_flow.py --config recipe flows/recipes/teacher-smollm2.yaml run

start -> prepare_data -> train -> evaluate -> end. The product is a model folder with its card; ``end`` prints where.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import run_files
import support
from cluster import Cluster
from metaflow import Config, FlowSpec, step

import matvlm
from matvlm.artifacts import Checkpoint, DataManifest
from matvlm.data.prepare import prepare
from matvlm.pretrain import PretrainRecipe, pretrain, publish, write_card

assert matvlm  # imported at the top of a flow file, so that Metaflow packages the library


@Cluster("train", "evaluate")
class TeacherFlow(FlowSpec):
    DEFAULT_RECIPE = support.RECIPES / "teacher-easyvqa.yaml"
    recipe = Config("recipe", default=str(DEFAULT_RECIPE), parser=partial(support.parse, kind=PretrainRecipe))

    @step
    def start(self):
        self.run_key, self.folder = support.open_run(self.settings())
        self.next(self.prepare_data)

    @step
    def prepare_data(self):
        recipe = self.settings()
        with support.stage(self, recipe, "prepare_data") as reporter:
            data = prepare(recipe.data, recipe.seed, run_files.path(self, "data"), reporter)
        self.data = run_files.keep(self, data)
        self.next(self.train)

    @step
    def train(self):
        recipe = self.settings()
        with support.stage(self, recipe, "train") as reporter:
            data = DataManifest.model_validate(self.data)
            teacher = pretrain(recipe, data, run_files.path(self, "teacher"), reporter, support.device())
        self.teacher = run_files.keep(self, teacher)
        self.next(self.evaluate)

    @step
    def evaluate(self):
        from matvlm.evaluate import evaluate

        recipe = self.settings()
        teacher, out = Checkpoint.model_validate(self.teacher), run_files.path(self, "evaluation")
        with support.stage(self, recipe, "evaluate") as reporter:
            result = evaluate(teacher, recipe.evaluate, recipe.evaluate.limit, out, reporter, support.device())
            folder = run_files.path(self, "teacher") / Path(teacher.uri).name
            write_card(folder, recipe, teacher, result)
            self.published = publish(recipe, folder)
        self.result = run_files.keep(self, result)
        self.next(self.end)

    @step
    def end(self):
        run_files.finish(self, self.settings(), self.result["metrics"])
        print(f"Teacher: {self.published or self.teacher['uri']}\nScores: {self.result['metrics']}")

    def settings(self) -> PretrainRecipe:
        return PretrainRecipe.model_validate(self.recipe.to_dict())


if __name__ == "__main__":
    support.main(TeacherFlow, PretrainRecipe)
