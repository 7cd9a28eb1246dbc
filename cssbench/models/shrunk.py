"""Shrunk: SegViT on an encoder that goes on with a quarter of its tokens, or with those and the ones at edges.

Source: Zhang et al. 2022, section 3.3, and its public code; thesis section 4.2.2. Down-sampling keeps the pre-trained
weights of the ViT as they are (`cssbench.models.shrink`); up-sampling restores the 1/16 grid for a single ATM stage,
every layer of which is supervised. Everything but the ATM belongs to the encoder: later steps grow an ATM alone, and
SegViT-CL freezes the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from cssbench.errors import ModelError
from cssbench.models.atm import ATMConfig, ATMHead, ATMLayer, MaskPrediction, head_width, init_linear
from cssbench.models.backbone import BackboneConfig, to_map
from cssbench.models.edges import EdgeConfig, EdgeHead, edge_loss, edge_truth, predicted_edges
from cssbench.models.packed import Packed, check_block, pack, whole
from cssbench.models.ragged_attention import Attention
from cssbench.models.segmenter import Encoded, autograd_off
from cssbench.models.segvit import MaskOutput, SegViT
from cssbench.models.shrink import (
    ConvDown,
    QueryForm,
    QueryStart,
    QueryUpsampler,
    half,
    sparse_cells,
    sparse_grid,
    subsample,
)
from cssbench.scenario import Step


@dataclass
class ShrunkOutput(MaskOutput):
    """edges: (B, L, 2) logits of the edge head, or None without EQD."""

    edges: Tensor | None = None


class ShrunkHead(ATMHead):
    """A single ATM stage without projection on the up-sampled tokens (B, L, d); one prediction per layer, not summed.

    The last one is for inference (public code).
    """

    def __init__(self, num_classes: int, encoder_width: int, config: ATMConfig):
        super().__init__(num_classes, encoder_width, 0, config)
        width = head_width(config, encoder_width)
        self.layers = nn.ModuleList(ATMLayer(width, config) for _ in range(config.layers))
        self.layers.apply(lambda module: init_linear(module, config.init_std))

    def forward(self, taps: list[Tensor], grid: tuple[int, int]) -> list[MaskPrediction]:
        queries = self.tokens.weight.repeat(len(taps[0]), 1, 1)
        outputs = []
        for layer in self.layers:
            queries, similarity = layer(queries, taps[0])
            outputs.append(MaskPrediction(similarity.unflatten(2, grid), self.classifier(queries)))
        return outputs


class Shrunk(SegViT):
    """Options in `Config`. Loss: that of SegViT, and at step 0 the edge loss of EQD."""

    class Config(SegViT.Config):
        """The options of SegViT, except that `backbone.layers` is the last block alone.

        Table 4.9: `down_on = "query"` with `down_by = "nearest"` is the paper's, with `"conv"` its learnable variant;
        `"all"` down-samples query, key and value, which is the plain block on down-sampled tokens: the naive form.
        """

        backbone: BackboneConfig = BackboneConfig(layers=[12])
        down_layer: NonNegativeInt = Field(6, description="0-based block that down-samples: 6 for ViT-B, 8 for ViT-L")
        down_on: Literal["query", "all"] = "query"
        down_by: Literal["nearest", "conv"] = "nearest"
        edges: EdgeConfig | None = Field(None, description="EQD: tokens at edges are kept beside the 2x2 grid")
        attention: Attention = Field(
            "auto", description="of images with different numbers of tokens (EQD): see `ragged_attention.attend`"
        )
        upsample: bool = Field(True, description="query-based up-sampling (QU); without it masks are of 1/32")
        upsample_layers: PositiveInt = Field(3, description="decoder layers of QU per tap")
        upsample_queries: QueryForm = Field(
            "tied", description="QU's queries at other grids than image_size's: refused (public code), or resized"
        )
        upsample_start: QueryStart = Field(
            "learned",
            description="QU starts from learned queries (the paper's), or from these and the shallow tap: an encoder "
            "from scratch needs it",
        )

    def __init__(self, config: Shrunk.Config):
        super().__init__(config)
        self.config: Shrunk.Config
        self._check()
        width = self.backbone.width
        self.down = ConvDown(width) if config.down_by == "conv" else None
        self.edge_head = EdgeHead(width) if config.edges else None
        self.upsampler = None
        if config.upsample:
            side = config.backbone.image_size
            layers = config.head.model_copy(update={"layers": config.upsample_layers})
            grid = self.backbone.grid(side, side)
            self.upsampler = QueryUpsampler(
                width,
                head_width(config.head, width),
                grid,
                layers,
                config.upsample_queries,
                config.upsample_start,
            )

    def _check(self) -> None:
        config, depth = self.config, len(self.backbone.vit.blocks)
        if len(config.backbone.layers) != 1:
            raise ModelError(
                f"model.backbone.layers is {list(config.backbone.layers)}; model 'shrunk' reads the last block and the "
                f"one before model.down_layer. Give the last block alone, such as [{depth}]."
            )
        if config.down_layer >= depth:
            raise ModelError(f"model.down_layer is {config.down_layer}; expected 0 to {depth - 1}, a block of the ViT.")
        self.backbone.refuse_checkpointing("shrunk")
        if config.backbone.prefix_tokens != "drop":
            raise ModelError("Model 'shrunk' drops class and register tokens: set model.backbone.prefix_tokens='drop'.")
        if config.edges and not config.upsample:
            raise ModelError("model.edges keeps tokens off any grid; only model.upsample = true restores one.")
        if config.edges and (config.down_on, config.down_by) != ("query", "nearest"):
            raise ModelError("model.edges needs model.down_on = 'query' and model.down_by = 'nearest'.")
        if config.edges and config.edges.layer > config.down_layer:
            raise ModelError(
                f"model.edges.layer is {config.edges.layer}, but block model.down_layer = {config.down_layer} drops "
                f"tokens by what the edge head says: expected 0 to {config.down_layer}."
            )
        side = config.backbone.image_size
        for block in self.backbone.blocks_at(self.backbone.grid(side, side)):
            check_block(block)

    def grow(self, step: Step) -> None:
        """Also freezes the edge head after step 0: a later step labels its own classes only, hides all other edges."""
        super().grow(step)
        if self.edge_head is not None and step.index > 0:
            self.edge_head.requires_grad_(False)

    def training_inputs(self, labels: Tensor) -> dict[str, Tensor]:
        """Teacher forcing: the edges of the label map, at step 0; later labels show the step's own classes only."""
        edges = self.config.edges
        if edges is None or edges.select == "predicted" or len(self.heads) > 1:
            return {}
        return {"edges": edge_truth(labels, self.backbone.patch, edges.truth)}

    def make_head(self, num_classes: int) -> ATMHead:
        if self.upsampler is None:
            return super().make_head(num_classes)
        return ShrunkHead(num_classes, self.backbone.width, self.config.head)

    def encode(self, images: Tensor, edges: Tensor | None = None) -> Encoded:
        """edges: (B, L) bool, tokens to keep beside the grid instead of the predicted ones (teacher forcing)."""
        size = (images.shape[-2], images.shape[-1])
        grid = self.backbone.grid(*size)
        with autograd_off(self.is_frozen(self.backbone)):
            shallow, deep, logits = self._encode(images, grid, edges)
            if self.upsampler is not None:
                final = self.upsampler(shallow, deep, grid)
            else:
                final = deep.tokens.unflatten(0, (len(images), -1))
        depths = torch.where(self._goes_on(grid, logits, edges), len(self.backbone.blocks), self.config.down_layer)
        extra = {"depths": depths.expand(len(images), -1).unflatten(1, grid)}
        return Encoded(size, [shallow, final], extra if logits is None else extra | {"edges": logits})

    def decode(self, encoded: Encoded) -> ShrunkOutput:
        shallow, final = encoded.taps
        grid = self.backbone.grid(*encoded.size)
        final_grid = half(grid) if self.upsampler is None else grid
        stages = self.run_heads(encoded, [final], final_grid)
        features = [to_map(shallow, grid), to_map(final, final_grid)]
        heads: list[ATMHead] = list(self.heads)  # type: ignore[arg-type]
        options = (self.has_background, self.config.pixel_form, self.ce)
        logits, depths = encoded.extra.get("edges"), encoded.extra["depths"]
        return ShrunkOutput(encoded.size, features, stages, heads, *options, edges=logits, depths=depths)

    def _goes_on(self, grid: tuple[int, int], logits: Tensor | None, edges: Tensor | None) -> Tensor:
        """(L,) or (B, L) bool: the tokens that are queries at the down-sampling and after it. A convolution's output
        stands at the first of its four cells. logits: the edge head's; edges: as in `forward`."""
        on_grid = sparse_grid(grid, next(self.parameters()).device)
        if logits is None:
            return on_grid
        assert self.config.edges is not None
        return on_grid | (predicted_edges(logits, self.config.edges.threshold) if edges is None else edges)

    def _encode(
        self, images: Tensor, grid: tuple[int, int], edges: Tensor | None
    ) -> tuple[Tensor, Packed, Tensor | None]:
        """-> tokens before the down-sampling (B, L, C); tokens of the last block; edge logits."""
        config, tokens = self.config, self.backbone.embed(images).contiguous()
        blocks, run, down = self.backbone.blocks_at(grid), self.backbone.run, config.down_layer
        logits = None
        for number in range(down + 1):
            if self.edge_head is not None and config.edges is not None and config.edges.layer == number:
                logits = self.edge_head(tokens)
            if number < down:
                tokens = blocks[number](tokens)
        if logits is not None:
            x = pack(tokens, self._goes_on(grid, logits, edges))
        else:
            x = whole(subsample(tokens, grid) if self.down is None else self.down(tokens, grid), sparse_cells(grid))
        choice = config.attention
        x = run(blocks[down], whole(tokens), x, choice) if config.down_on == "query" else run(blocks[down], x)
        for block in blocks[down + 1 :]:
            x = run(block, x, attention=choice)
        return tokens, x, logits

    def extra_terms(
        self, output: ShrunkOutput, labels: Tensor, chosen: slice, weight: Tensor | None
    ) -> dict[str, Tensor]:
        """With EQD and one head: `edge`."""
        edges = self.config.edges
        if edges is None or len(self.heads) > 1:
            return {}
        assert output.edges is not None
        truth = edge_truth(labels, self.backbone.patch, edges.truth)
        factor = 1.0 if weight is None else weight.mean()
        return {"edge": edges.weight * factor * edge_loss(output.edges, truth)}

    def param_groups(self) -> list[dict[str, Any]]:
        """As of every model, but what is not the ViT (QU, edge head, convolution) learns at the head rate, as in the
        public code, where up-sampling is part of the decoder."""
        own = [m for m in (self.upsampler, self.edge_head, self.down) if m is not None]
        moved = {id(p) for module in own for p in module.parameters() if p.requires_grad}
        groups = super().param_groups()
        found = [p for group in groups for p in group["params"] if id(p) in moved]
        for group in groups:
            group["params"] = [p for p in group["params"] if id(p) not in moved]
            if group.get("head"):
                group["params"] = [*found, *group["params"]]
        return [group for group in groups if group["params"]]
