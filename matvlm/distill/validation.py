"""The student held against its teacher on samples that it is not trained on, while it learns."""

from __future__ import annotations

from matvlm.distill.feed import Share
from matvlm.distill.run import Run
from matvlm.reporting import Reporter


class Validation:
    """Validates ``run`` on ``held_out``, or not at all; what is found is added to ``history`` and reported."""

    def __init__(self, run: Run, held_out: Share | None, history: list[dict[str, float]], reporter: Reporter):
        self.run, self.held_out, self.history, self.reporter = run, held_out, history, reporter

    def at(self, update: int, total: int) -> None:
        """After ``update`` of the ``total``, if it is the time; all processes have to call it."""
        if self.held_out and (update == total or update % self.run.recipe.distill.validation.every_updates == 0):
            found = self.run.validate(update, self.held_out)
            self.history.append({"update": update, **found})
            self.reporter.metrics(found, update)
