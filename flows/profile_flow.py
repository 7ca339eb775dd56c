"""Measures speed and memory of checkpoints that exist, beside the recipe's teacher, without training.

    python flows/profile_flow.py run --checkpoints "models:/matvlm/3 runs/NAME/distill/aligned/model"

start -> profile -> end

A checkpoint is a folder, ``s3://...``, ``models:/NAME/VERSION``, ``models:/NAME@ALIAS``, ``package://NAME`` or a hub
id. The recipe's ``profile`` section says what is measured; ``--set "profile={protocol: paper}"``: what the paper did.
"""

from __future__ import annotations

from functools import partial

import evaluation
import run_files
import support
from cluster import Cluster
from metaflow import Config, FlowSpec, Parameter, card, step

import matvlm
from matvlm.artifacts import Checkpoint
from matvlm.config import Recipe

assert matvlm  # imported at the top of a flow file, so that Metaflow packages the library


@Cluster("profile")
class ProfileFlow(FlowSpec):
    DEFAULT_RECIPE = support.RECIPES / "easyvqa.yaml"
    recipe = Config("recipe", default=str(DEFAULT_RECIPE), parser=partial(support.parse, kind=Recipe))
    checkpoints = Parameter("checkpoints", required=True, help="one or more, with spaces between them")

    @step
    def start(self):
        from matvlm.models.locate import describe
        from matvlm.tracking import name_checkpoints

        recipe = self.settings()
        with support.clear_errors("start"):
            named = name_checkpoints(self.checkpoints.split())
            models = [Checkpoint(uri=recipe.teacher.uri, label="teacher"), *(describe(m.uri, m.label) for m in named)]
        self.models = [model.model_dump(mode="json") for model in models]
        self.run_key, self.folder = support.open_run(recipe, checkpoints=self.checkpoints)
        self.next(self.profile)

    @card(type="blank", id="profile", refresh_interval=1)
    @step
    def profile(self):
        models = map(Checkpoint.model_validate, self.models)
        title = f"Speed and memory of {self.checkpoints}"
        self.speed = evaluation.profile_models(self, self.settings(), models, title).model_dump(mode="json")
        self.next(self.end)

    @step
    def end(self):
        run_files.finish(self, self.settings())
        print((run_files.path(self, "report") / "profile.md").read_text())

    def settings(self) -> Recipe:
        return Recipe.model_validate(self.recipe.to_dict())


if __name__ == "__main__":
    support.main(ProfileFlow, Recipe)
