"""Evaluates and profiles a checkpoint that exists, without training, and decides what it may be called.

    python flows/eval_flow.py run --checkpoint models:/matvlm/3

start -> evaluate (a task per benchmark and model) -> compare -> profile -> gate -> end

A checkpoint is a folder, ``s3://...``, ``models:/NAME/VERSION``, ``models:/NAME@ALIAS``, ``package://NAME`` or a hub
id. The recipe gives tasks, limits, contexts and what promotion asks for; the model it names as teacher is the measure,
and is evaluated once for all checkpoints. A registered version gets the verdict of the gate as tags and aliases.
A benchmark that fails refuses promotion and loses no other one; run the flow again, and only it is evaluated anew.
On a cluster, ``argo-workflows create`` makes this flow run for every checkpoint that is registered.
"""

from __future__ import annotations

from functools import partial

import cards
import evaluation
import run_files
import support
from cluster import Cluster
from metaflow import Config, FlowSpec, Parameter, card, catch, step, trigger

import matvlm
from matvlm.artifacts import Checkpoint, EvalResult
from matvlm.config import Recipe
from matvlm.storage import write_json

assert matvlm  # imported at the top of a flow file, so that Metaflow packages the library


@Cluster("evaluate", "profile")
@trigger(event={"name": evaluation.EVENT, "parameters": {"checkpoint": "checkpoint"}})
class EvalFlow(FlowSpec):
    DEFAULT_RECIPE = support.RECIPES / "easyvqa.yaml"
    recipe = Config("recipe", default=str(DEFAULT_RECIPE), parser=partial(support.parse, kind=Recipe))
    checkpoint = Parameter("checkpoint", required=True, help="folder, s3://, models:/NAME/3, models:/NAME@ALIAS, ...")

    @step
    def start(self):
        from matvlm.models.locate import describe
        from matvlm.tracking.registry import SCHEME, find_version

        recipe = self.settings()
        with support.clear_errors("start"):
            found = find_version(self.checkpoint) if self.checkpoint.startswith(SCHEME) else None
            self.version = found and found._asdict()
            uri = found.checkpoint_uri if found else self.checkpoint
            models = [Checkpoint(uri=recipe.teacher.uri, label="teacher"), describe(uri, label="student")]
        self.models = {model.label: model.model_dump(mode="json") for model in models}
        self.run_key, self.folder = support.open_run(recipe, checkpoint=self.checkpoint, checkpoint_uri=uri)
        self.parts = [[label, task] for task in recipe.evaluate.tasks for label in self.models]
        self.next(self.evaluate, foreach="parts")

    @catch(var="failure", print_exception=False)
    @card(type="blank", id="evaluate", refresh_interval=1)
    @step
    def evaluate(self):
        recipe, (label, task) = self.settings(), self.input
        model = Checkpoint.model_validate(self.models[label])
        page = cards.EvaluateCard(f"{task}, {label}: {model.uri}")
        with support.stage(self, recipe, f"evaluate[{label}, {task}]", page) as reporter:
            result = evaluation.evaluate_task(self, model, recipe, task, reporter, support.device(self.index))
            page.show(result)
        self.result = run_files.keep(self, result)
        self.next(self.compare)

    @card(type="blank", id="compare")
    @step
    def compare(self, inputs):
        from matvlm import report
        from matvlm.evaluate import compare, worst_regressions

        self.merge_artifacts(inputs, exclude=["result", "failure", "_catch_exception"])
        recipe = self.settings()
        with support.stage(self, recipe, "compare") as reporter:
            teacher, student = evaluation.join_tasks(self.models, inputs, run_files.path(self, "evaluation"))
            scores, shown = compare(teacher, student), recipe.evaluate.samples_shown
            regressions = worst_regressions(teacher.samples_uri, student.samples_uri, shown, recipe.seed)
            report.write_comparison(scores, regressions, run_files.path(self, "report"), reporter)
            cards.show_comparison([], [], scores, regressions)
        self.results = [run_files.keep(self, result) for result in (teacher, student)]
        self.next(self.profile)

    @card(type="blank", id="profile", refresh_interval=1)
    @step
    def profile(self):
        models = map(Checkpoint.model_validate, self.models.values())
        title = f"Speed and memory of {self.checkpoint}"
        self.speed = evaluation.profile_models(self, self.settings(), models, title).model_dump(mode="json")
        self.next(self.gate)

    @step
    def gate(self):
        from matvlm.gate import judge

        recipe = self.settings()
        with support.stage(self, recipe, "gate") as reporter:
            teacher, student = self.evaluated()
            verdict = judge(recipe, teacher, student)
            reporter.metrics(verdict.numbers)
            place = run_files.path(self, "report") / "verdict.json"
            write_json(place, verdict.model_dump(mode="json"))
            reporter.artifact(place, "report")
        aliases = None
        if version := self.version:
            with run_files.tracking(self, recipe) as tracker:
                aliases = tracker.promote(version["name"], version["checkpoint_uri"], verdict, version["number"])
        evaluation.print_verdict(verdict, aliases)
        self.next(self.end)

    @step
    def end(self):
        _, student = self.evaluated()
        run_files.finish(self, self.settings(), student.metrics)
        scores = "\n".join(f"{name}: {value:.4f}" for name, value in sorted(student.metrics.items()))
        print(f"{student.checkpoint_uri}, {student.num_questions:,} questions\n{scores}\n")
        for name in ("scores.md", "profile.md"):
            print((run_files.path(self, "report") / name).read_text())

    def evaluated(self) -> list[EvalResult]:
        """Of teacher and student."""
        return [EvalResult.model_validate(result) for result in self.results]

    def settings(self) -> Recipe:
        return Recipe.model_validate(self.recipe.to_dict())


if __name__ == "__main__":
    support.main(EvalFlow, Recipe)
