"""Scoring conventions, named and versioned: from a stored confusion matrix to IoU per class and group means.

"mIoU on ADE20K 100-50" names several conventions in public code; numbers of two of them must not share a table.
A protocol says which test geometry and argmax rule it reads, and what it does with void pixels, with classes not yet
learned, with the background index, and with classes that have no ground truth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cssbench import registry
from cssbench.errors import PluginError, RunError


@dataclass(frozen=True)
class Protocol:
    """One convention: which matrix it reads, and how that becomes IoU per class and means. Ids are `name@version`;
    a change of any rule is a new version.

    geometry: `full` images, or the centre `crop` (see `cssbench.evaluate`).
    rule: `all`, argmax over all outputs, background included (`BACKGROUND_RULE` for a model without that output);
        `foreground`, argmax over the classes alone. Only `all` can score a dataset whose raw 0 is background, a class.
    void: pixels whose truth is void (raw 0): `ignore` leaves them out; `background` scores them as class 0;
        `false-positive` counts them against the class predicted there, but class 0 gets no truth from them. Where raw
        0 is background, a class of the dataset, nothing is void: those pixels are truth of class 0.
    future: pixels whose truth is a class not yet learned: `ignore`, or `background` scores them as class 0.
    background: the means that class 0 stands in: `none`; `all`, the mean of all classes only; `base`, that and base.
    absent: a class without a ground-truth pixel is left out of every mean (`drop`), or counts as IoU 0 (`zero`).
    all_mean: the mean of all classes: over `classes`; over the `nonzero` ones, whose IoU is above 0; or `weighted`,
        (n_base base + n_incremental incremental) / (n_base + n_incremental), n_base counting class 0 even where it
        has no ground truth and so no IoU.
    deviations: where scores from our matrices, or this reading, are known to differ from the public code.
    """

    name: str
    version: int
    geometry: Literal["full", "crop"]
    rule: Literal["all", "foreground"]
    void: Literal["ignore", "background", "false-positive"]
    future: Literal["ignore", "background"]
    background: Literal["none", "all", "base"]
    summary: str
    used_by: str
    absent: Literal["drop", "zero"] = "drop"
    all_mean: Literal["classes", "nonzero", "weighted"] = "classes"
    deviations: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def key(self) -> str:
        """Which matrix of a step it reads."""
        return f"{self.geometry}.{self.rule}"

    def can_score(self, background_class: bool) -> bool:
        """Whether it means anything on a dataset whose raw 0 is background, a class: an argmax over the other classes
        alone never predicts that one."""
        return self.rule == "all" or not background_class

    @property
    def background_in_mean(self) -> bool:
        """Whether class 0 has an IoU that stands in any mean."""
        return self.background != "none"

    def ious(self, matrix: np.ndarray, seen: Sequence[int], background_class: bool = False) -> dict[int, float]:
        """IoU = TP / (GT + PRED - TP) of each scored class id in [0, 1], from one matrix of the whole set.

        matrix: (K+1, K+1) int64, raw class id x predicted class id. background_class: raw 0 is background, a class of
        the dataset, and not void. Returns seen classes (and 0 where
        `background_in_mean`), without those that `absent` drops. A class predicted as background is a miss.
        """
        matrix = np.asarray(matrix)
        if matrix.dtype.kind != "i" or matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise RunError(f"A confusion matrix must be square and of integers, not {matrix.dtype} {matrix.shape}.")
        seen = list(seen)
        if seen and not 0 < min(seen) <= max(seen) < len(matrix):
            raise RunError(f"Classes {min(seen)}..{max(seen)} do not fit a matrix of {len(matrix) - 1} classes.")
        future = np.setdiff1d(np.arange(1, len(matrix)), seen)
        rows = np.zeros_like(matrix)
        rows[seen] = matrix[seen]
        if self.void == "background" or background_class:
            rows[0] += matrix[0]
        if self.future == "background":
            rows[0] += matrix[future].sum(axis=0)
        truth, predicted, hits = rows.sum(axis=1), rows.sum(axis=0), rows.diagonal()
        if self.void == "false-positive" and not background_class:
            predicted = predicted + matrix[0]
        scored = ([0] if self.background_in_mean else []) + seen
        found = {c: float(hits[c] / (truth[c] + predicted[c] - hits[c])) for c in scored if truth[c] > 0}
        return {c: found.get(c, 0.0) for c in scored} if self.absent == "zero" else found

    def scores(
        self, matrix: np.ndarray, groups: Sequence[Sequence[int]], step: int, background_class: bool = False
    ) -> dict[str, float | None]:
        """Means in [0, 1] after step `step`: `base`, `incremental`, `all`, and `group<t>` for every step so far.

        A group without any scored class is None. `base` and `group0` hold the background where `background` says so.
        """
        seen = [c for group in groups[: step + 1] for c in group]
        return self.means(self.ious(matrix, seen, background_class), groups, step)

    def means(self, iou: Mapping[int, float], groups: Sequence[Sequence[int]], step: int) -> dict[str, float | None]:
        """As `scores`, from the IoU of each scored class."""
        first = ([0] if self.background == "base" else []) + list(groups[0])
        later = [c for group in groups[1 : step + 1] for c in group]
        parts = {"base": first, "incremental": later}
        parts |= {f"group{t}": first if t == 0 else list(groups[t]) for t in range(step + 1)}
        found = {name: _mean([iou[c] for c in classes if c in iou]) for name, classes in parts.items()}
        return found | {"all": self._all(iou, parts, found)}

    def _all(
        self, iou: Mapping[int, float], parts: Mapping[str, Sequence[int]], found: Mapping[str, float | None]
    ) -> float | None:
        if self.all_mean == "weighted":
            sizes = {name: len(parts[name]) for name in ("base", "incremental") if found[name] is not None}
            return sum(n * (found[name] or 0.0) for name, n in sizes.items()) / sum(sizes.values()) if sizes else None
        classes = {*parts["base"], *parts["incremental"], *([0] if self.background_in_mean else [])}
        values = [iou[c] for c in sorted(classes) if c in iou]
        return _mean([v for v in values if v > 0] if self.all_mean == "nonzero" else values)

    def explain(self) -> dict[str, str]:
        """What is scored, what is ignored and what the means are over, in words: what -> sentence."""
        return {what: sentences[getattr(self, name)] for (name, what), sentences in WORDS.items()} | {
            "avg": "mean over steps, step 0 included, of the mean of all classes learned by then",
            "used by": self.used_by,
            **({"known deviations": " ".join(self.deviations)} if self.deviations else {}),
        }


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None


BACKGROUND_RULE = (
    "threshold rule: a model without a background output predicts background where no class score reaches "
    "`evaluate.background_threshold` of its recipe (default 0.5)"
)
WORDS = {
    ("geometry", "images"): {
        "full": "full-size images: labels at their own size, the image resized by the recipe, whole or sliding window",
        "crop": "short side resized to `evaluate.crop` (512), then the centre crop of that size; borders are lost",
    },
    ("rule", "prediction"): {
        "all": f"argmax over all outputs, background included; {BACKGROUND_RULE}",
        "foreground": "argmax over the classes alone: a background output or threshold plays no part",
    },
    ("void", "void pixels"): {
        "ignore": "raw 0, ignored",
        "background": "raw 0, scored as background, class 0",
        "false-positive": "raw 0, false positives of the class predicted there, and no truth of class 0",
    },
    ("future", "classes not yet learned"): {
        "ignore": "their pixels are ignored",
        "background": "their pixels are scored as background, class 0",
    },
    ("background", "class 0"): {
        "none": "in no mean: on ADE20K, base of 100-50 has 100 entries, all has 150",
        "all": "in the mean of all classes alone: on ADE20K, base of 100-50 has 100 entries, all has 151",
        "base": "a base class: on ADE20K, base of 100-50 has 101 entries, all has 151",
    },
    ("absent", "classes without ground truth"): {
        "drop": "left out of every mean",
        "zero": "count as IoU 0",
    },
    ("all_mean", "means"): {
        "classes": "over classes, from one matrix of the whole set; all is over all classes learned so far",
        "nonzero": "all is the mean over the classes whose IoU is not 0; base and incremental keep the zeros",
        "weighted": "all is (n_base base + n_incremental incremental) / (n_base + n_incremental), n_base counting "
        "class 0 (on ADE20K: / 151) even where it has no ground truth and so no IoU",
    },
}
_CROP_513 = "The public code crops 513 x 513; our stored crop is `evaluate.crop`, 512 x 512."
_ALL_IMAGES = (
    "The public code scores all 2,000 images at every step; we store the images with a class seen by then, which lacks "
    "void pixels of 3 images at step 0 of ADE20K 50-50 and of none elsewhere."
)

BUILT_IN = (
    Protocol(
        name="mmseg150",
        version=1,
        geometry="full",
        rule="foreground",
        void="ignore",
        future="ignore",
        background="none",
        summary="full-size images; void and classes not yet learned are ignored; the background is no class",
        used_by="SegViT, BalConpas, SimCIS, mmsegmentation",
    ),
    Protocol(
        name="plop",
        version=1,
        geometry="crop",
        rule="all",
        void="background",
        future="background",
        background="base",
        summary="short side 512 and centre crop; void and classes not yet learned are scored as background, a class",
        used_by="PLOP, REMINDER, RCIL, EWF, NeST",
    ),
    Protocol(
        name="mib",
        version=1,
        geometry="crop",
        rule="all",
        void="ignore",
        future="ignore",
        background="none",
        summary="short side 512 and centre crop; void and classes not yet learned are ignored; a class predicted as "
        "background is missed, but the background is no class",
        used_by="MiB 2020",
    ),
    Protocol(
        name="ssul",
        version=1,
        geometry="crop",
        rule="all",
        void="background",
        future="ignore",
        background="base",
        absent="zero",
        summary="centre crop; void is scored as background, a class; classes not yet learned are ignored; classes "
        "without ground truth count as 0",
        used_by="SSUL, MicroSeg, CoinSeg, IPSeg",
        deviations=(
            _CROP_513,
            _ALL_IMAGES,
            "The public code also chooses the checkpoint on the test images; cssbench never does.",
        ),
    ),
    Protocol(
        name="ssul-nonzero",
        version=1,
        geometry="crop",
        rule="all",
        void="background",
        future="ignore",
        background="base",
        absent="zero",
        all_mean="nonzero",
        summary="as ssul, but all is the mean over the classes whose IoU is not 0",
        used_by="MBS, SELECT",
        deviations=(
            _CROP_513,
            _ALL_IMAGES,
            "Base and incremental are those of ssul, zeros included. The code of MBS ignores void at test, which "
            "leaves class 0 without truth, and prints base without class 0.",
        ),
    ),
    Protocol(
        name="dkd",
        version=1,
        geometry="crop",
        rule="foreground",
        void="false-positive",
        future="background",
        background="base",
        all_mean="weighted",
        summary="centre crop; argmax skips the background output; void counts as false positives; classes not yet "
        "learned are truth of class 0, which is never hit; all is weighted as if class 0 stood in base",
        used_by="DKD, STAR",
        deviations=(
            "The public code of DKD and STAR predicts background where no sigmoid exceeds 0.5, here the best class "
            "always wins; its ADE20K recipe ignores classes not yet learned, which matters before the last step only.",
        ),
    ),
    Protocol(
        name="m2f-bg",
        version=1,
        geometry="full",
        rule="all",
        void="background",
        future="background",
        background="all",
        summary="full-size images; void and classes not yet learned are scored as background, a class of the mean of "
        "all but not of base",
        used_by="CoMFormer, ECLIPSE",
        deviations=(
            "The public code counts a class without ground truth as 0 where it is predicted; here it is left out.",
        ),
    ),
)
# What is shown where nobody asked for a protocol: the suite's own, and that of most published tables.
DEFAULTS = ("mmseg150@1", "plop@1")


def catalogue() -> registry.Catalogue[Protocol]:
    """The installed protocols by id (`name@version`), and what is wrong with those that cannot be used."""
    parts, faults = registry.declared("protocols")
    made: registry.Catalogue[Protocol] = registry.Catalogue("protocol", faults=list(faults))
    claims: list[registry.Claim[Protocol]] = []
    for part in parts:
        try:
            claims += _claims(part)
        except PluginError as error:
            made.faults.append(str(error))
    # No new version of a protocol of ours either: `--protocol NAME` means the newest one.
    own = {claim.value.name for claim in claims if claim.distribution == registry.OWN}
    for claim in [c for c in claims if c.distribution != registry.OWN and c.value.name in own]:
        claims.remove(claim)
        made.faults.append(
            f"The protocol {claim.name!r} of the distribution {claim.distribution!r} is not used: {claim.value.name!r} "
            f"is a protocol of cssbench itself. {registry.remedy(claim.distribution, 'Rename it there')}"
        )
    made.settle(sorted(claims, key=lambda claim: claim.distribution != registry.OWN))
    return made


def _claims(part: registry.Part) -> list[registry.Claim[Protocol]]:
    """What one entry point brings. Raises PluginError when it is neither a Protocol nor a tuple of them."""
    loaded = part.load()
    brought = loaded if isinstance(loaded, tuple) else (loaded,)
    # no subclass: to read its id would run a stranger's code
    if not all(type(p) is Protocol and type(p.version) is int and _words(p) for p in brought):
        raise PluginError(
            f"The {part} is {loaded!r}, not a cssbench.api.Protocol or a tuple of them. "
            f"{registry.remedy(part.distribution, f'Let {part.entry_point.value!r} name one')}"
        )
    return [registry.Claim(p.id, part.distribution, part.entry_point.value, p) for p in brought]


def _words(protocol: Protocol) -> bool:
    return all(type(text) is str for text in (protocol.name, protocol.summary, protocol.used_by))


def protocols() -> dict[str, Protocol]:
    """Every usable protocol by id (`name@version`), ours first."""
    return catalogue().found


def get(name: str) -> Protocol:
    """The protocol `name@version`, or the newest version of `name`. Raises UnknownNameError or PluginError."""
    found = catalogue()
    versions = [p for p in found.found.values() if p.name == name]
    return max(versions, key=lambda p: p.version) if versions else found.get(name)
