"""A scenario of cssbench in Continuum. Needs `pip install "cssbench[continuum]"`."""

from torch.utils.data import DataLoader

from cssbench import scenario
from cssbench.data.synthetic import Synthetic
from cssbench.interop.continuum import to_continuum

data = Synthetic("data", classes=20, size=32, train=120, val=12)
scene = scenario.load("synthetic-10-5")
for step, taskset in enumerate(to_continuum(scene, data)):
    images, labels, tasks = next(iter(DataLoader(taskset, batch_size=8)))
    print(f"step {step}: {len(taskset)} images {tuple(images.shape[1:])}, labels {labels.unique().tolist()}")
