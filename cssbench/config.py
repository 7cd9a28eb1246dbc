"""Recipes: what a run does, as validated data. Unknown keys are refused, and the whole is written back resolved.

A recipe is a TOML file with the sections below. `method` and `model` carry, beside `name`, the options of the part
named; those are checked by the part's own `Config` when the run starts. TOML has no null: "none" stands for None
where a setting may be None. How files are found and start from one another: `cssbench.recipes`.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal, get_args

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, field_validator, model_validator

from cssbench.errors import ConfigError
from cssbench.recipes import with_preset

NONE = "none"
Epochs = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Section(BaseModel):
    """A group of settings that refuses unknown keys and never changes after it was read.

    A plug-in's `Config` derives from it too: `from cssbench.api import Section`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _read_none(cls, content: Any) -> Any:
        if not isinstance(content, dict):
            return content
        fields = cls.model_fields
        optional = {name for name in content if name in fields and type(None) in get_args(fields[name].annotation)}
        return {name: None if value == NONE and name in optional else value for name, value in content.items()}


class PartChoice(BaseModel):
    """A part by name, and its own options (every other key)."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class ScenarioChoice(Section):
    """A scenario by name (or path of a TOML), and what to change in it. None keeps what the file says."""

    name: str
    mode: Literal["overlapped", "disjoint", "sequential", "partitioned"] | None = None
    order: list[int] | int | None = None
    void: Literal["background", "ignore"] | None = None
    partition_seed: int | None = None


class DataConfig(Section):
    """Where the images are, and how they are read."""

    root: str | None = Field(None, description="data root; `--data` sets it")
    options: dict[str, Any] = Field(default_factory=dict, description="options of the dataset")
    holdout: float = Field(0.0, ge=0, lt=1, description="share of training images never trained on")
    workers: int = Field(0, ge=0, description="loader processes per device")
    stored: float | None = Field(
        None,
        gt=0,
        description="GiB for decoded images and label maps in $CSSBENCH_CACHE/images, decoded once for all runs",
    )
    stored_side: PositiveInt | None = Field(
        None,
        description="train on images reduced to this short side, where theirs is longer (changes what is learned "
        "from; `stored` keeps them so); None: on those given. Evaluation always reads those given",
    )


class AugmentConfig(Section):
    """Training transforms, in this order: random resize, random crop, flip, photometric distortion, normalise, pad."""

    crop: PositiveInt = Field(512, description="side of the square crop, px")
    short_side: PositiveInt | None = Field(None, description="short side before the random factor; None: as stored")
    scale: tuple[float, float] = Field((0.5, 2.0), description="range of the random resize factor")
    max_category_share: float = Field(
        0.75, gt=0, le=1, description="redraw a crop (10 times) when one label fills more"
    )
    flip: float = Field(0.5, ge=0, le=1, description="probability of the horizontal flip")
    photometric: bool = True
    later_views: PositiveInt | None = Field(
        None,
        description="steps t > 0: only so many augmented views of each image, again and again; None: ever new ones",
    )

    @model_validator(mode="after")
    def _ordered(self) -> AugmentConfig:
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"augment.scale must be two positive numbers in ascending order, not {self.scale}")
        return self


class CacheConfig(Section):
    """What a frozen encoder makes of images is kept in files instead of being made again (docs/speed.md).

    For methods that freeze the encoder after step 0; a step at which it learns goes on without, and says so.
    """

    features: bool = Field(
        False, description="steps t > 0 learn from stored features of augment.later_views views per image"
    )
    dtype: Literal["bf16", "fp16", "fp32"] = Field("bf16", description="of the features that are learned from")
    evaluation: bool = Field(
        False, description="evaluations run only new heads, on features stored as they are: the same numbers"
    )
    folder: str | None = Field(None, description="None: features/ in $CSSBENCH_CACHE, or in ~/.cache/cssbench")
    max_gib: float = Field(50.0, gt=0, description="most that the folder may hold, of all encoders together")


class CheckpointConfig(Section):
    """When a step in training is saved, so that `cssbench resume` goes on inside it (docs/resume.md). A signal to stop
    always saves."""

    minutes: float | None = Field(10.0, gt=0, description="save so often; None: not by time")
    iterations: PositiveInt | None = Field(None, description="save after so many iterations; None: not by count")


class LogConfig(Section):
    """Where numbers and sample images go beside the CSV files in logs/ (docs/logging.md)."""

    loggers: list[str] = Field(
        ["tensorboard"], description="`cssbench list loggers`; wandb and mlflow are extras; []: the CSV alone"
    )
    project: str = Field("cssbench", min_length=1, description="project of W&B, experiment of MLflow")

    @field_validator("loggers")
    @classmethod
    def _once(cls, names: list[str]) -> list[str]:
        if len(set(names)) < len(names):
            raise ValueError("list each logger once")
        return names


class OptimConfig(Section):
    """Optimiser and schedule. Rates with a `later_` twin use it at steps t > 0."""

    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = Field(2e-5, gt=0)
    later_lr: float | None = Field(None, gt=0, description="None: as lr")
    head_lr_scale: float = Field(10.0, gt=0, description="heads learn this much faster than the encoder")
    weight_decay: float = Field(0.01, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: float = Field(0.9, ge=0, lt=1, description="sgd only, Nesterov")
    clip: float | None = Field(None, gt=0, description="L2 norm to which the gradient is clipped; None: not clipped")
    power: float = Field(1.0, ge=0, description="poly schedule: lr (1 - i/T)^power")
    min_lr: float = Field(0.0, ge=0)
    warmup: int = Field(0, ge=0, description="iterations of linear warm-up")
    warmup_ratio: float = Field(1e-6, gt=0, le=1)
    fused: bool | None = Field(
        None, description="one kernel for many parameters, equal up to rounding; None: unless 16-mixed clips"
    )


class TrainConfig(Section):
    """How long, how many at once, on what."""

    batch_size: PositiveInt = Field(16, description="images per optimiser step, over all devices")
    accumulate: PositiveInt = Field(1, description="forward passes per optimiser step and device")
    iterations: PositiveInt | Annotated[list[PositiveInt], Field(min_length=1)] | None = Field(
        None, description="per step; the last one repeats"
    )
    epochs: Epochs | Annotated[list[Epochs], Field(min_length=1)] | None = Field(
        None, description="instead of iterations; the last one repeats"
    )
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    devices: PositiveInt = Field(
        1, description="processes on this machine, a GPU for each; where torchrun starts them, it decides"
    )
    strategy: Literal["auto", "ddp", "fsdp"] = Field(
        "auto",
        description="of several processes: each holds the whole model (ddp; auto), or a share of it and of the "
        "optimiser's state while a step trains the encoder (fsdp)",
    )
    mask_count: Literal["pass", "processes"] = Field(
        "pass",
        description="number of masks by which SegViT's mask losses are divided: that of a pass, or its mean over the "
        "processes (public code; then the result depends on their number)",
    )
    sync_batchnorm: bool = Field(
        False, description="BatchNorm normalises over the images of all processes at once, not of each alone"
    )
    compile: bool = Field(
        False, description="torch.compile for the encoder's blocks in training; without a compiler, eager as before"
    )
    channels_last: bool = Field(
        False, description="images and convolutions with channels innermost in memory: for ResNets on a GPU"
    )
    teacher_precision: Literal["same", "bf16"] = Field(
        "same", description="of the previous model's forward pass: as precision says, or bf16 autocast"
    )
    log_every: PositiveInt = 10
    initial: str | None = Field(
        None, description="run folder: step 0 starts from the weights after its step 0. See `cssbench.initial`"
    )

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        if (self.iterations is None) == (self.epochs is None):
            raise ValueError("give exactly one of train.iterations and train.epochs")
        return self

    def length(self, step: int, images: int) -> int:
        """Optimiser steps of step `step`, which has `images` training images."""
        if self.iterations is not None:
            return int(_at(self.iterations, step))
        return max(1, round(_at(self.epochs, step) * images / self.batch_size))


def _at(value: Any, step: int) -> Any:
    return value[min(step, len(value) - 1)] if isinstance(value, list) else value


class EvaluateConfig(Section):
    """Test geometries and what is kept of them. See `cssbench.evaluate`."""

    split: Literal["val", "test", "holdout"] = "val"
    geometries: list[Literal["full", "crop"]] = Field(["full", "crop"], min_length=1)
    crop: PositiveInt = Field(512, description="`crop`: short side, then centre crop, px")
    short_side: PositiveInt | None = Field(512, description="`full`: short side of the model's input; None: as stored")
    long_side: PositiveInt | None = Field(2048, description="`full`: longest side allowed of the model's input")
    inference: Literal["whole", "slide"] = "whole"
    window: PositiveInt = Field(512, description="`slide`: side of the window, px")
    stride: PositiveInt = Field(341, description="`slide`: stride of the window, px")
    chunk: PositiveInt = Field(
        16,
        description="classes scored at once, rounded up to a multiple of 16: changes memory and time, no result",
    )
    background_threshold: float = Field(
        0.5, ge=0, description="models without a background output predict it where no score reaches this"
    )
    samples: int = Field(8, ge=0, description="validation images whose predictions are kept for the report")
    flops_images: int = Field(8, ge=0, description="images over which the cost of a forward pass is counted; 0: not")
    limit: PositiveInt | None = Field(None, description="only so many images: for debugging, never for a table")

    @field_validator("geometries")
    @classmethod
    def _once(cls, names: list[str]) -> list[str]:
        if len(set(names)) < len(names):
            raise ValueError("list each geometry once")
        return names

    @model_validator(mode="after")
    def _no_gaps(self) -> EvaluateConfig:
        if self.inference == "slide" and self.stride > self.window:
            raise ValueError(f"evaluate.stride {self.stride} above evaluate.window {self.window} leaves pixels unseen")
        return self


class RunConfig(Section):
    """A whole recipe."""

    seed: int = Field(0, ge=0, lt=2**31)
    note: str = Field("", description="shown beside every number: budget, scale, what it must not be compared with")
    scenario: ScenarioChoice
    method: PartChoice
    model: PartChoice
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig
    evaluate: EvaluateConfig = EvaluateConfig()
    cache: CacheConfig = CacheConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _views(self) -> RunConfig:
        if self.cache.features and self.augment.later_views is None:
            raise ValueError(
                "cache.features needs a number of views to keep: set augment.later_views, for instance to 4 (the only "
                "change of what is learned from; without it every epoch has new views)"
            )
        return self

    def dump(self) -> dict[str, Any]:
        """As plain data, ready for TOML; `validate` of it gives an equal configuration."""
        return plain(self)

    def to_toml(self) -> str:
        return tomli_w.dumps(self.dump())


def plain(section: BaseModel) -> dict[str, Any]:
    """The settings as TOML can hold them: a None is left out where it is the default, and is "none" elsewhere."""
    dumped, content = section.model_dump(mode="json"), {}
    for name, value in section:
        field = type(section).model_fields.get(name)
        if isinstance(value, BaseModel):
            content[name] = plain(value)
        elif value is not None or field is None or field.get_default(call_default_factory=True) is not None:
            content[name] = _spelled(dumped[name])
    return content


def _spelled(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _spelled(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_spelled(item) for item in value]
    return NONE if value is None else value


def validate(content: dict[str, Any], source: str) -> RunConfig:
    """Check the content of a recipe; a preset that it names as its model is filled in (`recipes.with_preset`).

    Raises ConfigError naming `source`, the key and what it may hold.
    """
    try:
        return RunConfig.model_validate(with_preset(content))
    except ValidationError as error:
        raise ConfigError(explain_validation(source, error, RunConfig)) from None


def part_config(kind: str, choice: PartChoice, config: type[Section]) -> Section:
    """The options of a method or model, checked by its own `Config`. Raises ConfigError."""
    try:
        return config.model_validate(choice.options)
    except ValidationError as error:
        raise ConfigError(explain_validation(f"The options of {kind} {choice.name!r}", error, config)) from None


def explain_validation(source: str, error: ValidationError, model: type[BaseModel] | None = None) -> str:
    """A pydantic error as one paragraph: which key, what it held, what is allowed, the nearest key (of `model`)."""
    complaints = []
    for item in error.errors():
        where = _where(model, item["loc"]) or "the whole"
        if item["type"] == "extra_forbidden":
            complaints.append(f"unknown key {where!r}{_hint(model, item['loc']) if model else ''}")
        elif item["type"] == "missing":
            complaints.append(f"{where!r} is missing")
        else:
            value = "" if isinstance(item["input"], dict) else f" (it is {item['input']!r})"
            complaints.append(f"{where!r}{value}: {item['msg'].removeprefix('Value error, ')}")
    return f"{source} is not valid: " + "; ".join(dict.fromkeys(complaints)) + "."


def _where(model: type[BaseModel] | None, loc: tuple[int | str, ...]) -> str:
    """`loc` as a dotted key, without the names of types that pydantic adds below a setting of several types."""
    section, parts = model, []
    for part in loc:
        if section or not model or isinstance(part, int):
            parts.append(str(part))
        if section and isinstance(part, str):
            section = _sections(section).get(part)
    return ".".join(parts)


def _hint(model: type[BaseModel], loc: tuple[int | str, ...]) -> str:
    """What to write instead of the unknown key at `loc`: its place, a near key of the section or of another, or all."""
    section: type[BaseModel] | None = model
    for part in loc[:-1]:
        if section and isinstance(part, str):
            section = _sections(section).get(part)
    name, known = str(loc[-1]), list(section.model_fields) if section else []
    paths = _paths(model)
    near = [path for path in paths if path.split(".")[-1] == name]
    near = near or difflib.get_close_matches(name, known, n=2, cutoff=0.5)
    if not near:
        names = difflib.get_close_matches(name, {path.split(".")[-1] for path in paths}, n=2, cutoff=0.8)
        near = [path for path in paths if path.split(".")[-1] in names]
    if near:
        return f" (did you mean {' or '.join(map(repr, near))}?)"
    return f" (known: {', '.join(sorted(known)) or 'none'})"


def _sections(model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """Fields of `model` that are sections themselves."""
    found = {}
    for name, field in model.model_fields.items():
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                found[name] = kind
    return found


def _paths(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted keys of all settings of `model` and of its sections."""
    below = [path for name, child in _sections(model).items() for path in _paths(child, f"{prefix}{name}.")]
    return [f"{prefix}{name}" for name in model.model_fields] + below
