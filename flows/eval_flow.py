"""Evaluates and profiles a checkpoint that exists, without training, into MLflow beside the runs that made it.

    python flows/eval_flow.py run --checkpoint models:/matvlm@candidate

A checkpoint is a folder, ``s3://...``, ``models:/NAME/VERSION``, ``models:/NAME@ALIAS``, ``package://NAME`` or a hub
id. The recipe gives tasks, limits and contexts; the model it names as teacher is the baseline of the speed ratios.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import cards
import support
from metaflow import Config, FlowSpec, Parameter, card, resources, step

import matvlm
from matvlm.artifacts import Checkpoint
from matvlm.config import Recipe

assert matvlm  # imported at the top of a flow file, so that Metaflow packages the library


class EvalFlow(FlowSpec):
    DEFAULT_RECIPE = support.RECIPES / "easyvqa.yaml"
    recipe = Config("recipe", default=str(DEFAULT_RECIPE), parser=partial(support.parse, kind=Recipe))
    checkpoint = Parameter("checkpoint", required=True, help="folder, s3://, models:/NAME/3, models:/NAME@ALIAS, ...")

    @step
    def start(self):
        from matvlm.models.locate import describe
        from matvlm.tracking import resolve_checkpoint

        with support.clear_errors("start"):
            uri = resolve_checkpoint(self.checkpoint)
            self.model = describe(uri, label="student").model_dump(mode="json")
        self.run_key, self.folder = support.open_run(self.settings(), checkpoint=self.checkpoint, checkpoint_uri=uri)
        self.next(self.evaluate)

    @card(type="blank", id="evaluate", refresh_interval=1)
    @resources(gpu=recipe.resources.gpu, cpu=recipe.resources.cpu, memory=recipe.resources.memory_mb)
    @step
    def evaluate(self):
        from matvlm.evaluate import evaluate

        recipe, model = self.settings(), Checkpoint.model_validate(self.model)
        page = cards.EvaluateCard(f"Evaluating {self.checkpoint}")
        with support.stage(self, recipe, "evaluate", page) as reporter:
            out = Path(self.folder) / "evaluation"
            result = evaluate(model, recipe.evaluate, recipe.evaluate.limit, out, reporter, support.device())
            page.show(result)
        self.result = result.model_dump(mode="json")
        self.next(self.profile)

    @card(type="blank", id="profile", refresh_interval=1)
    @resources(gpu=recipe.resources.gpu, cpu=recipe.resources.cpu, memory=recipe.resources.memory_mb)
    @step
    def profile(self):
        from matvlm import report
        from matvlm.profiling import profile

        recipe = self.settings()
        page = cards.ProfileCard(f"Speed and memory of {self.checkpoint}")
        models = [Checkpoint(uri=recipe.teacher.uri, label="teacher"), Checkpoint.model_validate(self.model)]
        with support.stage(self, recipe, "profile", page) as reporter:
            result = profile(models, recipe.profile, reporter, support.device())
            self.speed = result.model_dump(mode="json")
            report.write_profile(result, Path(self.folder) / "report", reporter)
            page.show(result)
        self.next(self.end)

    @step
    def end(self):
        tracker = support.tracker_of(self, self.settings())
        tracker.summary(self.result["metrics"])
        tracker.finish("FINISHED")
        scores = "\n".join(f"{name}: {value:.4f}" for name, value in sorted(self.result["metrics"].items()))
        print(f"{self.model['uri']}, {self.result['num_questions']:,} questions\n{scores}\n")
        print((Path(self.folder) / "report" / "profile.md").read_text())

    def settings(self) -> Recipe:
        return Recipe.model_validate(self.recipe.to_dict())


if __name__ == "__main__":
    support.main(EvalFlow, Recipe)
