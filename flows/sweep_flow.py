"""A study over recipe fields: distils, evaluates and compares every point of a sweep, each with its seeds.

    python flows/sweep_flow.py --config recipe flows/recipes/sweeps/debug.yaml run

start -> prepare_data -> teacher_targets (a task per store) -> join_targets -> list_points -> point (a task per point
and seed, and one for the teacher) -> join_points -> profile -> report -> end

``matvlm.sweep.settings`` says what the file of a sweep is. Points share data, and target stores where they ask the
teacher the same. A point that fails is named with its error and loses no other one; to try it again start a new run.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import distillation
import evaluation
import run_files
import support
from cluster import Cluster
from metaflow import Config, FlowSpec, card, catch, step

import matvlm
from matvlm.artifacts import Checkpoint, DataManifest, ProfileResult, TargetStore
from matvlm.recipes import RecipeError
from matvlm.storage import join
from matvlm.sweep import TEACHER, PointResult, Sweep, refuse_none, students_to_profile
from matvlm.tracking import flatten

assert matvlm  # imported at the top of a flow file, so that Metaflow packages the library


@Cluster("teacher_targets", "point", "profile")
class SweepFlow(FlowSpec):
    DEFAULT_RECIPE = support.RECIPES / "sweeps" / "debug.yaml"
    recipe = Config(
        "recipe", default=str(DEFAULT_RECIPE), parser=partial(support.parse, kind=Sweep, default=str(DEFAULT_RECIPE))
    )

    @step
    def start(self):
        self.run_key, self.folder = support.open_run(self.settings())
        uri = self.settings().recipe.teacher.uri
        self.teacher = Checkpoint(uri=uri, label=TEACHER).model_dump(mode="json")
        self.next(self.prepare_data)

    @step
    def prepare_data(self):
        from matvlm.data.encoding import Encoder
        from matvlm.data.prepare import prepare
        from matvlm.models.hybrid import decoder_layers
        from matvlm.sweep.running import shared_stores

        sweep, recipe = self.settings(), self.settings().recipe
        with support.stage(self, recipe, "prepare_data") as reporter:
            model, processor = support.load_teacher(recipe)
            self.num_layers = len(decoder_layers(model))
            check_points(sweep, self.num_layers)
            encoder = Encoder(processor, recipe.data.max_length)
            data = prepare(recipe.data, recipe.seed, run_files.path(self, "data"), reporter, encoder)
        self.data = run_files.keep(self, data)
        self.stores = shared_stores(sweep.trials)
        self.next(self.teacher_targets, foreach="stores")

    @step
    def teacher_targets(self):
        from matvlm.targets import TargetJob

        recipe, data = self.settings().trial(self.input[0]).recipe, DataManifest.model_validate(self.data)
        with support.stage(self, recipe, f"teacher_targets[{self.index}]") as reporter:
            model, processor = support.load_teacher(recipe, support.device(self.index))
            job = TargetJob(recipe, model, processor, data, join(self.folder, "targets", str(self.index)))
            job.compute(job.missing(), reporter)
            self.store = job.join(reporter).model_dump(mode="json")
        self.next(self.join_targets)

    @step
    def join_targets(self, inputs):
        self.merge_artifacts(inputs, exclude=["store"])
        self.targets = {key: task.store for task in inputs for key in task.input}
        self.next(self.list_points)

    @step
    def list_points(self):
        """The teacher is evaluated as one of them."""
        sweep = self.settings()
        self.keys = [TEACHER, *(trial.key for trial in sweep.trials)]
        self.profiled = sweep.first_of_each_size(self.num_layers)
        self.next(self.point, foreach="keys")

    @catch(var="failure", print_exception=False)
    @step
    def point(self):
        result = self.evaluate_teacher() if self.input == TEACHER else self.run_point()
        student = result.student and run_files.keep(self, result.student)
        self.result = result.model_dump(mode="json") | {"student": student}
        self.next(self.join_points)

    @step
    def join_points(self, inputs):
        self.merge_artifacts(inputs, exclude=["result", "failure", "_catch_exception"])
        results = [
            failed(task.input, self.settings(), task.failure) if task.failure else task.result for task in inputs
        ]
        self.results = [PointResult.model_validate(result).model_dump(mode="json") for result in results]
        with support.clear_errors("join_points"):
            refuse_none(self.evaluated()[1:])
        self.next(self.profile)

    @card(type="blank", id="profile", refresh_interval=1)
    @step
    def profile(self):
        models = [Checkpoint.model_validate(self.teacher), *students_to_profile(self.evaluated()[1:])]
        title = "Speed and memory, the teacher and a student of each size"
        self.speed = evaluation.profile_models(self, self.settings().recipe, models, title).model_dump(mode="json")
        self.next(self.report)

    @step
    def report(self):
        from matvlm.sweep.summary import headline, summarise, write_summary

        sweep, (teacher, *points) = self.settings(), self.evaluated()
        with support.stage(self, sweep.recipe, "report") as reporter:
            summary = summarise(sweep, teacher, points, ProfileResult.model_validate(self.speed))
            write_summary(summary, run_files.path(self, "report"), reporter)
        self.headline = headline(summary)
        self.next(self.end)

    @step
    def end(self):
        run_files.finish(self, self.settings(), self.headline)
        for name in ("profile.md", "summary.md"):
            print((run_files.path(self, "report") / name).read_text())
        print(f"Reports: {self.folder}/report\nCompare runs: mlflow ui")

    def settings(self) -> Sweep:
        return Sweep.model_validate(self.recipe.to_dict())

    def evaluated(self) -> list[PointResult]:
        """The teacher's, and those of the points."""
        return [PointResult.model_validate(result) for result in self.results]

    def evaluate_teacher(self) -> PointResult:
        from matvlm.sweep.running import evaluate_teacher

        recipe, folder = self.settings().recipe, run_files.path(self, "points", TEACHER)
        with support.stage(self, recipe, TEACHER) as reporter:
            teacher = Checkpoint.model_validate(self.teacher)
            return evaluate_teacher(recipe, teacher, folder, reporter, support.device(self.index))

    def run_point(self) -> PointResult:
        from matvlm.sweep.running import Shared, remove_models, run_point

        sweep, key = self.settings(), self.input
        trial, folder = sweep.trial(key), run_files.path(self, "points", key)
        trial = trial._replace(recipe=distillation.here(self, trial.recipe, "point"))
        params = flatten(trial.recipe.model_dump(mode="json"))
        with support.stage(self, trial.recipe, trial.label, params=params) as reporter:
            shared = Shared(
                Checkpoint.model_validate(self.teacher),
                DataManifest.model_validate(self.data),
                TargetStore.model_validate(self.targets[key]),
            )
            result = run_point(trial, shared, folder, reporter, support.device(self.index))
            return result if sweep.keep_models else remove_models(result, trial, folder, key in self.profiled)


def failed(key: str, sweep: Sweep, failure: Any) -> PointResult:
    """Of a point, or the teacher, whose task has left nothing but ``failure``."""
    reason = evaluation.reason_of(failure)
    print(f"{key} failed: {reason}\nTo try it again, start a new run: a resumed one takes it for done.")
    if key == TEACHER:
        return PointResult(name=TEACHER, error=reason)
    trial = sweep.trial(key)
    return PointResult(name=trial.name, seed=trial.seed, overrides=trial.overrides, error=reason)


def check_points(sweep: Sweep, num_layers: int | None = None) -> None:
    """``support.check_layers`` of every point."""
    for trial in sweep.trials:
        try:
            support.check_layers(trial.recipe, num_layers)
        except RecipeError as error:
            raise RecipeError(f"point {trial.name}: {error}") from None


if __name__ == "__main__":
    support.main(SweepFlow, Sweep, check_points)
