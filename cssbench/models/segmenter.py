"""What a model is: an encoder and one head per step, and what it puts out.

Shapes: B images of H x W px; outputs are in position order (background first where the model has one).
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from cssbench.config import Section
from cssbench.models.pieces import pieces
from cssbench.scenario import Step


@dataclass
class SegOutput:
    """Output of one forward pass. `size` is the input's (H, W); `features` are (B, D, h, w) maps, shallow first.

    depths: (B, h, w) int64 on the token grid, the number of encoder blocks that each cell's token went through as a
    query of its own; None: a model whose tokens all go through every block.
    """

    size: tuple[int, int]
    features: list[Tensor] = field(default_factory=list)
    depths: Tensor | None = field(default=None, kw_only=True)

    @cached_property
    def scores(self) -> Tensor:
        """(B, C, H, W): the argmax over C is the predicted position (channel 0 = position 0 with a background
        output, position 1 without)."""
        raise NotImplementedError

    def score_chunks(self, most: int) -> Iterator[Tensor]:
        """`scores` (B, n, H, W), in order and bit for bit, about `most` channels at a time: what an evaluation reads.

        An output that can make some channels without the others overrides this; it yields more than `most` where it
        cannot. A class that defines `scores` anew and not this is read by its `scores`.
        """
        yield from pieces(self.scores, most)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "scores" in vars(cls) and "score_chunks" not in vars(cls):
            cls.score_chunks = SegOutput.score_chunks  # type: ignore[method-assign]

    @cached_property
    def logits(self) -> Tensor:
        """(B, C, H, W): what a softmax over classes applies to. Same channels as `scores`."""
        return self.scores

    # What distillation methods read; a model that offers it sets `Segmenter.pixel_output`.

    @cached_property
    def pixel_logits(self) -> Tensor:
        """(B, 1 + seen classes, H, W): what a softmax over background (always channel 0) and classes applies to."""
        return self.logits

    @property
    def embedding(self) -> Tensor:
        """(B, D, h, w): what the classifier reads (REMINDER's prototypes)."""
        return self.features[-1]

    @property
    def encoded(self) -> Tensor:
        """(B, D, h, w): the encoder's output (ILT's feature term)."""
        return self.features[-1]

    def pod_maps(self, num_outputs: int) -> list[Tensor]:
        """(B, D, h, w) maps that PLOP compares, the output map last, as if the model had `num_outputs` outputs
        (background included): then those of the current and the previous model have the same shapes."""
        raise NotImplementedError


@dataclass
class Encoded:
    """What a model makes of images (B, 3, H, W) before its heads: taps (B, ...), and other tensors (B, ...) by name.

    `size` is the images' (H, W). `known`: head's step -> its output as `Segmenter.remembered` gave it for these images,
    which `decode` takes instead of running that head.
    """

    size: tuple[int, int]
    taps: list[Tensor]
    extra: dict[str, Tensor] = field(default_factory=dict)
    known: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """All of them by name: "tap0", "tap1", ... and those of `extra`. `from_tensors` is the way back."""
        return {f"tap{index}": tap for index, tap in enumerate(self.taps)} | self.extra

    @classmethod
    def from_tensors(cls, size: tuple[int, int], tensors: dict[str, Tensor]) -> Encoded:
        number = sum(name.startswith("tap") for name in tensors)
        taps = [tensors[f"tap{index}"] for index in range(number)]
        return cls(size, taps, {name: tensor for name, tensor in tensors.items() if not name.startswith("tap")})


class Segmenter(nn.Module):
    """Base of all models. Registered under `cssbench.models`, built as `cls(cls.Config(...))`, then grown.

    Attributes: `has_background`: is position 0 an output?  `pixel_mean`, `pixel_std`: normalisation of 0..1 RGB;
    `multiple`: H and W of an input must be multiples of this, px; `pixel_output`: does its output offer what
    distillation methods read (`SegOutput.pixel_logits` and below)?
    """

    class Config(Section):
        """No options."""

    has_background: bool = True
    pixel_output: bool = False
    multiple: int = 1
    pixel_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    pixel_std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __init__(self, config: Any = None) -> None:
        super().__init__()
        self.config: Any = self.Config() if config is None else config
        self.heads = nn.ModuleList()
        self._frozen: list[nn.Module] = []
        self.skip_frozen_heads = False

    @abstractmethod
    def grow(self, step: Step) -> None:
        """Append the head of `step` to `self.heads`. Called once per step, in order, also when a run resumes."""

    def forward(self, images: Any, *args: Any, **kwargs: Any) -> SegOutput:
        """images: (B, 3, H, W), normalised, or what `encode` made of them; the rest as `training_inputs` returns it.

        In training mode with `skip_frozen_heads`, frozen heads are left out. A model defines either this, on images, or
        `encode` and `decode`: what `encode` returns may then be kept from step to step while the encoder is frozen.
        """
        return self.decode(images if isinstance(images, Encoded) else self.encode(images, *args, **kwargs))

    def encode(self, images: Tensor, *args: Any, **kwargs: Any) -> Encoded:
        """All that `forward` does before the heads: it depends on `encoder` alone, never on a head."""
        raise NotImplementedError(f"{type(self).__name__} must define forward, or encode and decode")

    def decode(self, encoded: Encoded) -> SegOutput:
        """The heads on what `encode` returned."""
        raise NotImplementedError(f"{type(self).__name__} must define forward, or encode and decode")

    def remembered(self, output: Any, step: int) -> dict[str, Tensor]:
        """In eval mode: the output of step `step`'s head, as `Encoded.known` takes it, (B, ...) by name. Empty: it is
        not worth keeping, or depends on other heads."""
        return {}

    @property
    def splits(self) -> bool:
        """Does `forward` consist of `encode` and `decode`?"""
        own = type(self)
        return own.forward is Segmenter.forward and own.encode is not Segmenter.encode

    @property
    def encoder_frozen(self) -> bool:
        """Is everything but the heads frozen (`freeze_old`)?"""
        return all(self.is_frozen(module) for module in self.encoder) and not any(
            parameter.requires_grad for parameter in self.parameters(recurse=False)
        )

    def training_inputs(self, labels: Tensor) -> dict[str, Tensor]:
        """What `forward` takes beside the images in a training pass on labels (B, H, W): its keyword arguments.

        The trainer calls `model(images, **model.training_inputs(labels))`; all other callers `model(images)`.
        """
        return {}

    @abstractmethod
    def loss(self, output: Any, labels: Tensor, *, weight: Tensor | None = None) -> dict[str, Tensor]:
        """The model's own supervised loss on labels (B, H, W) of positions; named scalars, weighted.

        weight: (B,) factor per image (PLOP's adaptive factor), or None; required of models with `pixel_output`.
        """

    @property
    def encoder(self) -> list[nn.Module]:
        """Modules that are not heads."""
        return [child for child in self.children() if child is not self.heads]

    def freeze_old(self, skip_in_training: bool = False) -> None:
        """Freeze everything but the newest head: no gradient, and eval mode that `train()` does not undo.

        skip_in_training: do not even run old heads in training mode (their output cannot change).
        """
        self._frozen = [*self.encoder, *list(self.heads)[:-1]]
        self.skip_frozen_heads = skip_in_training
        for module in self._frozen:
            module.requires_grad_(False)
        for parameter in self.parameters(recurse=False):
            parameter.requires_grad_(False)
        self.train(self.training)

    def is_frozen(self, module: nn.Module) -> bool:
        return any(module is frozen for frozen in self._frozen)

    def train(self, mode: bool = True) -> Segmenter:
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def compiled_parts(self) -> list[nn.Module]:
        """What `train.compile` compiles: parts whose work is the same whatever the number of classes. Default: what the
        encoder's modules list in an attribute of this name."""
        return [part for module in self.encoder for part in getattr(module, "compiled_parts", [])]

    def old_parameters(self) -> list[nn.Parameter]:
        """Parameters that existed before the newest head."""
        new = {id(p) for p in self.new_parameters()}
        return [p for p in self.parameters() if id(p) not in new]

    def new_parameters(self) -> list[nn.Parameter]:
        return list(self.heads[-1].parameters())

    def param_groups(self) -> list[dict[str, Any]]:
        """Trainable parameters as optimiser groups: encoder weights, encoder norms / biases / embeddings (no weight
        decay), and heads at the head rate (decayed throughout, as in the public SegViT code)."""
        no_decay = self.no_decay_names()
        groups: dict[str, dict[str, Any]] = {
            "encoder": {"params": []},
            "encoder_no_decay": {"params": [], "weight_decay": 0.0},
            "heads": {"params": [], "head": True},
        }
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                plain = parameter.ndim == 1 or name in no_decay
                kind = "heads" if name.startswith("heads.") else "encoder_no_decay" if plain else "encoder"
                groups[kind]["params"].append(parameter)
        return [{"name": kind, **group} for kind, group in groups.items() if group["params"]]

    def no_decay_names(self) -> set[str]:
        """Names of encoder parameters without weight decay, beside those with one dimension."""
        return set()


def freeze_copy(model: Segmenter) -> Segmenter:
    """A copy in eval mode without gradients: `ctx.previous` of the next step."""
    frozen = copy.deepcopy(model)
    frozen.skip_frozen_heads = False
    return frozen.eval().requires_grad_(False)


def count_parameters(module: nn.Module, trainable: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)


def autograd_off(condition: bool) -> torch.set_grad_enabled:
    """Context: no gradients where `condition` holds, else as outside."""
    return torch.set_grad_enabled(torch.is_grad_enabled() and not condition)
