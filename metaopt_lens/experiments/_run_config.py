"""What a run is: a frozen configuration that goes to JSON and TOML and back, with a fingerprint."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from metaopt_lens._configuration import Count, Different, Flag, NonNegative, Number, Whole, read, read_file, settings
from metaopt_lens.analysis import LabelWords
from metaopt_lens.runs import Scoring
from metaopt_lens.tasks import Selection


def _first_seeds(found: Any) -> Any:
    return tuple(range(found)) if isinstance(found, int) and not isinstance(found, bool) else found


Rule = Literal["gd", "lcgd"]
RULES: tuple[Rule, ...] = ("gd", "lcgd")
Rate = Annotated[Whole | Number, Field(gt=0, description="a positive, finite number")]
LearningRate = Literal["auto"] | Rate
Seeds = Annotated[
    tuple[NonNegative, ...],
    BeforeValidator(_first_seeds),
    Different,
    Field(description="one or several different numbers from 0 on"),
]
_AtLeast2 = Annotated[Whole, Field(ge=2)]
_PLACE = {"place": True}  # where and with what it runs; does not decide the result
_LATER = {"later": True}  # came after runs were stored: decides only where it is not the default


@settings
class RunConfig:
    """Everything that decides the results of a run.

    Attributes:
        model: what `load_model` takes: ``"tiny"``, ``"smollm2"``, a GGUF file, a local folder, a name on the hub.
        task: name of a task, or a TOML file.
        shots: demonstrations, or as many of them as fit the context window.
        seeds: one demonstration set each; a number n stands for seeds 0 to n - 1.
        queries: how many rows to ask; None for all. The same for every seed (but for tasks made by seed).
        lr: learning rate, or ``"auto"``: chosen for every seed and rule on `held_out` rows that are not demonstrations.
        variant: ``"published"`` templates, or ``"one-line"`` ones as in the released code.
        labels: of the demonstrations: ``"natural"``, ``"flipped"`` (every word stands for another one) or ``"neutral"``
            (words that say nothing); with the last two, who follows them is also measured (see `follow_labels`).
        selection, permutation: of demonstrations, see `select_demos`.
        rules: ``"gd"`` (ordinary finetuning) and ``"lcgd"`` (layer-causal).
        epochs: passes over the demonstrations.
        held_out: rows for the choice of the learning rate, at most.
        n_candidates: for open vocabularies: how many outputs each query chooses among; None for all that occur.
        scoring: of label words, ``"mean"`` log-probability of their tokens or the ``"first"`` token's.
        controls: ``"quick"``, ``"standard"`` or ``"sceptic"`` (see `Controls`). The next three take precedence.
        n_label_draws: how often the demonstrations' labels are shuffled; each costs a run of everything, and 0 is none.
        random_weights: also run on permuted weights (costs the model's memory once more and about doubles the time).
        unrelated: also finetune on unrelated texts.
        attribution: also measure what every head's meta-gradient does to the answers, on the first
            `attribution_queries` queries.
        attribution_metric: see `head_effects` (``"auto"``: the logit difference where the label words differ in their
            first token, else the log-probability).
        n_null_draws, subspace_dim: see `compare`.
        further: also ask the further questions of `Controls` (the ceiling, the optimiser ladder, order and company of
            the demonstrations); None for what `controls` says.
        profile: also score every head by several theories of in-context learning, next to its similarity by the first
            rule (see `head_profile`); only what costs no run per head: `attribution` measures the knock-out.
        patch: also fit one weight patch for all queries on the held-out rows, and ask the queries with it (see
            `static_curve`).
        reference: the published code's choices in the metrics (`Convention.PUBLISHED`).
        prepend_bos: put BOS first; None for the model's default.
        dtype: floating-point type of the weights.
        revision: of a model on the hub.
        batch_size: sequences run together; fixed, since sums in another order differ in their last digits.
        save_updates: store the weight updates as well.
        allow_processed: accept a model with folded norms or biases.
        data: local file or folder with the task's rows; None for the hub.
        device, n_devices, device_map: where the model runs; passed to TransformerLens.
        threads: of torch; None for its own choice, but one for models so small that threads only wait for each other.
    """

    model: str
    task: str
    shots: Count = 32
    seeds: Seeds = (0, 1, 2)
    queries: _AtLeast2 | None = None
    lr: LearningRate = "auto"
    variant: Literal["published", "one-line"] = "published"
    labels: LabelWords = "natural"
    selection: Selection = "balanced"
    permutation: Whole = 0
    rules: Annotated[tuple[Rule, ...], Different, Field(description="'gd', 'lcgd' or both")] = RULES
    epochs: Count = 1
    held_out: Count = 32
    n_candidates: _AtLeast2 | None = None
    scoring: Scoring = "mean"
    controls: Literal["quick", "standard", "sceptic"] = "standard"
    n_label_draws: NonNegative | None = None
    random_weights: Flag | None = None
    unrelated: Flag | None = None
    attribution: Flag = True
    attribution_queries: Count = 16
    attribution_metric: Literal["auto", "logit_difference", "label_log_prob"] = "auto"
    n_null_draws: Count = 20
    subspace_dim: Count = 4
    reference: Flag = False
    prepend_bos: Flag | None = None
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    revision: str | None = None
    batch_size: Count = 16
    save_updates: Flag = False
    allow_processed: Flag = False
    data: str | None = field(default=None, metadata=_PLACE)
    device: str | None = field(default=None, metadata=_PLACE)
    n_devices: Count | None = field(default=None, metadata=_PLACE)
    device_map: str | None = field(default=None, metadata=_PLACE)
    threads: Count | None = field(default=None, metadata=_PLACE)
    further: Flag | None = field(default=None, metadata=_LATER)
    profile: Flag = field(default=False, metadata=_LATER)
    patch: Flag = field(default=False, metadata=_LATER)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything but the place where it runs."""
        return hashlib.sha256(json.dumps(self.deciding(), sort_keys=True).encode()).hexdigest()

    def deciding(self) -> dict[str, Any]:
        """The fields that decide the results; those that came later only where they differ from their default."""
        body = self.to_dict()
        return {
            f.name: body[f.name]
            for f in dataclasses.fields(self)
            if not f.metadata.get("place") and not (f.metadata.get("later") and body[f.name] == f.default)
        }

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-able data."""
        return json.loads(json.dumps(dataclasses.asdict(self)))  # type: ignore[no-any-return]

    @classmethod
    def from_dict(cls, body: Mapping[str, Any], *, where: str = "the configuration") -> RunConfig:
        """The reverse of `to_dict`; ``seeds = 3`` means seeds 0, 1, 2.

        Args:
            body: fields and values.
            where: the place that errors name.

        Raises:
            OptionError: an unknown field, a missing one, or a value that makes no sense; `where` names the place.
        """
        return read(cls, body, where=where)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RunConfig:
        """Read a TOML or JSON file.

        Args:
            path: a TOML or JSON file.

        Raises:
            FileFormatError: the file is missing or not valid.
            OptionError: see `from_dict`.
        """
        return cls.from_dict(read_file(path), where=str(path))

    def to_toml(self) -> str:
        """As TOML, which `load` reads; fields that are None are left out."""
        # A JSON string, number, boolean or list of them is also TOML.
        lines = [f"{name} = {json.dumps(value)}" for name, value in self.to_dict().items() if value is not None]
        return "\n".join(lines) + "\n"
