"""Recipes: every shipped one parses and says what it should; bad input is one error with file and field."""

import ast
from pathlib import Path
from typing import get_args

import pytest
import yaml

from matvlm.config import Recipe, StepName
from matvlm.recipes import RecipeError, load_recipe, parse_recipe, split_overrides

RECIPES = Path(__file__).parents[1] / "flows" / "recipes"
TEACHERS = sorted(RECIPES.glob("teacher-*.yaml"))
SHIPPED = sorted(set(RECIPES.glob("*.yaml")) - set(TEACHERS))
MINIMAL = "name: small\n"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipe_parses_and_is_named_after_its_file(path):
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert recipe.description


@pytest.mark.parametrize("path", TEACHERS, ids=lambda path: path.stem)
def test_shipped_teacher_recipe_parses(path):
    from matvlm.pretrain import PretrainRecipe

    assert parse_recipe(path.read_text(), str(path), kind=PretrainRecipe).name == path.stem


def test_the_promised_recipes_ship():
    promised = {"easyvqa", "debug", "matvlm-phi2-0125", "matvlm-phi2-025", "matvlm-phi2-050"}
    assert promised <= {path.stem for path in SHIPPED}


@pytest.mark.parametrize(("name", "ratio"), [("0125", 0.125), ("025", 0.25), ("050", 0.5)])
def test_paper_recipes_hold_the_published_settings(name, ratio):
    recipe = load_recipe(RECIPES / f"matvlm-phi2-{name}.yaml")
    distill, optimizer = recipe.distill, recipe.distill.optimizer
    assert (recipe.hybrid.ratio, recipe.hybrid.layers, recipe.hybrid.init) == (ratio, "paper", "paper")
    assert (optimizer.lr, optimizer.betas, optimizer.weight_decay) == (2e-4, (0.9, 0.95), 0.01)
    assert (optimizer.clip_grad_norm, distill.batch_size, distill.epochs) == (0.1, 64, 1)
    assert (distill.schedule.warmup_updates, distill.schedule.decay_updates) == (1000, 1000)
    assert (distill.loss.prob, distill.loss.layer, distill.loss.ce, distill.loss.temperature) == (1, 1, 0, 1)
    assert (distill.loss.layer_inputs, distill.align.updates, distill.loss.ramps) == ("teacher_forced", 0, {})
    assert (recipe.data.max_length, distill.deepspeed.zero_stage, recipe.resources.gpu) == (1428, 2, 4)


def test_paper_recipes_differ_only_in_the_ratio():
    recipes = [load_recipe(path).model_dump() for path in RECIPES.glob("matvlm-phi2-*.yaml")]
    assert len(recipes) == 3
    for recipe in recipes:
        del recipe["name"], recipe["description"], recipe["hybrid"]["ratio"]
    assert recipes[0] == recipes[1] == recipes[2]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_recipe_survives_json(path):
    recipe = load_recipe(path)
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    assert parse_recipe(yaml.safe_dump(recipe.model_dump(mode="json"))) == recipe


BAD = {
    "unknown section": ("distil: {}", "distil", "unknown key"),
    "unknown key": ("distill: {batchsize: 8}", "distill.batchsize", "unknown key"),
    "unknown nested key": ("distill: {optimizer: {momentum: 0.9}}", "distill.optimizer.momentum", "unknown key"),
    "wrong type": ("distill: {batch_size: many}", "distill.batch_size", "got 'many'"),
    "fraction for a count": ("distill: {epochs: 1.5}", "distill.epochs", "got 1.5"),
    "negative weight": ("distill: {loss: {prob: -1}}", "distill.loss.prob", "got -1"),
    "all layers": ("hybrid: {ratio: 1.0}", "hybrid.ratio", "less than 1"),
    "no layers": ("hybrid: {ratio: 0}", "hybrid.ratio", "greater than 0"),
    "negative layer": ("hybrid: {layers: [0, -1]}", "hybrid.layers.1", "got -1"),
    "unknown rule": ("hybrid: {layers: evenly}", "hybrid.layers", "got 'evenly'"),
    "rule of another type": ("hybrid: {layers: 3}", "hybrid.layers", "got 3"),
    "empty list of layers": ("hybrid: {layers: []}", "hybrid.layers", "got []"),
    "unknown init": ("hybrid: {init: identity}", "hybrid.init", "got 'identity'"),
    "compare with itself": ("hybrid: {init: paper, compare_inits: [paper]}", "hybrid", "compare_inits"),
    "lost comparisons": (
        "distill: {activation_checkpointing: layers, loss: {layer_inputs: student_forced}}",
        "distill",
        "use activation_checkpointing 'mixers'",
    ),
    "uneven batches": ("distill: {batch_size: 10, micro_batch_size: 4}", "distill", "multiple of micro_batch_size 4"),
    "nothing learnt": ("distill: {loss: {prob: 0, layer: 0, ce: 0}}", "distill.loss", "above 0"),
    "cosine that also decays": (
        "distill: {schedule: {shape: cosine, decay_updates: 5}}",
        "distill.schedule",
        "remove decay_updates, or use shape 'wsd'",
    ),
    "fewer than no skips": ("distill: {max_skipped_updates: -1}", "distill.max_skipped_updates", "got -1"),
    "llava without path": ("data: {source: llava}", "data", "needs path"),
    "easyvqa with path": ("data: {path: a.json}", "data", "remove path"),
    "other answers phrased": ("data: {source: llava, path: a.json, answers: both}", "data", "remove answers"),
    "unknown answers": ("data: {answers: words and sentences}", "data.answers", "got 'words and sentences'"),
    "half precision alone": ("teacher: {dtype: bfloat16}", "recipe", "bfloat16 needs distill.autocast: bfloat16"),
    "other lengths than the protocol's": (
        "profile: {protocol: paper, prompts: [1]}",
        "profile",
        "protocol paper sets prompts to [769]: leave prompts out",
    ),
    "unknown protocol": ("profile: {protocol: papers}", "profile.protocol", "got 'papers'"),
    "unknown stack": ("profile: {stacks: [vllm]}", "profile.stacks.0", "got 'vllm'"),
    "the same twice": ("profile: {prompts: [64, 8, 64]}", "profile.prompts", "every value once, got [64, 8, 64]"),
    "nothing to decode": ("profile: {new_tokens: [1]}", "profile.new_tokens.0", "got 1"),
    "no prompt": ("profile: {prompts: []}", "profile.prompts", "got []"),
    "model name": ("tracking: {model_name: a/b}", "tracking.model_name", "got 'a/b'"),
    "section is a list": ("distill: [1]", "distill", "got [1]"),
}


@pytest.mark.parametrize(("text", "field", "message"), BAD.values(), ids=BAD.keys())
def test_bad_field_is_one_line_with_file_field_and_reason(text, field, message):
    with pytest.raises(RecipeError) as caught:
        parse_recipe(MINIMAL + text, source="bad.yaml")
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"bad.yaml: {field}: ")
    assert message in line


def test_every_wrong_field_is_named_at_once():
    with pytest.raises(RecipeError) as caught:
        parse_recipe("seed: -1\ndistill: {epochs: none}", source="bad.yaml")
    fields = {line.split(": ")[1] for line in str(caught.value).splitlines()}
    assert fields == {"name", "seed", "distill.epochs"}


@pytest.mark.parametrize("text", ["", "- a\n- b", "just words", "name: [unclosed"])
def test_text_that_is_no_recipe(text):
    with pytest.raises(RecipeError, match=r"^bad\.yaml: "):
        parse_recipe(text, source="bad.yaml")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"nowhere\.yaml: cannot read"):
        load_recipe(tmp_path / "nowhere.yaml")


def test_overrides_reach_nested_and_absent_sections():
    overrides = ["distill.optimizer.lr=1e-4", "hybrid.layers=[0, 3]", "data.max_samples=null", "evaluate.limit=7"]
    recipe = parse_recipe(MINIMAL + "data: {max_samples: 5}", overrides=overrides)
    assert recipe.distill.optimizer.lr == 1e-4
    assert recipe.hybrid.layers == [0, 3]
    assert recipe.data.max_samples is None
    assert recipe.evaluate.limit == 7


def test_overrides_in_one_text_are_split_where_a_new_one_starts():
    text = " distill.optimizer.lr=1e-4  hybrid.layers=[0, 3] description=two words data.max_turns=null\n"
    expected = ["distill.optimizer.lr=1e-4", "hybrid.layers=[0, 3]", "description=two words", "data.max_turns=null"]
    assert split_overrides(text) == expected
    assert split_overrides("  ") == []


def test_a_protocol_gives_lengths_and_batch_size():
    profile = parse_recipe(MINIMAL, overrides=["profile={protocol: paper, repeats: 2}"]).profile
    assert (profile.prompts, profile.batch_sizes, profile.repeats) == ([769], [1], 2)
    assert profile.new_tokens == [1024, 2048, 4096, 8192, 16384, 32768]
    assert profile.lengths[-1] == 769 + 32768
    assert type(profile).model_validate(profile.model_dump(mode="json")) == profile


def test_later_override_wins():
    assert parse_recipe(MINIMAL, overrides=["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("distill.lr=1", "distill.lr: unknown key"),
        ("seed", "not of the form field.path=value"),
        ("=3", "not of the form field.path=value"),
        ("name.first=a", "'name' is not a section"),
        ("distill.epochs=two", "distill.epochs"),
        ("hybrid.layers=[0, 4", "the value is not valid YAML"),
    ],
)
def test_bad_override(override, message):
    with pytest.raises(RecipeError) as caught:
        parse_recipe(MINIMAL, source="some.yaml", overrides=[override])
    assert str(caught.value).startswith("some.yaml: ")
    assert message in str(caught.value)


def test_a_recipe_cannot_be_changed():
    recipe = parse_recipe(MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        recipe.distill.batch_size = 1


def test_variants_start_with_the_recipes_own():
    assert parse_recipe(MINIMAL + "hybrid: {compare_inits: [random]}").hybrid.variants == ["aligned", "random"]


def test_the_steps_of_a_recipe_are_those_of_the_flows():
    """But for that of the nodes of a distillation, which is ``distill`` in a recipe."""
    trees = [ast.parse(path.read_text()) for path in RECIPES.parent.glob("*_flow.py")]
    functions = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    steps = {f.name for f in functions if any(isinstance(d, ast.Name) and d.id == "step" for d in f.decorator_list)}
    assert steps - {"distill_on_nodes"} == set(get_args(StepName))
