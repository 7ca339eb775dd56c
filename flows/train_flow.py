"""Turns a pre-trained VLM into a Mamba-2 hybrid, distils it, evaluates and profiles it beside its teacher.

    python flows/train_flow.py --config recipe flows/recipes/easyvqa.yaml run

start -> prepare_data -> teacher_targets (a task per shard) -> join_targets -> init_hybrid -> choose_nodes -> distill (a
task per initialisation) -> collect -> join_students -> list_models -> evaluate (a task per model) -> compare ->
profile -> register -> end

Over several nodes (``resources.nodes``), spread -> distill_on_nodes -> join_nodes takes the place of distill.

Steps are thin: each hands artifacts of ``matvlm.artifacts`` (as JSON) to one library call. Files live in the run's
folder.
"""

from __future__ import annotations

from functools import partial

import cards
import distillation
import evaluation
import run_files
import support
from cluster import Cluster
from metaflow import Config, FlowSpec, card, current, parallel, step

import matvlm
from matvlm.artifacts import Checkpoint, DataManifest, EvalResult, ProfileResult
from matvlm.config import Recipe
from matvlm.processes import ONE_NODE, Nodes
from matvlm.storage import join

assert matvlm  # imported at the top of a flow file, so that Metaflow packages the library

UNTRAINED = "student, untrained"


@Cluster("teacher_targets", "init_hybrid", "distill", "evaluate", "profile")
class TrainFlow(FlowSpec):
    DEFAULT_RECIPE = support.RECIPES / "easyvqa.yaml"
    recipe = Config("recipe", default=str(DEFAULT_RECIPE), parser=partial(support.parse, kind=Recipe))

    @step
    def start(self):
        self.run_key, self.folder = support.open_run(self.settings())
        self.teacher = Checkpoint(uri=self.settings().teacher.uri, label="teacher").model_dump(mode="json")
        self.next(self.prepare_data)

    @step
    def prepare_data(self):
        from matvlm.data.encoding import Encoder
        from matvlm.data.prepare import prepare
        from matvlm.models.hybrid import decoder_layers

        recipe = self.settings()
        with support.stage(self, recipe, "prepare_data") as reporter:
            model, processor = support.load_teacher(recipe)
            support.check_layers(recipe, len(decoder_layers(model)))
            encoder = Encoder(processor, recipe.data.max_length)
            data = prepare(recipe.data, recipe.seed, run_files.path(self, "data"), reporter, encoder)
        self.data = run_files.keep(self, data)
        self.shards = list(range(recipe.targets.shards))
        self.next(self.teacher_targets, foreach="shards")

    @step
    def teacher_targets(self):
        from matvlm.targets import TargetJob

        recipe, data = self.settings(), DataManifest.model_validate(self.data)
        with support.stage(self, recipe, f"teacher_targets[{self.input}]") as reporter:
            model, processor = support.load_teacher(recipe, support.device(self.index))
            job = TargetJob(recipe, model, processor, data, self.targets_uri())
            job.compute([self.input], reporter)
        self.identity = job.identity.model_dump(mode="json")
        self.next(self.join_targets)

    @step
    def join_targets(self, inputs):
        from matvlm.targets import Identity, join_shards

        self.merge_artifacts(inputs)
        recipe, identity = self.settings(), Identity.model_validate(self.identity)
        with support.stage(self, recipe, "join_targets") as reporter:
            store = join_shards(self.targets_uri(), recipe.targets.shards, identity, reporter)
        self.targets = store.model_dump(mode="json")
        self.next(self.init_hybrid)

    @step
    def init_hybrid(self):
        from matvlm.distill import init_student
        from matvlm.sensitivity import choose_by_sensitivity

        recipe, layers = self.settings(), None
        teacher, data = Checkpoint.model_validate(self.teacher), DataManifest.model_validate(self.data)
        with support.stage(self, recipe, "init_hybrid") as reporter:
            if recipe.hybrid.layers == "sensitivity":
                report = choose_by_sensitivity(
                    recipe, teacher, data, run_files.path(self, "sensitivity"), reporter, support.device()
                )
                layers = report.chosen
                print(report.table())
            students = [
                init_student(recipe, teacher, init, data, run_files.path(self, "init", init), layers, support.device())
                for init in recipe.hybrid.variants
            ]
            reporter.metrics({"replaced_layers": len(students[0].layers), "parameters": students[0].parameters})
        self.students = [run_files.keep(self, student) for student in students]
        self.next(self.choose_nodes, foreach="students")

    @step
    def choose_nodes(self):
        self.student = self.input
        self.nodes = self.settings().resources.nodes
        self.where = "one_node" if self.nodes == 1 else "several_nodes"
        self.next({"one_node": self.distill, "several_nodes": self.spread}, condition="where")

    @card(type="blank", id="distill", refresh_interval=1)
    @step
    def distill(self):
        self.trained = distillation.distill(self, self.settings(), ONE_NODE)
        self.next(self.collect)

    @step
    def spread(self):
        self.next(self.distill_on_nodes, num_parallel=self.nodes)

    @card(type="blank", id="distill", refresh_interval=1)
    @parallel
    @step
    def distill_on_nodes(self):
        place = current.parallel
        nodes = Nodes(place.node_index, place.num_nodes, place.main_ip, distillation.port(current.run_id, self.student))
        self.trained = distillation.distill(self, self.settings(), nodes)
        self.next(self.join_nodes)

    @step
    def join_nodes(self, inputs):
        self.merge_artifacts(inputs, exclude=["trained"])
        self.trained = next(task.trained for task in inputs if task.trained)
        self.next(self.collect)

    @step
    def collect(self):
        """Both ways lead here, as Argo Workflows want it."""
        self.next(self.join_students)

    @step
    def join_students(self, inputs):
        self.merge_artifacts(inputs, exclude=["trained", "student"])
        self.distilled = {task.trained["init"]: task.trained for task in inputs}
        self.next(self.list_models)

    @step
    def list_models(self):
        """Teacher and student first; beside them the student as it started, and the other initialisations."""
        untrained = {**self.students[0], "label": UNTRAINED}
        student, *others = [self.distilled[student["init"]] for student in self.students]
        compared = [{**other, "label": f"student, {other['init']} init"} for other in others]
        self.models = [self.teacher, student, untrained, *compared]
        self.next(self.evaluate, foreach="models")

    @card(type="blank", id="evaluate", refresh_interval=1)
    @step
    def evaluate(self):
        from matvlm.evaluate import evaluate

        recipe, model = self.settings(), Checkpoint.model_validate(self.input)
        beside = model.label not in ("teacher", "student")
        limit = recipe.evaluate.limit_comparisons if beside else recipe.evaluate.limit
        page = cards.EvaluateCard(f"Evaluating {recipe.name}: {model.label}")
        with support.stage(self, recipe, f"evaluate[{model.label}]", page) as reporter:
            out = run_files.path(self, "evaluation", support.file_name(model.label))
            result = evaluate(model, recipe.evaluate, limit, out, reporter, support.device())
            page.show(result)
        self.result = run_files.keep(self, result)
        self.next(self.compare)

    @card(type="blank", id="compare")
    @step
    def compare(self, inputs):
        from matvlm import report
        from matvlm.evaluate import compare, compare_samples, worst_regressions

        self.merge_artifacts(inputs, exclude=["result"])
        self.results = [task.result for task in inputs]
        recipe, results = self.settings(), [EvalResult.model_validate(result) for result in self.results]
        with support.stage(self, recipe, "compare") as reporter:
            task = report.common_task(recipe.evaluate.tasks, results)
            table = report.rows([Checkpoint.model_validate(m) for m in self.models], results, task)
            chosen = (results[0].samples_uri, results[1].samples_uri, recipe.evaluate.samples_shown, recipe.seed)
            samples, regressions = compare_samples(*chosen), worst_regressions(*chosen)
            scores = compare(results[0], results[1])
            report.write_accuracy(table, samples, run_files.path(self, "report"), reporter)
            report.write_comparison(scores, regressions, run_files.path(self, "report"), reporter)
            cards.show_comparison([row._asdict() for row in table], samples, scores, regressions)
        self.next(self.profile)

    @card(type="blank", id="profile", refresh_interval=1)
    @step
    def profile(self):
        models = map(Checkpoint.model_validate, self.models[:2])
        title = "Speed and memory, teacher and student side by side"
        self.speed = evaluation.profile_models(self, self.settings(), models, title).model_dump(mode="json")
        self.next(self.register)

    @step
    def register(self):
        from matvlm import report
        from matvlm.gate import judge

        recipe = self.settings()
        models = [Checkpoint.model_validate(model) for model in self.models]
        results = [EvalResult.model_validate(result) for result in self.results]
        table = report.rows(models, results, report.common_task(recipe.evaluate.tasks, results))
        self.headline = report.headline(table, ProfileResult.model_validate(self.speed))
        tags, verdict = {"layers": str(models[1].layers)}, judge(recipe, results[0], results[1])
        self.version = evaluation.register(self, recipe, models[1].uri, self.headline, tags, verdict)
        self.next(self.end)

    @step
    def end(self):
        recipe = self.settings()
        run_files.finish(self, recipe, self.headline)
        for name in ("accuracy.md", "profile.md"):
            print((run_files.path(self, "report") / name).read_text())
        print(f"Student: {self.models[1]['uri']}  ({recipe.tracking.model_name} version {self.version})")
        print(f"Reports: {self.folder}/report")
        print(f"Compare runs: mlflow ui    Cards: python {support.script()} card server")

    def settings(self) -> Recipe:
        return Recipe.model_validate(self.recipe.to_dict())

    def targets_uri(self) -> str:
        """Written and read where they are kept: tasks that share the work see each other's shards."""
        return join(self.folder, "targets")


if __name__ == "__main__":
    support.main(TrainFlow, Recipe, support.check_layers)
