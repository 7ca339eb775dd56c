"""A verdict of the promotion gate in the model registry: tags on the version, and who is candidate and champion.

``candidate`` is the version that passed last. ``champion`` is only ever moved, to a version that passed and whose mean
is above the present champion's on the same tasks and data; who is the first one to pass becomes the first champion. The
registry cannot compare and set at once: of two better ones judged in the same second the lesser one may become it.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from matvlm.gate import Verdict

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

CANDIDATE, CHAMPION = "candidate", "champion"
GATE = "gate"
"""``passed`` or ``refused``, as a tag of the version; what the decision rests on is under ``gate.``."""
_REASON_LENGTH = 5000
"""MLflow's limit for a tag."""


def promote(client: MlflowClient, name: str, version: str, verdict: Verdict, time_ms: int) -> list[str]:
    """Write ``verdict`` to ``version`` of the model ``name`` and give it the aliases that it deserves.

    A verdict replaces an earlier one. A refused version loses ``candidate`` if it had it.

    Returns:
        Its aliases of the two.
    """
    champion, words = None, ""
    aliases = {alias: str(number) for alias, number in client.get_registered_model(name).aliases.items()}
    if verdict.passed:
        holder = client.get_model_version(name, aliases[CHAMPION]) if CHAMPION in aliases else None
        champion, words = _rank(version, verdict, holder, name)
    tags = {
        GATE: "passed" if verdict.passed else "refused",
        f"{GATE}.reason": verdict.reason[:_REASON_LENGTH],
        f"{GATE}.recipe": verdict.recipe,
        f"{GATE}.measured": verdict.measured,
        f"{GATE}.time": datetime.fromtimestamp(time_ms / 1000, UTC).isoformat(timespec="seconds"),
        **{f"{GATE}.{name}": repr(value) for name, value in verdict.numbers.items()},
    }
    if words:
        tags[f"{GATE}.champion"] = words
    _replace_tags(client, name, version, tags)
    if verdict.passed:
        client.set_registered_model_alias(name, CANDIDATE, version)
    elif aliases.get(CANDIDATE) == version:
        client.delete_registered_model_alias(name, CANDIDATE)
    if champion:
        client.set_registered_model_alias(name, CHAMPION, version)
    held = {CANDIDATE: verdict.passed, CHAMPION: champion or aliases.get(CHAMPION) == version}
    return [alias for alias, holds in held.items() if holds]


def _rank(version: str, verdict: Verdict, holder: ModelVersion | None, name: str) -> tuple[bool, str]:
    """Whether ``version`` becomes champion in the place of ``holder``, and why."""
    if holder is None:
        return True, "the first to pass"
    if str(holder.version) == version:
        return False, "it is the champion already"
    theirs = holder.tags.get(f"{GATE}.mean")
    if theirs is None or holder.tags.get(f"{GATE}.measured") != verdict.measured or verdict.mean is None:
        return False, (
            f"version {holder.version} was not measured on the same tasks and data: evaluate models:/{name}@{CHAMPION} "
            "with this recipe, and then this version again"
        )
    above = verdict.mean > float(theirs)
    words = "above" if above else "not above"
    return above, f"its mean {verdict.mean:.2f} is {words} the {float(theirs):.2f} of version {holder.version}"


def _replace_tags(client: MlflowClient, name: str, version: str, tags: dict[str, str]) -> None:
    before = client.get_model_version(name, version).tags
    for tag in before:
        if tag.startswith(f"{GATE}.") and tag not in tags:
            client.delete_model_version_tag(name, version, tag)
    for tag, value in tags.items():
        client.set_model_version_tag(name, version, tag, value)
