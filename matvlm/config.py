"""The recipe: everything that decides a run, in one frozen, strictly checked value.

``matvlm.recipes`` reads one from a YAML file. Lengths are in tokens, sizes in samples, and ``updates`` are optimiser
updates, never micro-batches.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

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
    answers: Literal["words", "sentences", "both"] = "words"
    """Of ``easyvqa``: single words, as it has them, whole sentences, which each question then asks for, or, turn by
    turn, both."""
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
        if self.source != "easyvqa" and self.answers != "words":
            raise ValueError(f"answers are phrased for source 'easyvqa' only, not for {self.source!r}: remove answers")
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
    """Files that are made one by one; each GPU makes some, so there should be several for each."""
    batch_size: Count = 32
    workers: Annotated[int, Field(ge=0)] = 0
    """Processes that read and encode samples for each GPU; 0 does it in between."""
    compile: bool = False
    """Let torch.compile fuse the small operations of the teacher's decoder layers."""


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


class Ramp(Section):
    """A weight that changes in a straight line, ``{from: 1.0, to: 0.1, updates: 500}``, and then stays.

    The first update of its stage has ``from``; ``to`` is reached ``updates`` later.
    """

    model_config = ConfigDict(serialize_by_alias=True)

    start: Weight = Field(alias="from")
    to: Weight
    updates: Count

    def at(self, update: float) -> float:
        """The weight in ``update`` (from 1) of the stage."""
        share = min(1.0, (update - 1) / self.updates)
        return (1.0 - share) * self.start + share * self.to


RampedWeight = Annotated[
    Annotated[Weight, Tag("(number)")] | Annotated[Ramp, Tag("(ramp)")],
    Discriminator(lambda value: "(ramp)" if isinstance(value, dict | Ramp) else "(number)"),
]


class LossForms(Section):
    """What the terms of the loss are, whatever their weights."""

    divergence: Literal["kl", "reverse_kl", "jsd"] = "kl"
    """KL(teacher || student), KL(student || teacher), or the Jensen-Shannon divergence."""
    layer_form: Literal["l2", "cosine"] = "l2"
    """Mean squared difference, or 1 - cosine, of a mixer's output and the attention's."""
    layer_inputs: Literal["teacher_forced", "student_forced"] = "teacher_forced"
    """``teacher_forced`` feeds each mixer the teacher's hidden states (the paper); ``student_forced`` the student's."""
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    """Divides the logits in the divergence; no other term knows it."""
    targets: Literal["cached", "online"] = "cached"
    """``cached`` reads the stored top-k; ``online`` runs the whole teacher in every update and reads no store."""
    scaling: Literal["positions", "paper"] = "positions"
    """``positions``: every term is a mean over its positions of the whole batch. ``paper``: the sum over positions
    divided by the samples of the batch alone, as the published code does; so it grows with the length of samples."""


class Loss(LossForms):
    """The loss of one update: ``prob * divergence + layer * L_layer + ce * CE(labels)`` and two more terms.

    A term of weight 0 is not computed.
    """

    prob: Weight = 1.0
    layer: Weight = 1.0
    ce: Weight = 0.0
    ce_teacher: Weight = 0.0
    logits_l2: Weight = 0.0


class LossPlan(LossForms):
    """The loss of a run (arXiv 2503.13440): see ``Loss``. Each weight is a number, or a ``Ramp`` over the updates."""

    prob: RampedWeight = 1.0
    """Of the divergence between teacher and student."""
    layer: RampedWeight = 1.0
    ce: RampedWeight = 0.0
    """Of the cross entropy with the labels."""
    ce_teacher: RampedWeight = 0.0
    """Of the cross entropy with the teacher's most likely token."""
    logits_l2: RampedWeight = 0.0
    """Of the mean squared difference of the logits; needs ``targets: online``."""

    @property
    def ramps(self) -> dict[str, Ramp]:
        """The weights that change, by name."""
        return {name: value for name, value in self if isinstance(value, Ramp)}

    def at(self, update: float) -> Loss:
        """What holds in ``update`` (from 1) of the end-to-end stage."""
        return Loss(**{**dict(self), **{name: ramp.at(update) for name, ramp in self.ramps.items()}})

    @model_validator(mode="after")
    def _something_is_learnt(self) -> LossPlan:
        # Straight lines above 0 meet 0 at their ends only, so no update in between can be without a loss.
        for update, when in ((1, "is at the start"), (math.inf, "is left when the ramps have ended")):
            loss = self.at(update)
            if loss.prob == loss.layer == loss.ce == loss.ce_teacher == loss.logits_l2 == 0:
                names = "prob, layer, ce, ce_teacher and logits_l2"
                raise ValueError(f"at least one of {names} must be above 0 in every update: none {when}")
        return self

    @model_validator(mode="after")
    def _whole_logits_are_there(self) -> LossPlan:
        if self.logits_l2 and self.targets == "cached":
            raise ValueError("logits_l2 needs all logits of the teacher, which no store keeps: set targets: online")
        return self


class Align(Section):
    """A stage before the end-to-end one: mixers alone, on what the teacher's attentions were given and gave.

    Its loss is the layer loss, ``teacher_forced``; no student runs and the connector stays. Its updates come on top of
    those of ``epochs`` or ``max_updates``.
    """

    updates: Annotated[int, Field(ge=0)] = 0
    """0 leaves it out, as the paper does."""
    lr: Annotated[float, Field(gt=0.0)] = 1.0e-3
    schedule: Schedule = Schedule()


class Validation(Section):
    """Samples that are not trained on, on which the student is held against its teacher while it learns."""

    samples: Annotated[int, Field(ge=0)] = 0
    """How many are kept from training, in whole conversations, the same ones whatever the seed; 0 leaves it out."""
    every_updates: Count = 100
    """Beside before the first and after the last update."""


class DeepSpeed(Section):
    zero_stage: Literal[0, 1, 2, 3] = 2
    """What GPUs share instead of each holding it: nothing, the optimiser (1), the gradients too (2), the weights too,
    the frozen ones among them (3)."""
    offload_optimizer: bool = False
    """Keep the optimiser's state in CPU memory and update there; not with stage 0."""
    offload_parameters: bool = False
    """Keep each GPU's share of the weights in CPU memory; stage 3 only."""

    @model_validator(mode="after")
    def _there_is_something_to_offload(self) -> DeepSpeed:
        if self.offload_parameters and self.zero_stage != 3:
            raise ValueError(f"offload_parameters needs zero_stage: 3, where weights are shared, not {self.zero_stage}")
        if self.offload_optimizer and not self.zero_stage:
            raise ValueError("offload_optimizer needs zero_stage: 1, 2 or 3, where the optimiser is shared, not 0")
        return self


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
    """Of the end-to-end stage. The order of the data goes on through both stages."""
    max_updates: Count | None = None
    """Stop the end-to-end stage after this many optimiser updates, whatever ``epochs`` says."""
    train_connector: bool = True
    align: Align = Align()
    loss: LossPlan = LossPlan()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    validation: Validation = Validation()
    deepspeed: DeepSpeed = DeepSpeed()
    autocast: Literal["off", "bfloat16"] = "off"
    activation_checkpointing: Literal["none", "mixers", "layers"] = "none"
    """What the backward pass computes anew instead of keeping it: nothing, what is inside of the mixers, or every
    decoder layer. Changes memory and speed only."""
    compile: bool = False
    """Let torch.compile fuse the small operations of the decoder layers: faster, after some minutes of compiling."""
    cuda_graphs: bool = False
    """Record what the student does for a micro-batch, once for each length (rounded up to 64 tokens), and replay it:
    for micro-batches so small that the GPU waits for its host. Keeps the memory of the largest reserved."""
    max_skipped_updates: Annotated[int, Field(ge=0)] = 10
    """Updates with a loss or gradient that is not finite are skipped and counted; one more than this stops the run."""
    checkpoint_every_updates: Count = 100
    publish_every_updates: Annotated[int, Field(ge=0)] = 0
    """Write the student as a model of its own after every so many updates and register it, for whoever evaluates what
    is new; 0 never does. Such models are kept, each of the size of the whole student."""
    keep_checkpoints: Count = 2
    """The newest so many, and the one before which the loss was lowest."""
    snapshots: str | None = None
    """Where they are kept, also on ``s3://``: in a folder named by the last three parts of the run's own, such as
    ``NAME/distill/aligned``. Null: with the run's other files."""
    log_every_updates: Count = 10
    profile_updates: Annotated[int, Field(ge=0)] = 0
    """Trace so many updates, from the third on, with torch's profiler, into ``trace.json.gz``."""

    @model_validator(mode="after")
    def _batches_divide(self) -> Distill:
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} must be a multiple of micro_batch_size {self.micro_batch_size}"
            )
        return self

    @model_validator(mode="after")
    def _graphs_know_all(self) -> Distill:
        if self.cuda_graphs and (self.packing or self.deepspeed.zero_stage == 3):
            what = "packing" if self.packing else "deepspeed.zero_stage 3"
            raise ValueError(
                f"cuda_graphs replay one shape and the same weights, which {what} changes: use one of them"
            )
        return self

    @model_validator(mode="after")
    def _comparisons_are_kept(self) -> Distill:
        if self.activation_checkpointing == "layers" and self.loss.layer and self.loss.layer_inputs == "student_forced":
            raise ValueError(
                "activation_checkpointing 'layers' would lose what loss.layer_inputs 'student_forced' compares inside "
                "of them: use activation_checkpointing 'mixers'"
            )
        return self


TASKS = (
    *("easyvqa", "easyvqa_sentence", "gqa", "mmbench_en_dev", "mmbench_en_test", "mme", "mmmu", "mmvet", "pope"),
    *("python_docs", "scienceqa_img", "textvqa", "textvqa_ocr", "vqav2_testdev", "vqav2_val"),
)
"""The benchmarks of ``matvlm.evaluate.tasks``."""


def _known(name: str) -> str:
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; known are {', '.join(TASKS)}")
    return name


TaskName = Annotated[str, AfterValidator(_known)]


class Evaluate(Section):
    tasks: Annotated[list[TaskName], Field(min_length=1)] = ["easyvqa"]
    data: dict[TaskName, str] = {}
    """Task -> the folder with its data, local or ``s3://``, as on the hub or as the benchmark's authors give it; those
    of the others are fetched from the hub, but easy-VQA's and Python's own text, which are at hand."""
    hub_org: str = "lmms-lab"
    """The organisation on the Hugging Face hub that has the benchmarks' data sets."""
    limit: Count | None = None
    """Evaluate this many questions of each task, evenly spaced over its split; null takes all."""
    limit_comparisons: Count | None = None
    """The same for the models beside teacher and student (straight after initialisation, ``compare_inits``)."""
    batch_size: Count = 64
    samples_shown: Count = 16
    """Questions with image and both answers shown in the card and in MLflow."""


StackName = Literal["engine", "hf", "hf_static"]
"""What runs a model: our engine, transformers' ``generate()``, and that with its static cache (compiled on a GPU)."""

PROTOCOLS: dict[str, dict[str, list[int]]] = {
    "paper": {"prompts": [769], "new_tokens": [2**power for power in range(10, 16)], "batch_sizes": [1]},
}
"""Published protocols of measuring, by name. ``paper``: MaTVLM's figures, one sequence, an image of 728 tokens with its
question, 1k to 32k tokens generated."""


def _distinct(values: list[Any]) -> list[Any]:
    if len(set(values)) < len(values):
        raise ValueError(f"every value once, got {values}")
    return values


Counts = Annotated[list[Count], Field(min_length=1), AfterValidator(_distinct)]
Decoded = Annotated[int, Field(ge=2)]


class Profile(Section):
    """Models side by side, interleaved, in one process: every prompt length with every answer and batch size."""

    protocol: Literal["paper"] | None = None
    """A name of ``PROTOCOLS``, which then gives ``prompts``, ``new_tokens`` and ``batch_sizes``."""
    stacks: Annotated[list[StackName], Field(min_length=1), AfterValidator(_distinct)] | None = None
    """Null is engine and hf, on a GPU hf_static too."""
    prompts: Counts = [256, 1024, 2048]
    """Tokens of each sequence that are there when decoding starts."""
    new_tokens: Annotated[list[Decoded], Field(min_length=1), AfterValidator(_distinct)] = [32]
    """Tokens decoded for each sequence, the first one, which the prompt gives, included."""
    batch_sizes: Counts = [1]
    repeats: Count = 5

    @model_validator(mode="before")
    @classmethod
    def _protocol_gives_the_lengths(cls, given: Any) -> Any:
        fixed = PROTOCOLS.get(str(given.get("protocol")), {}) if isinstance(given, dict) else {}
        for field, value in fixed.items():
            if given.get(field, value) != value:
                raise ValueError(f"protocol {given['protocol']} sets {field} to {value}: leave {field} out")
        return {**given, **fixed} if fixed else given

    @property
    def lengths(self) -> list[int]:
        """Tokens of a sequence at the end, of each combination."""
        return sorted({prompt + new for prompt in self.prompts for new in self.new_tokens})


Percent = Annotated[float, Field(ge=0.0, le=100.0)]
Score = Annotated[float, Field(allow_inf_nan=False)]
PerTask = Annotated[
    Annotated[Score, Tag("(number)")] | Annotated[dict[str, Score], Tag("(by task)")],
    Discriminator(lambda value: "(by task)" if isinstance(value, dict) else "(number)"),
]
"""One number for every task, or a number by task; a task that is not named is free."""


class Promote(Section):
    """What an evaluated student has to reach to become ``candidate`` in the model registry.

    Scores are on the scale of ``TaskScore``; drops are shares of the teacher's score, in percent. With nothing set
    every student passes whose tasks all have a score.
    """

    tasks: list[str] | None = None
    """Of ``evaluate.tasks``, those that count; null is all. Leave out what has no score, such as an upload."""
    max_mean_drop: Percent | None = None
    """Of the mean over the tasks."""
    max_drop: PerTask = {}
    min_score: PerTask = {}


class Tracking(Section):
    experiment: str = "matvlm"
    model_name: Annotated[str, Field(pattern=r"^[^./:%\"']+$")] = "matvlm"
    """Registered model name; MLflow refuses ``. / : %`` and quotes in it."""


StepName = Literal[
    "start",
    "prepare_data",
    "teacher_targets",
    "join_targets",
    "init_hybrid",
    "choose_nodes",
    "distill",
    "spread",
    "join_nodes",
    "collect",
    "join_students",
    "list_models",
    "evaluate",
    "compare",
    "profile",
    "register",
    "gate",
    "train",
    "list_points",
    "point",
    "join_points",
    "report",
    "end",
]
"""Of the flows' steps; ``distill`` also of the tasks that are its nodes."""


class StepResources(Section):
    """What a step asks a cluster for; None: what the section ``resources`` says."""

    cpu: Count | None = None
    memory_mb: Count | None = None
    gpu: Annotated[int, Field(ge=0)] | None = None
    shared_memory_mb: Count | None = None
    """Of a pod, which has 64 MB otherwise; NCCL and data workers need more."""
    disk_mb: Count | None = None
    """For models, images and caches; Metaflow asks for 10,240 otherwise."""
    image: str | None = None
    """Container image; otherwise METAFLOW_KUBERNETES_CONTAINER_IMAGE."""
    node_selector: dict[str, str] | None = None
    """Labels of the nodes that will do, for a kind of GPU ``{nvidia.com/gpu.product: NVIDIA-H100-80GB-HBM3}``."""
    tolerations: list[dict[str, str | int]] | None = None
    """Taints of nodes that do not matter, as Kubernetes writes them."""
    retries: Annotated[int, Field(ge=0, le=5)] | None = None
    """Further attempts on a cluster, after an error or a lost pod. A local run stops, and is resumed."""
    timeout_hours: Annotated[float, Field(gt=0)] | None = None
    """After so long an attempt is given up."""


class Resources(StepResources):
    """Of every step that computes with a model; others get 1 CPU and 4,096 MB.

    Local runs look at ``cpu``, the number of torch threads of a step, at ``processes`` and at ``timeout_hours``.
    """

    cpu: Count = 1
    memory_mb: Count = 4096
    gpu: Annotated[int, Field(ge=0)] = 0
    retries: Annotated[int, Field(ge=0, le=5)] = 2
    retry_minutes: Annotated[int, Field(ge=0)] = 2
    """Between two attempts."""
    processes: Count | None = None
    """Of the distillation and of ``python -m matvlm targets``, also in local runs; null is one for each GPU, or one
    where there is none."""
    nodes: Count = 1
    """Pods that share the distillation, each with ``gpu`` GPUs, or ``processes`` processes."""
    steps: dict[StepName, StepResources] = {}
    """Where a step differs; one that does not compute with a model asks for what is said here alone."""

    def own(self, step: str) -> StepResources:
        """What is said of ``step`` alone."""
        return self.steps.get(step, StepResources())  # type: ignore[call-overload]

    def of(self, step: str) -> Resources:
        """With what ``step`` has of its own in place of what is said for all."""
        return self.model_copy(update=self.own(step).model_dump(exclude_none=True))


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
    promote: Promote = Promote()
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
    def _promotion_asks_for_what_is_evaluated(self) -> Recipe:
        asked = {"tasks": self.promote.tasks or [], "max_drop": self.promote.max_drop}
        for field, names in {**asked, "min_score": self.promote.min_score}.items():
            for name in names if isinstance(names, list | dict) else []:
                if name not in (self.evaluate.tasks if field == "tasks" else self.judged_tasks):
                    where = "evaluate.tasks" if field == "tasks" else "the tasks that count"
                    raise ValueError(f"promote.{field} names {name!r}, which is not in {where}")
        return self

    @property
    def judged_tasks(self) -> list[str]:
        """The tasks that the promotion is decided by."""
        return self.evaluate.tasks if self.promote.tasks is None else self.promote.tasks

    @model_validator(mode="after")
    def _half_precision_autocasts(self) -> Recipe:
        if self.teacher.dtype != "float32" and self.distill.autocast == "off":
            raise ValueError(
                f"teacher.dtype {self.teacher.dtype} needs distill.autocast: bfloat16, as what is trained is float32"
            )
        return self
