"""Avalanche's own EWC on a scenario of cssbench. Needs `pip install "cssbench[avalanche]"`."""

from cssbench import scenario
from cssbench.config import AugmentConfig
from cssbench.data.synthetic import Synthetic
from cssbench.interop.avalanche import GrowingModel, MeanIoU, OwnLoss, to_avalanche
from cssbench.models.linear import LinearViT

# isort: split
import torch
from avalanche.logging import TextLogger
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.supervised import EWC

data = Synthetic("data", classes=20, size=32, train=120, val=12)
scene = scenario.load("synthetic-10-5")
vit = {"name": "vit_tiny_patch16_224", "image_size": 32, "patch": 8, "width": 32, "depth": 2, "heads": 2, "layers": [2]}
net = LinearViT(LinearViT.Config(backbone=vit))
benchmark = to_avalanche(scene, data, net, AugmentConfig(crop=32))
model, scores = GrowingModel(net, scene), EvaluationPlugin(MeanIoU(scene, net), loggers=[TextLogger()])
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
how = {"criterion": OwnLoss(net), "ewc_lambda": 10.0, "train_mb_size": 8, "eval_mb_size": 8, "evaluator": scores}
strategy = EWC(model=model, optimizer=optimizer, **how)
for train, test in zip(benchmark.train_stream, benchmark.test_stream, strict=True):
    strategy.train(train)
    print(strategy.eval([test]))
