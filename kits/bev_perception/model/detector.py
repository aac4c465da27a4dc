"""BEVFormer (Li 2022) in plain PyTorch, right for any batch, with the memory as an explicit input and output.

The layers have the names and the order of the official implementation (github.com/fundamentalvision/BEVFormer), so
that its checkpoints load as they are. Letters: B batch, N cameras, C channels, Q = bev_h * bev_w BEV cells in rows,
O object queries, L decoder layers, K classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from core.kit import InputError
from kits.bev_perception.model import geometry
from kits.bev_perception.model.backbone import FPN, ResNet
from kits.bev_perception.model.configs import Config
from kits.bev_perception.model.decoder import Decoder, Queries, place
from kits.bev_perception.model.encoder import Encoder, History
from kits.bev_perception.model.fusion import Fusion
from kits.bev_perception.model.lift import Distances, Far, atlas, told
from kits.bev_perception.model.proposals import Dense, Proposals

CODE_WEIGHTS = (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.2, 0.2)
CAN_BUS = 18
INPUTS = ("images", "lidar2img", "can_bus", "prev_bev", "has_prev", "camera_mask")
"""The inputs of `BEVFormer.forward`, in its order: names for an exported graph."""
OUTPUTS = ("cls_scores", "bbox_preds", "bev")


@dataclass(frozen=True)
class Predictions:
    """Logits (L, B, O, K) and box codes (L, B, O, 10) of every decoder layer.

    A code is cx, cy, log w, log l, cz, log h, sin, cos, vx, vy in metres, radians and metres a second.
    """

    cls_scores: Tensor
    bbox_preds: Tensor


class GridPosition(nn.Module):
    """A learnt position of every cell (Q, C): half of it of its column, half of its row."""

    def __init__(self, bev_h: int, bev_w: int, half: int) -> None:
        super().__init__()
        self.row_embed = nn.Embedding(bev_h, half)
        self.col_embed = nn.Embedding(bev_w, half)
        nn.init.uniform_(self.row_embed.weight)
        nn.init.uniform_(self.col_embed.weight)

    def forward(self) -> Tensor:
        row, column = self.row_embed.weight, self.col_embed.weight
        (h, half), w = row.shape, column.shape[0]
        return torch.cat((column.expand(h, w, half), row[:, None].expand(h, w, half)), -1).reshape(h * w, 2 * half)


class Transformer(nn.Module):
    """Encoder, decoder, and what tells levels, cameras and the car's motion apart."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        dims = config.embed_dims
        self.level_embeds = nn.Parameter(torch.randn(config.num_feature_levels, dims))
        self.cams_embeds = nn.Parameter(torch.randn(config.num_cams, dims))
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        if not config.proposals:
            self.reference_points = nn.Linear(dims, 3)
            nn.init.xavier_uniform_(self.reference_points.weight)
            nn.init.zeros_(self.reference_points.bias)
        self.can_bus_mlp = nn.Sequential(
            nn.Linear(CAN_BUS, dims // 2), nn.ReLU(), nn.Linear(dims // 2, dims), nn.ReLU()
        )
        self.can_bus_mlp.add_module("norm", nn.LayerNorm(dims))


class Head(nn.Module):
    """From image features to boxes. Geometry that depends on the sizes alone is kept in buffers that are not stored."""

    cells: Tensor
    pillars: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        dims, classes = config.embed_dims, len(config.classes)
        self.code_weights = nn.Parameter(torch.tensor(CODE_WEIGHTS), requires_grad=False)
        self.positional_encoding = GridPosition(config.bev_h, config.bev_w, dims // 2)
        self.transformer = Transformer(config)
        self.cls_branches = nn.ModuleList(_classifier(dims, classes) for _ in range(config.decoder_layers))
        self.reg_branches = nn.ModuleList(_regressor(dims) for _ in range(config.decoder_layers))
        self.bev_embedding = nn.Embedding(config.bev_h * config.bev_w, dims)
        self.proposals = Proposals(config) if config.proposals else None
        self.distances = Distances(dims, config.depth_bins) if config.depth_bins else None
        self.fusion = Fusion(dims) if config.fusion else None
        if not config.proposals:
            self.query_embedding = nn.Embedding(config.num_query, 2 * dims)
        low, size = torch.tensor(config.pc_range[:3]), torch.tensor(config.extent)
        self.register_buffer("cells", geometry.cells(config.bev_h, config.bev_w), persistent=False)
        self.register_buffer("pillars", geometry.pillars(config) * size + low, persistent=False)

    def encode(
        self,
        features: tuple[Tensor, ...],
        lidar2img: Tensor,
        can_bus: Tensor,
        prev_bev: Tensor,
        has_prev: Tensor,
        camera_mask: Tensor,
        image_shape: tuple[int, int],
        distances: Tensor | None = None,
    ) -> Tensor:
        """Features (B, N, C, h, w) of every level -> the BEV (B, Q, C); the rest as in `BEVFormer.forward`.

        `distances` are what `self.distances` says of the finest level, where that is known already.
        """
        config, transformer = self.config, self.transformer
        moved_by = transformer.can_bus_mlp(can_bus)
        query = self.bev_embedding.weight + moved_by[:, None]
        position = self.positional_encoding().expand_as(query)
        turned = geometry.rotate(prev_bev, can_bus[:, 17], config.bev_h, config.bev_w, config.rotate_center)
        history = History(turned, geometry.shift(can_bus, config.extent), (has_prev > 0.5)[:, None, None])
        points, inside, depth = geometry.project(self.pillars, lidar2img, image_shape)
        depth = told(depth, lidar2img, image_shape[1])
        views = geometry.views(points, inside, depth, camera_mask, config.cameras_per_query)
        far = None
        if self.distances is not None:
            if distances is None:
                distances = self.distances(features[0], lidar2img, image_shape)
            far = Far(atlas(distances), config.depth_bins)
        images = torch.cat(
            [
                f.flatten(3).transpose(2, 3) + (transformer.cams_embeds[:, None] + transformer.level_embeds[level])
                for level, f in enumerate(features)
            ],
            2,
        )
        shapes = [(int(f.shape[-2]), int(f.shape[-1])) for f in features]
        bev = transformer.encoder(query, position, self.cells, history, images, shapes, views, far)
        if self.fusion is None:
            return bev
        before = torch.where(history.known[..., None], geometry.aligned(prev_bev, can_bus, config), 0.0)
        return self.fusion(bev, before)

    def dense(self, bev: Tensor) -> Dense | None:
        """What the dense head says of a BEV (B, Q, C); None where the queries are learnt ones."""
        return self.proposals(bev) if self.proposals is not None else None

    def queries(self, bev: Tensor, dense: Dense | None = None) -> Queries:
        """The object queries for a BEV (B, Q, C): from its dense head, or learnt ones, the same for every sample."""
        if self.proposals is not None:
            return self.proposals.queries(dense if dense is not None else self.proposals(bev))
        position, content = self.query_embedding.weight.chunk(2, -1)
        reference = self.transformer.reference_points(position).sigmoid()
        return Queries(*(t.expand(bev.shape[0], -1, -1) for t in (content, position, reference)))

    def decode(self, bev: Tensor, queries: Queries, *, last_only: bool = False) -> Predictions:
        """BEV (B, Q, C) and queries -> what every decoder layer predicts (with `last_only`, L is 1)."""
        states, references = self.transformer.decoder(queries, bev, self.reg_branches)
        layers = range(len(states))[-1:] if last_only else range(len(states))
        scores = [self.cls_branches[i](states[i]) for i in layers]
        boxes = [place(self.reg_branches[i](states[i]), references[i], self.config)[0] for i in layers]
        return Predictions(torch.stack(scores), torch.stack(boxes))


class BEVFormer(nn.Module):
    """Six cameras and the memory -> boxes and the new memory.

    `forward` is what is deployed: tensors in, tensors out, shapes that do not depend on the data. `predict` gives
    every decoder layer, for training.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        _check(config)
        self.config = config
        self.pts_bbox_head = Head(config)
        self.img_backbone = ResNet(config.backbone)
        channels = [self.img_backbone.channels[i] for i in config.backbone.out_indices]
        self.img_neck = FPN(channels, config.embed_dims, config.backbone.levels)

    def features(self, images: Tensor) -> tuple[Tensor, ...]:
        """Images (B, N, 3, H, W) -> the levels (B, N, C, h, w)."""
        B, N = images.shape[:2]
        maps = self.img_neck(self.img_backbone(images.flatten(0, 1)))
        return tuple(m.unflatten(0, (B, N)) for m in maps)

    def encode(
        self,
        images: Tensor,
        lidar2img: Tensor,
        can_bus: Tensor,
        prev_bev: Tensor,
        has_prev: Tensor,
        camera_mask: Tensor,
    ) -> Tensor:
        """The new memory (B, Q, C) of the inputs of `forward`."""
        shape = (int(images.shape[-2]), int(images.shape[-1]))
        return self.pts_bbox_head.encode(
            self.features(images), lidar2img, can_bus, prev_bev, has_prev, camera_mask, shape
        )

    def forward(
        self,
        images: Tensor,
        lidar2img: Tensor,
        can_bus: Tensor,
        prev_bev: Tensor,
        has_prev: Tensor,
        camera_mask: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The boxes of the last layer and the memory: logits (B, O, K), codes (B, O, 10), bev (B, Q, C).

        images (B, N, 3, H, W): normalised and padded, see `configs.Images`.
        lidar2img (B, N, 4, 4): LiDAR metres to pixels of these images.
        can_bus (B, 18): as `state.BevState` gives it, with the motion since the frame of `prev_bev`.
        prev_bev (B, Q, C): the memory of the frame before as it was put out; anything finite where there is none.
        has_prev (B,): 1 where `prev_bev` is to be used, 0 where a scene begins.
        camera_mask (B, N): 1 for a camera that is there, 0 for one to be ignored.
        """
        bev = self.encode(images, lidar2img, can_bus, prev_bev, has_prev, camera_mask)
        head = self.pts_bbox_head
        found = head.decode(bev, head.queries(bev), last_only=True)
        return found.cls_scores[0], found.bbox_preds[0], bev


def _check(config: Config) -> None:
    C, heads = config.embed_dims, config.heads
    for wrong, why in (
        (C % heads or C % 2, f"embed_dims {C} is no multiple of 2 and of heads {heads}"),
        (
            config.spatial_points % config.points_in_pillar,
            f"spatial_points {config.spatial_points} is no multiple of points_in_pillar {config.points_in_pillar}",
        ),
        (
            config.backbone.levels > config.num_feature_levels,
            f"num_feature_levels {config.num_feature_levels} is below backbone.levels {config.backbone.levels}",
        ),
        (
            config.pillar_heights is not None and config.points_in_pillar != 4 * len(config.pillar_heights),
            f"points_in_pillar {config.points_in_pillar} is not 4 for each of pillar_heights {config.pillar_heights}",
        ),
        (config.images.height % 32 or config.images.width % 32, "images must be padded to multiples of 32 pixels"),
    ):
        if wrong:
            raise InputError(f"config {config.name!r}: {why}; mend it")


def _classifier(dims: int, classes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(2):
        layers += [nn.Linear(dims, dims), nn.LayerNorm(dims), nn.ReLU()]
    last = nn.Linear(dims, classes)
    # to begin with every class has the probability 0.01
    nn.init.constant_(last.bias, -math.log((1 - 0.01) / 0.01))
    return nn.Sequential(*layers, last)


def _regressor(dims: int) -> nn.Sequential:
    hidden: list[nn.Module] = []
    for _ in range(2):
        hidden += [nn.Linear(dims, dims), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(dims, 10))


def empty_memory(config: Config, batch: int = 1) -> Tensor:
    """A memory (B, Q, C) of zeros, for `has_prev` 0."""
    return torch.zeros(batch, config.bev_h * config.bev_w, config.embed_dims)


def example_inputs(config: Config, batch: int = 1, seed: int = 0) -> dict[str, Tensor]:
    """Random inputs of `BEVFormer.forward` by name, with a ring of cameras that see the grid."""
    generator = torch.Generator().manual_seed(seed)
    height, width, N = config.images.height, config.images.width, config.num_cams
    focal = 0.7 * width
    matrices = []
    for camera in range(N):
        angle = 2 * math.pi * camera / N
        ahead, right = (math.sin(angle), math.cos(angle)), (math.cos(angle), -math.sin(angle))
        depth = torch.tensor([*ahead, 0.0, 0.5])
        x = torch.tensor([*right, 0.0, 0.0]) * focal + depth * (width / 2)
        y = torch.tensor([0.0, 0.0, -1.0, 1.5]) * focal + depth * (height / 2)
        matrices.append(torch.stack((x, y, depth, torch.tensor([0.0, 0.0, 0.0, 1.0]))))
    can_bus = torch.zeros(batch, CAN_BUS)
    can_bus[:, 1], can_bus[:, 16], can_bus[:, 17] = 2.0, 1.5, 1.2
    memory = empty_memory(config, batch)
    return {
        "images": torch.randn(batch, N, 3, height, width, generator=generator),
        "lidar2img": torch.stack(matrices).expand(batch, N, 4, 4).clone(),
        "can_bus": can_bus,
        "prev_bev": torch.randn(memory.shape, generator=generator),
        "has_prev": torch.ones(batch),
        "camera_mask": torch.ones(batch, N),
    }


def parameters_of(model: nn.Module) -> int:
    """The number of parameters, those without gradient included."""
    return sum(cast(Tensor, p).numel() for p in model.parameters())
