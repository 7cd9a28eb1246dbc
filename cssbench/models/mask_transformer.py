"""Segmenter's mask transformer on a plain ViT, one per step: class embeddings and patch tokens attend to each other;
the cosine of their projections is the class map.

Source: Strudel et al. 2021, section 3.2, equation 4; where the text leaves things open, the public code: projections
without bias, dropout 0.1 and no stochastic depth in the decoder, class maps normalised over classes before they are
upsampled. (The text puts a softmax before that LayerNorm, and says that the result sums to 1, which it cannot.)
Shapes: B images, L = h w patches, N outputs of one head, C channels of the encoder and of the decoder.
Known deviations: background is an output, as in every per-pixel model here; the encoder's final LayerNorm is fresh
(`Backbone`); class embeddings are decayed like all of a head. The encoder's class token is dropped before block 1,
unless `backbone.prefix_tokens = "keep"`, which is what the public code does.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from cssbench.errors import ModelError
from cssbench.losses.init import balanced_init
from cssbench.losses.pixel import full_precision
from cssbench.models.atm import init_linear
from cssbench.models.linear import LinearViT

ClassNorm = Literal["base", "head", "seen", "scale"]
EPS = 1e-5  # of LayerNorm
INIT_STD = 0.02


class Layer(nn.Module):
    """A ViT's layer (equations 1 to 3): LayerNorm, self-attention, sum; LayerNorm, MLP of 4C with GELU, sum."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(4 * width, width),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.attention_norm(x)).chunk(3, dim=-1)
        )
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout).transpose(1, 2).flatten(2)
        x = x + F.dropout(self.out(mixed), self.dropout, self.training)
        return x + self.mlp(self.mlp_norm(x))


class MaskTransformer(nn.Module):
    """(B, C, h, w) -> (B, N, h, w): cosine of each patch with each class, in [-1, 1]; then `scale` after normalising.

    `weight`, `bias`: (N,), those of the public code's LayerNorm over classes.
    """

    def __init__(self, width: int, outputs: int, layers: int, heads: int, dropout: float):
        super().__init__()
        self.project = nn.Linear(width, width)
        self.classes = nn.Parameter(torch.empty(outputs, width))
        self.layers = nn.ModuleList(Layer(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.patch_projection, self.class_projection = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.weight, self.bias = nn.Parameter(torch.ones(outputs)), nn.Parameter(torch.zeros(outputs))
        for module in (self.project, self.layers):
            module.apply(lambda part: init_linear(part, INIT_STD))
        nn.init.trunc_normal_(self.classes, std=INIT_STD)
        for projection in (self.patch_projection, self.class_projection):
            nn.init.normal_(projection.weight, std=width**-0.5)

    def forward(self, embedding: Tensor) -> Tensor:
        patches = embedding.flatten(2).transpose(1, 2).contiguous()
        classes = self.classes.expand(len(patches), -1, -1)
        x = torch.cat([self.project(patches), classes.to(patches)], dim=1)
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)
        patches, classes = x.split([patches.shape[1], classes.shape[1]], dim=1)
        patches = F.normalize(full_precision(self.patch_projection(patches)), dim=-1)
        classes = F.normalize(full_precision(self.class_projection(classes)), dim=-1)
        return (classes @ patches.transpose(1, 2)).unflatten(2, embedding.shape[-2:])

    def scale(self, maps: Tensor) -> Tensor:
        """(B, N, h, w) -> the same, times weight, plus bias."""
        return maps * self.weight[:, None, None] + self.bias[:, None, None]


def normalise(maps: list[Tensor], over: ClassNorm) -> list[Tensor]:
    """Class maps (B, N_t, h, w) of heads t, minus a mean and over a standard deviation of each patch, taken over

    base   the maps of step 0's head, for all heads alike.
    head   each head's own maps.
    seen   the maps of all heads.
    scale  nothing: the maps are returned.

    With one head the first three are one and the same: LayerNorm over classes, the paper's.
    """
    if over == "scale":
        return maps
    whole = torch.cat(maps, dim=1)
    samples = {"base": [maps[0]] * len(maps), "head": maps, "seen": [whole] * len(maps)}[over]
    result = []
    for found, sample in zip(maps, samples, strict=True):
        variance, mean = torch.var_mean(sample, dim=1, correction=0, keepdim=True)
        result.append((found - mean) * (variance + EPS).rsqrt())
    return result


class MaskTransformerViT(LinearViT):
    """Tokens of the last tap -> final LayerNorm -> one mask transformer per step -> class maps made comparable.

    With one step, Segmenter as published. Later heads share nothing with it: own projection, layers, class embeddings,
    which see the patches and one another, not the classes of other heads. A frozen head's outputs stay bit-equal as
    steps are added, but for `class_norm = "seen"`.
    """

    class Config(LinearViT.Config):
        """decoder_layers, decoder_heads: of each mask transformer.

        class_norm: the LayerNorm over classes when heads are added. Its weight and bias are per output in any case.
            "base": mean and deviation of step 0's outputs, for every head. Old outputs do not depend on new ones, and a
            step of one class learns. "head": each head's own; a head then says at every patch that one of its classes
            stands out, two outputs are +1 and -1, and a head of one output is refused, since it could say nothing.
            "seen": those of all classes so far, the LayerNorm of one big head: old outputs move as classes are added.
            "scale": no statistics, only weight, which starts at sqrt(C) (the cosine of random directions then has
            deviation 1), and bias: not the paper's even with one step.
        The rest as in `LinearViT.Config`.
        """

        decoder_layers: PositiveInt = 2
        decoder_heads: PositiveInt | None = Field(
            None, description="attention heads; None: one for 64 channels, as in the paper, and at least one"
        )
        dropout: float = Field(0.1, ge=0, lt=1, description="in the decoder: 0.1 in the public code, 0 in the text")
        class_norm: ClassNorm = "base"

    config: Config

    def __init__(self, config: MaskTransformerViT.Config):
        super().__init__(config)
        self.attention_heads = config.decoder_heads or max(1, self.width // 64)
        if self.width % self.attention_heads:
            raise ModelError(
                f"A mask transformer of width {self.width} does not divide into {self.attention_heads} attention "
                f"heads. Set model.decoder_heads to a divisor of {self.width}."
            )

    def make_head(self, outputs: int) -> MaskTransformer:
        config = self.config
        if config.class_norm == "head" and outputs == 1:
            raise ModelError(
                "This step brings one class, and model.class_norm = 'head' normalises each head's outputs by "
                "themselves: one alone would be constant. Set model.class_norm to 'base', 'seen' or 'scale'."
            )
        head = MaskTransformer(self.width, outputs, config.decoder_layers, self.attention_heads, config.dropout)
        if config.class_norm == "scale":
            nn.init.constant_(head.weight, self.width**0.5)
        return head

    def classify(self, embedding: Tensor) -> Tensor:
        heads: list[MaskTransformer] = list(self.heads)  # type: ignore[arg-type]
        maps = normalise([head(embedding) for head in heads], self.config.class_norm)
        return torch.cat([head.scale(found) for head, found in zip(heads, maps, strict=True)], dim=1)

    @torch.no_grad()
    def init_from_background(self) -> None:
        """MiB's start of a step: the newest head copies step 0's, its N class embeddings are background's, and they
        share background's probability evenly with it.

        Exact but for attention, where an embedding sees the others of its head, and the new head has other ones:
        without it the probability of every old class would stay what it was. With `class_norm = "seen"` all move.
        Raises ModelError with "head", where equal outputs are normalised to 0, whatever the background's were.
        """
        if self.config.class_norm == "head":
            raise ModelError(
                "With model.class_norm = 'head' new classes cannot start as the background: a head of equal outputs "
                "is normalised to zero. Set method.balanced_init = false, or model.class_norm = 'base'."
            )
        first, newest = self.heads[0], self.heads[-1]
        assert isinstance(first, MaskTransformer)
        assert isinstance(newest, MaskTransformer)
        per_class = {"classes": first.classes, "weight": first.weight, "bias": first.bias}
        count = len(newest.bias)
        shared = {name: value for name, value in first.state_dict().items() if name not in per_class}
        newest.load_state_dict(shared, strict=False)
        embedding, bias, background = balanced_init(first.classes[0], first.bias[0], count)
        newest.classes.copy_(embedding)
        newest.weight.copy_(first.weight[0].expand(count))
        newest.bias.copy_(bias)
        first.bias[0] = background
