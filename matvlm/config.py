"""The recipe: everything that decides a run, in one frozen, strictly checked value.

A recipe is a YAML file under ``flows/recipes``. ``load_recipe`` reads one, applies ``field.path=value`` overrides and
returns a ``Recipe``; whatever is wrong with it comes back as one ``RecipeError`` that names the file, the field and
what was expected. Lengths are in tokens, sizes in samples, and ``updates`` are optimiser updates, never micro-batches.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, overload

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(gt=0)]
Weight = Annotated[float, Field(ge=0.0)]

LayerRule = Literal["even", "paper", "first", "middle", "last", "sensitivity"]
LayerList = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
Layers = Annotated[
    Annotated[LayerRule, Tag("(rule)")] | Annotated[LayerList, Tag("(list)")],
    Discriminator(lambda value: "(list)" if isinstance(value, list | tuple) else "(rule)"),
]
"""A rule or a list, told apart by type first, so that a wrong value is one error and not one per alternative."""
InitName = Literal["aligned", "paper", "random"]
Positions = Literal["answer", "text", "all"]
Scheme = Literal["topk_tail", "topk_sampled"]


class RecipeError(ValueError):
    """A recipe that cannot be run: the message names the file, each wrong field and what is expected there."""


class Section(BaseModel):
    """Base of every part of a recipe: unknown keys are refused, values cannot change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Teacher(Section):
    """The pre-trained VLM to convert."""

    model: str = "package://easyvqa-teacher"
    """``package://NAME`` (shipped with matvlm), a Hugging Face hub id, a local folder or ``s3://``."""
    revision: str | None = None
    """Of a hub id: branch, tag or commit."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    @property
    def uri(self) -> str:
        """``model``, with ``@revision`` where one is given."""
        return f"{self.model}@{self.revision}" if self.revision else self.model


class Data(Section):
    """Where training samples come from and which are kept."""

    source: Literal["easyvqa", "llava", "datasets"] = "easyvqa"
    path: str | None = None
    """``llava``: a JSON or JSONL file of LLaVA-format conversations, local or ``s3://``. ``datasets``: a hub id, or a
    folder of parquet, JSON, Arrow or images."""
    image_folder: str | None = None
    """What image names are looked up in, local or ``s3://``: a folder, a folder of .tar files, or a pattern of such
    (``images-{000..012}.tar``). Null is the folder of ``path``."""
    split: str = "train"
    """Of ``datasets``."""
    name: str | None = None
    """Of ``datasets``: the configuration, where there are several."""
    columns: dict[Literal["id", "image", "conversations", "question", "answer"], str] = {}
    """Of ``datasets``: what its columns are called, where it is not this."""
    max_samples: Count | None = None
    """Take at most this many conversations, drawn with ``seed``; null takes all."""
    max_turns: Count | None = None
    """Split longer conversations into samples of at most this many question-answer turns; null keeps them whole."""
    max_length: Count = 2048
    """Longest sample in tokens, image tokens included; longer ones are cut at a turn's end."""
    max_bad_share: Share = 0.01
    """Refuse the data when more than this share of it is bad (broken image, malformed entry). Samples without an image
    are skipped and are not bad."""

    @model_validator(mode="after")
    def _paths_fit_source(self) -> Data:
        if self.source == "llava" and not self.path:
            raise ValueError("source 'llava' needs path: a JSON or JSONL file of conversations")
        if self.source == "datasets" and not self.path:
            raise ValueError("source 'datasets' needs path: a hub id or the folder of a data set")
        if self.source == "easyvqa" and (self.path or self.image_folder):
            raise ValueError("source 'easyvqa' ships with its package: remove path and image_folder")
        if self.source != "datasets" and (self.split != "train" or self.name or self.columns):
            raise ValueError(f"split, name and columns are of source 'datasets', not of {self.source!r}: remove them")
        return self


class Optimizer(Section):
    lr: Annotated[float, Field(gt=0.0)] = 2.0e-4
    betas: tuple[Share, Share] = (0.9, 0.95)
    weight_decay: Weight = 0.01
    """Applied to matrices only; 1-D parameters have none."""
    clip_grad_norm: Annotated[float, Field(gt=0.0)] = 0.1


class Sensitivity(Section):
    """How ``layers: sensitivity`` measures the layers: each aligned for a short while, then tried alone."""

    updates: Count = 50
    """Optimiser updates of the alignment; all layers share them."""
    batch_size: Count = 16
    """Samples per update, and per forward pass of the trial."""
    held_out_samples: Count = 256
    """Samples that the trial is made on; none of them is aligned on."""
    optimizer: Optimizer = Optimizer(lr=1.0e-3, clip_grad_norm=1.0)


class Hybrid(Section):
    """Which attention layers become Mamba-2 and how the mixers start (arXiv 2503.13440)."""

    ratio: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.25
    """Share of decoder layers to replace. At least one layer stays attention."""
    layers: Layers = "even"
    """A rule, or the explicit layer numbers (then ``ratio`` is ignored)."""
    sensitivity: Sensitivity = Sensitivity()
    """Used by ``layers: sensitivity`` only."""
    init: InitName = "aligned"
    calibration_samples: Annotated[int, Field(ge=0)] = 32
    """Training samples on which ``aligned`` gives its heads the size of the attention's; 0 leaves that out."""
    compare_inits: list[InitName] = []
    """Further initialisations distilled with the same budget and evaluated beside ``init``."""
    kernels: Literal["auto", "torch", "mamba_ssm"] = "auto"
    chunk_size: Count = 64
    """Tokens per chunk of the chunked SSD scan."""

    @model_validator(mode="after")
    def _comparisons_differ(self) -> Hybrid:
        if self.init in self.compare_inits or len(set(self.compare_inits)) < len(self.compare_inits):
            raise ValueError(f"compare_inits must list initialisations other than init={self.init!r}, each once")
        return self

    @property
    def variants(self) -> list[InitName]:
        """Every initialisation to distil, the recipe's own first."""
        return [self.init, *self.compare_inits]


class Targets(Section):
    """The sparse teacher targets on disk, and with them the positions at which the student is held against them."""

    positions: Positions = "answer"
    """``answer``: before each answer token. ``text``: every text token before another one. ``all``: every real token,
    those of the image included (the paper)."""
    scheme: Scheme = "topk_tail"
    """What stands for all tokens but the top-k: one bucket, or draws from them. The bucket's gradient is a little
    biased and has no noise; the draws' is unbiased and noisy."""
    top_k: Annotated[int, Field(gt=0, le=1024)] = 32
    samples: Annotated[int, Field(gt=0, le=1024)] = 16
    """Draws a position; ``topk_sampled`` only."""
    shards: Count = 2
    batch_size: Count = 32


class Schedule(Section):
    """The learning rate: linear up in ``warmup_updates``, at the end ``final_lr_share`` of its peak."""

    shape: Literal["wsd", "cosine"] = "wsd"
    """After the warm-up. ``wsd``: constant, then linear down. ``cosine``: half a cosine down."""
    warmup_updates: Annotated[int, Field(ge=0)] = 0
    decay_updates: Annotated[int, Field(ge=0)] = 0
    """Of ``wsd``; with 0 the rate stays at its peak."""
    final_lr_share: Share = 0.0

    @model_validator(mode="after")
    def _cosine_has_no_decay(self) -> Schedule:
        if self.shape == "cosine" and self.decay_updates:
            raise ValueError("shape 'cosine' decays from the warm-up on: remove decay_updates, or use shape 'wsd'")
        return self


class Loss(Section):
    """``L = prob * divergence + layer * L_layer + ce * CE(labels)`` (arXiv 2503.13440), and two more terms."""

    prob: Weight = 1.0
    """Of the divergence between teacher and student."""
    divergence: Literal["kl", "reverse_kl", "jsd"] = "kl"
    """KL(teacher || student), KL(student || teacher), or the Jensen-Shannon divergence."""
    layer: Weight = 1.0
    layer_form: Literal["l2", "cosine"] = "l2"
    """Mean squared difference, or 1 - cosine, of a mixer's output and the attention's."""
    layer_inputs: Literal["teacher_forced", "student_forced"] = "teacher_forced"
    """``teacher_forced`` feeds each mixer the teacher's hidden states (the paper); ``student_forced`` the student's."""
    ce: Weight = 0.0
    """Of the cross entropy with the labels."""
    ce_teacher: Weight = 0.0
    """Of the cross entropy with the teacher's most likely token."""
    logits_l2: Weight = 0.0
    """Of the mean squared difference of the logits; needs ``targets: online``."""
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    """Divides the logits in the divergence; no other term knows it."""
    targets: Literal["cached", "online"] = "cached"
    """``cached`` reads the stored top-k; ``online`` runs the whole teacher in every update and reads no store."""
    scaling: Literal["positions", "paper"] = "positions"
    """``positions``: every term is a mean over its positions of the whole batch. ``paper``: the sum over positions
    divided by the samples of the batch alone, as the published code does; so it grows with the length of samples."""

    @model_validator(mode="after")
    def _something_is_learnt(self) -> Loss:
        if self.prob == self.layer == self.ce == self.ce_teacher == self.logits_l2 == 0:
            raise ValueError("at least one of prob, layer, ce, ce_teacher and logits_l2 must be above 0")
        return self

    @model_validator(mode="after")
    def _whole_logits_are_there(self) -> Loss:
        if self.logits_l2 and self.targets == "cached":
            raise ValueError("logits_l2 needs all logits of the teacher, which no store keeps: set targets: online")
        return self


class DeepSpeed(Section):
    zero_stage: Literal[1, 2] = 2


class Distill(Section):
    """One distillation run; trains the mixers and the connector, all else is frozen."""

    engine: Literal["auto", "torch", "deepspeed"] = "auto"
    """``auto`` takes DeepSpeed where it is installed and a GPU is present, plain torch elsewhere."""
    batch_size: Count = 64
    """Samples per optimiser update, over all GPUs and accumulation steps."""
    micro_batch_size: Count = 16
    """Samples per forward pass on one device; with ``packing`` rows of samples."""
    packing: bool = False
    """Several samples in one row of at most ``data.max_length`` tokens, kept apart, so that little is padding."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Processes that read and encode samples for each GPU; 0 does it in between."""
    epochs: Count = 1
    max_updates: Count | None = None
    """Stop after this many optimiser updates, whatever ``epochs`` says."""
    train_connector: bool = True
    loss: Loss = Loss()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    deepspeed: DeepSpeed = DeepSpeed()
    autocast: Literal["off", "bfloat16"] = "off"
    activation_checkpointing: Literal["none", "mixers", "layers"] = "none"
    """What the backward pass computes anew instead of keeping it: nothing, what is inside of the mixers, or every
    decoder layer. Changes memory and speed only."""
    compile: bool = False
    """Let torch.compile fuse the small operations of the decoder layers: faster, after some minutes of compiling."""
    max_skipped_updates: Annotated[int, Field(ge=0)] = 10
    """Updates with a loss or gradient that is not finite are skipped and counted; one more than this stops the run."""
    checkpoint_every_updates: Count = 100
    keep_checkpoints: Count = 2
    """The newest so many, and the one before which the loss was lowest."""
    snapshots: str | None = None
    """Where they are kept, also on ``s3://``; null: with the run's other files."""
    log_every_updates: Count = 10

    @model_validator(mode="after")
    def _batches_divide(self) -> Distill:
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} must be a multiple of micro_batch_size {self.micro_batch_size}"
            )
        return self


class Evaluate(Section):
    tasks: list[str] = ["easyvqa"]
    limit: Count | None = None
    """Evaluate this many questions of each task, evenly spaced over its split; null takes all."""
    limit_comparisons: Count | None = None
    """The same for the models beside teacher and student (straight after initialisation, ``compare_inits``)."""
    batch_size: Count = 64
    samples_shown: Count = 16
    """Questions with image and both answers shown in the card and in MLflow."""


class Profile(Section):
    """Teacher and student on one stack, interleaved, in one process."""

    contexts: list[Count] = [256, 1024, 2048]
    """Tokens already in the cache when decoding starts."""
    new_tokens: Count = 16
    batch_size: Count = 1
    repeats: Count = 3


class Tracking(Section):
    experiment: str = "matvlm"
    model_name: Annotated[str, Field(pattern=r"^[^./:%\"']+$")] = "matvlm"
    """Registered model name; MLflow refuses ``. / : %`` and quotes in it."""


class Resources(Section):
    """Per step; ignored by local runs except ``cpu``, the number of torch threads of a step."""

    cpu: Count = 1
    memory_mb: Count = 4096
    gpu: Annotated[int, Field(ge=0)] = 0


class Recipe(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
    description: str = ""
    seed: Annotated[int, Field(ge=0)] = 0
    teacher: Teacher = Teacher()
    data: Data = Data()
    hybrid: Hybrid = Hybrid()
    targets: Targets = Targets()
    distill: Distill = Distill()
    evaluate: Evaluate = Evaluate()
    profile: Profile = Profile()
    tracking: Tracking = Tracking()
    resources: Resources = Resources()

    @model_validator(mode="after")
    def _draws_estimate_the_kl(self) -> Recipe:
        loss = self.distill.loss
        if self.targets.scheme == "topk_sampled" and loss.targets == "cached" and loss.divergence != "kl":
            raise ValueError(
                f"distill.loss.divergence {loss.divergence} cannot be estimated from draws: use kl, targets.scheme "
                "topk_tail, or distill.loss.targets online"
            )
        return self

    @model_validator(mode="after")
    def _half_precision_autocasts(self) -> Recipe:
        if self.teacher.dtype != "float32" and self.distill.autocast == "off":
            raise ValueError(
                f"teacher.dtype {self.teacher.dtype} needs distill.autocast: bfloat16, as what is trained is float32"
            )
        return self


Kind = TypeVar("Kind", bound=Section)


@overload
def parse_recipe(text: str, source: str = ..., overrides: Iterable[str] = ...) -> Recipe: ...
@overload
def parse_recipe(text: str, source: str = ..., overrides: Iterable[str] = ..., *, kind: type[Kind]) -> Kind: ...
def parse_recipe(
    text: str, source: str = "recipe", overrides: Iterable[str] = (), *, kind: type[Section] = Recipe
) -> Section:
    """Parse the YAML (or JSON) ``text`` of a recipe.

    Args:
        text: the recipe file's content.
        source: the name used in error messages, normally the file's path.
        overrides: ``"distill.optimizer.lr=1e-4"`` strings, applied before checking; values are read as YAML.
        kind: the model to check against; another flow may have its own.

    Raises:
        RecipeError: not YAML, not a mapping, an unknown key, a wrong type or an impossible combination.
    """
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{source}: not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise RecipeError(f"{source}: expected a mapping of recipe sections at the top, got {type(raw).__name__}")
    for override in overrides:
        _apply_override(raw, override, source)
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(_describe(error, source)) from None


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read and check the recipe file at ``path``; see ``parse_recipe``.

    Raises:
        RecipeError: the file cannot be read, or ``parse_recipe`` refuses it.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{path}: cannot read the recipe: {error.strerror}") from None
    return parse_recipe(text, source=str(path), overrides=overrides)


def split_overrides(text: str) -> list[str]:
    """``"a.b=1 c=[2, 3]"`` as ``["a.b=1", "c=[2, 3]"]``: a new override starts at every word followed by ``=``."""
    return re.split(r"\s+(?=[\w.]+=)", text.strip()) if text.strip() else []


def _apply_override(raw: dict[str, Any], override: str, source: str) -> None:
    name, separator, value = override.partition("=")
    if not separator or not name.strip():
        raise RecipeError(f"{source}: override {override!r} is not of the form field.path=value")
    *parents, leaf = name.strip().split(".")
    section = raw
    for parent in parents:
        section = section.setdefault(parent, {})
        if not isinstance(section, dict):
            raise RecipeError(f"{source}: override {override!r}: {parent!r} is not a section")
    try:
        section[leaf] = _yaml_value(value)
    except yaml.YAMLError:
        raise RecipeError(f"{source}: override {override!r}: the value is not valid YAML") from None


def _yaml_value(text: str) -> Any:
    """A YAML scalar or flow value; also reads ``1e-4``, which YAML 1.1 takes for a string."""
    value = yaml.safe_load(text)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            pass
    return value


def _describe(error: ValidationError, source: str) -> str:
    lines = []
    for problem in error.errors():
        field = ".".join(str(part) for part in problem["loc"] if not str(part).startswith("("))
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            message = "unknown key"
        elif problem["type"] not in ("value_error", "missing"):
            message += f" (got {problem['input']!r})"
        lines.append(f"{source}: {field or 'recipe'}: {message}")
    return "\n".join(lines)
