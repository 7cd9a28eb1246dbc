"""Turn the transcription of the papers' tables into published rows. Command:

    python bench/paper_numbers.py reference/paper_numbers.yaml --out reports/published

writes `zhang_thesis.yaml` (the tables of continual segmentation) and one file per paper with its tables of ordinary
segmentation (mIoU and GFLOPs). Numbers are copied as decimals, digit by digit; tests/test_published.py compares the
committed files with what this makes of the transcription. Left out: claims in words, figures without numbers, sizes of
model variants.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from decimal import Decimal
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from cssbench.reports.literature import Loader

THESIS, MANUSCRIPT, SEGMENTER = "zhang_thesis_dense", "segvit_manuscript", "segmenter"
DEFAULTS = {
    THESIS: {"paper": "Zhang (thesis)", "year": 2023, "source": "scan of the thesis"},
    MANUSCRIPT: {"paper": "Zhang et al. (SegViT)", "year": 2022, "source": "scan of the manuscript"},
    SEGMENTER: {"paper": "Strudel et al. (Segmenter)", "year": 2021, "source": "scan of the paper"},
}
# Key of the transcription -> (paper, table, data set, what all of its rows share).
TABLES: dict[str, tuple[str, str, str | None, dict[str, Any]]] = {
    "thesis_table_4_1_ade20k": (THESIS, "4.1", "ade20k", {}),
    "manuscript_table_1_differences": (MANUSCRIPT, "1", "ade20k", {}),
    "table_4_2_coco_stuff10k": (THESIS, "4.2", "coco-stuff10k", {"crop": 512}),
    "table_4_3_pascal_context": (THESIS, "4.3", "pascal-context", {"crop": 480}),
    "table_4_4_atm_loss": (THESIS, "4.4", "ade20k", {"backbone": "ViT-B", "crop": 512}),
    "table_4_5_layers": (THESIS, "4.5", "ade20k", {"backbone": "ViT-B", "crop": 512}),
    "table_4_6_swin_tiny": (THESIS, "4.6", "ade20k", {"backbone": "Swin-T"}),
    "table_4_7_shrunk_ablation": (THESIS, "4.7", "ade20k", {"backbone": "ViT-B", "crop": 512}),
    "table_4_8_decoders": (THESIS, "4.8", "ade20k", {"backbone": "ViT-B"}),
    "table_4_9_qd_targets": (THESIS, "4.9", "ade20k", {"backbone": "ViT-L"}),
    "table_4_10_pretraining": (THESIS, "4.10", "ade20k", {}),
    "table_5_1_training_schemes": (THESIS, "5.1", "ade20k", {"backbone": "ViT-B", "crop": 512}),
    "table_5_2_threshold": (THESIS, "5.2", "ade20k", {"backbone": "ViT-B", "crop": 512}),
    "table_5_3_setr_vit_b": (THESIS, "5.3", "ade20k", {"method": "SETR", "backbone": "ViT-B"}),
    "table_5_4_positions": (THESIS, "5.4", "ade20k", {"backbone": "ViT-B"}),
    "table_5_5_pruning_method": (THESIS, "5.5", "ade20k", {"backbone": "ViT-B", "p0": Decimal("0.9")}),
    "table_5_6_heads": (THESIS, "5.6", "ade20k", {"backbone": "ViT-B"}),
    "table_5_7_main": (THESIS, "5.7", None, {}),
    "table_5_8_symmetric_downsampling": (THESIS, "5.8", "ade20k", {"backbone": "ViT-B"}),
    "segmenter_seed_002": (SEGMENTER, "", "ade20k", {}),
    "nrd_chapter_3_selected": (THESIS, "", None, {}),
}
MEASURED = ("miou", "gflops", "fps", "segvit_ss", "upernet_ss", "in_acc", "extra_hours", "ims", "head_gflops")
DATASETS = {"ade": "ade20k", "pcontext": "pascal-context", "cocostuff": "coco-stuff10k"}
SCENARIOS = {"s100_50": "ade20k-100-50", "s100_10": "ade20k-100-10"}
NAMES = {"ADE20K": "ade20k", "PASCAL-Context": "pascal-context"}


def thesis(numbers: dict[str, Any]) -> dict[str, Any]:
    """Tables 4.11 and 4.12: one row per method, backbone and scenario; one per group of classes."""
    rows = []
    for line in numbers["table_4_11_css_ade20k_overlapped"]:
        for short, scenario in SCENARIOS.items():
            cells = line[short]
            row = {"method": line["method"], "backbone": line["arch"], "scenario": scenario}
            row |= {"base": cells["old"], "inc": cells["new"], "all": cells["all"]}
            row |= {"avg": cells["avg"]} if "avg" in cells else {}
            if "drop" in cells:
                row["reduction"] = dict(zip(("base", "inc", "all"), cells["drop"], strict=True))
            if row["method"].startswith("Oracle"):
                row |= {"method": "joint", "oracle": True}
            suspect = line.get("suspect", "")
            rows.append(row | ({"note": suspect} if scenario.removeprefix("ade20k-") in suspect else {}))
    table = numbers["table_4_12_forgetting_100_10"]
    shared = {"method": "SegViT-CL", "backbone": "SegViT-ViT-B", "scenario": "ade20k-100-10"}
    columns = zip(*(table[name] for name in ("groups", "first_time", "last_time", "forgetting")), strict=True)
    groups = [
        shared | {"group": "mean" if group == "avg" else group, "first": first, "last": last, "forgetting": lost}
        for group, first, last, lost in columns
    ]
    groups = [row | {"source": "scan of the thesis, table 4.12"} for row in groups]
    defaults = DEFAULTS[THESIS] | {"source": "scan of the thesis, table 4.11", "mode": "overlapped", "protocol": None}
    return {"defaults": defaults, "rows": rows, "forgetting": groups}


def dense(numbers: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Paper -> every other table of it: setting and values apart."""
    found: dict[str, list[dict[str, Any]]] = {paper: [] for paper in DEFAULTS}
    for key, (paper, table, dataset, shared) in TABLES.items():
        for part, line in lines(key, numbers[key]):
            content: dict[str, Any] = {"dataset": dataset, "table": table or part} | shared | line
            if content.pop("only_in", None):  # a row of the manuscript's table 2 that the thesis' 4.2 lacks
                content, home = content | {"table": "2"}, found[MANUSCRIPT]
            else:
                home = found[paper]
            notes = [str(content.pop(name)) for name in ("note", "suspect") if name in content]
            dataset_of, place = content.pop("dataset"), str(content.pop("table"))
            row = {"table": place, "dataset": NAMES.get(dataset_of, dataset_of)}
            row["setting"] = {name: value for name, value in content.items() if not measured(name)}
            row["values"] = {name: value for name, value in content.items() if measured(name) and value is not None}
            home.append(row | ({"note": "; ".join(notes)} if notes else {}))
    return {paper: {"defaults": DEFAULTS[paper], "tables": rows} for paper, rows in found.items()}


def measured(name: str) -> bool:
    return name.startswith(MEASURED) or "gflops" in name or "miou" in name


def lines(key: str, content: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """(table, row) of one entry of the transcription, whatever its form."""
    if key == "table_5_2_threshold":  # columns
        yield from (("", dict(zip(content, cells, strict=True))) for cells in zip(*content.values(), strict=True))
    elif key == "table_5_7_main":  # [mIoU, GFLOPs] of three data sets in a row
        for row in content:
            for place, (short, name) in enumerate(DATASETS.items()):
                line = {k: v for k, v in row.items() if k not in DATASETS and k != "reproduced_gflops"}
                line |= dict(zip(("miou_ss", "gflops"), row[short], strict=True), dataset=name)
                if "reproduced_gflops" in row:
                    line["reproduced_gflops"] = row["reproduced_gflops"][place]
                yield "", line
    elif key == "segmenter_seed_002":
        yield from segmenter(content)
    else:
        yield from (("", row) for row in content)


def segmenter(tables: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield from (("3", row) for row in tables["table_3"])
    yield from (("4", {"model": model, "miou_ss": miou}) for model, miou in tables["table_4_mask"].items())
    for model, (single, multi) in tables["table_6_ade"].items():
        yield "6", {"model": model, "miou_ss": single, "miou_ms": multi}
    for model, miou in tables["table_7_pcontext_ms"].items():
        yield "7", {"model": model, "dataset": "pascal-context", "miou_ms": miou}
    grid = tables["table_2_regularisation_seg_s16"]
    places = product(enumerate(grid["rows_dropout"]), enumerate(grid["cols_drop_path"]))
    for (i, dropout), (j, drop_path) in places:
        yield "2", {"model": "Seg-S/16", "dropout": dropout, "drop_path": drop_path, "miou_ss": grid["miou"][i][j]}
    sizes = tables["table_5_dataset_size"]
    for images, miou in zip(sizes["k_images"], sizes["miou"], strict=True):
        yield "5", {"thousand_images": images, "miou_ss": miou}


class Dumper(yaml.SafeDumper):
    """Decimals as they stand; no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


Dumper.add_representer(Decimal, lambda dumper, value: dumper.represent_scalar("tag:yaml.org,2002:float", str(value)))


def to_yaml(head: str, content: dict[str, Any]) -> str:
    """One line per row."""

    def flow(value: Any) -> str:
        return yaml.dump(value, Dumper=Dumper, default_flow_style=True, sort_keys=False, width=10**6).strip()

    text = f"# {head}\n# Made by bench/paper_numbers.py: change that, or the transcription, and not this file.\n"
    for name, part in content.items():
        text += f"{name}: {flow(part)}\n" if name == "defaults" else f"{name}:\n"
        text += "" if name == "defaults" else "".join(f"  - {flow(row)}\n" for row in part)
    return text


def convert(source: Path) -> dict[str, str]:
    """Transcription -> {file name: content}."""
    numbers = yaml.load(source.read_text(encoding="utf-8"), Loader)
    parts = {"zhang_thesis": to_yaml("Tables 4.11 and 4.12 of the thesis, read from a scan.", thesis(numbers))}
    for paper, content in dense(numbers).items():
        parts[paper] = to_yaml("Tables of ordinary segmentation: mIoU and cost.", content)
    return {f"{name}.yaml": text for name, text in parts.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    for name, content in convert(given.source).items():
        (given.out / name).write_text(content, encoding="utf-8")
        print(given.out / name)
