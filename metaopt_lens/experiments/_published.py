"""Numbers of arXiv:2212.10559 (final version) and arXiv:2311.07772, to be compared with a run on the same task.

Models: Fairseq dense GPT 1.3B and 2.7B. Learning rates and seeds were chosen there by the best validation accuracy.
"""

from __future__ import annotations

from dataclasses import dataclass

_TASKS = ("sst2", "sst5", "mr", "subj", "agnews", "cb")
_MODELS = {"fairseq-dense-1.3b": "1.3B", "fairseq-dense-2.7b": "2.7B"}
_DAI: dict[tuple[str, str], tuple[float, ...]] = {
    ("1.3B", "accuracy ZS"): (70.5, 39.3, 65.9, 72.6, 46.3, 37.5),
    ("1.3B", "accuracy FT"): (73.9, 39.5, 73.0, 77.8, 65.3, 55.4),
    ("1.3B", "accuracy ICL"): (92.7, 45.0, 89.0, 90.0, 79.2, 57.1),
    ("2.7B", "accuracy ZS"): (71.4, 35.9, 60.9, 75.2, 39.8, 42.9),
    ("2.7B", "accuracy FT"): (76.9, 39.1, 80.0, 86.1, 65.7, 57.1),
    ("2.7B", "accuracy ICL"): (95.0, 46.5, 91.3, 90.3, 80.3, 55.4),
    ("1.3B", "Rec2FTP"): (91.84, 66.67, 97.08, 87.17, 83.08, 87.50),
    ("2.7B", "Rec2FTP"): (96.83, 71.60, 95.83, 87.63, 84.44, 100.00),
    ("1.3B", "SimAOU"): (0.110, 0.080, 0.222, 0.191, 0.281, 0.234),
    ("2.7B", "SimAOU"): (0.195, 0.323, 0.157, 0.212, 0.333, 0.130),
    ("1.3B", "SimAM ICL-ZS"): (0.555, 0.391, 0.398, 0.378, 0.152, 0.152),
    ("1.3B", "SimAM ICL-FT"): (0.585, 0.404, 0.498, 0.490, 0.496, 0.177),
    ("2.7B", "SimAM ICL-ZS"): (0.687, 0.380, 0.314, 0.346, 0.172, 0.228),
    ("2.7B", "SimAM ICL-FT"): (0.687, 0.492, 0.347, 0.374, 0.485, 0.217),
    ("1.3B", "Kendall"): (0.192, 0.151, 0.173, 0.181, 0.190, 0.274),
    ("2.7B", "Kendall"): (0.213, 0.177, 0.264, 0.203, 0.201, 0.225),
}
_DEUTCH: dict[tuple[str, str], tuple[float, ...]] = {
    ("gd", "SimAOU"): (0.11, 0.09, 0.22, 0.18, 0.31, 0.21),
    ("lcgd", "SimAOU"): (0.22, 0.11, 0.33, 0.35, 0.33, 0.34),
    ("gd", "SimAOU unnormalised"): (0.05, 0.04, 0.17, 0.06, 0.18, 0.11),
    ("lcgd", "SimAOU unnormalised"): (0.13, 0.11, 0.21, 0.18, 0.13, 0.24),
    ("gd", "SimAM ICL-FT"): (0.59, 0.40, 0.49, 0.45, 0.48, 0.20),
    ("lcgd", "SimAM ICL-FT"): (0.58, 0.39, 0.30, 0.27, 0.12, 0.04),
    ("gd", "SimAM difference"): (0.15, 0.31, 0.14, 0.25, 0.50, 0.25),
    ("lcgd", "SimAM difference"): (0.30, 0.33, 0.26, 0.32, 0.43, 0.38),
}


@dataclass(frozen=True)
class PublishedNumber:
    """One published value for a model and task."""

    quantity: str
    value: float
    source: str


def published_numbers(model: str, task: str, rule: str) -> list[PublishedNumber]:
    """What was published for this model, task and finetuning rule (``gd`` or ``lcgd``); empty if nothing was.

    Args:
        model: its name.
        task: its name.
        rule: ``"gd"`` or ``"lcgd"``.
    """
    size = next((size for name, size in _MODELS.items() if name in model.lower()), None)
    name = task.lower().removesuffix("-one-line").replace("-", "")
    if size is None or name not in _TASKS:
        return []
    column = _TASKS.index(name)
    found = []
    if rule == "gd":
        found += [
            PublishedNumber(quantity, row[column], "Dai et al. 2023")
            for (own_size, quantity), row in _DAI.items()
            if own_size == size
        ]
    if size == "1.3B":
        found += [
            PublishedNumber(quantity, row[column], "Deutch et al. 2024")
            for (own_rule, quantity), row in _DEUTCH.items()
            if own_rule == rule
        ]
    return found
