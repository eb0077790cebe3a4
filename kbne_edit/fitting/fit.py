"""Fit: a separate factor for every feed-forward neuron, from sentence pairs, under a bound on the KL."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..disk.checkpoint import Checkpoint
from ..edit import Edit
from ..errors import InputError
from ..evaluation.measures.halves import HALVED
from ..evaluation.neutral import packaged
from ..families import SITES, Site
from ..files import forbid_overlap
from ..hub.source import Source, resolved
from ..models import memory
from ..models.loading import load_model
from ..progress import say
from ..used import count_use
from .collect import Reading, collect
from .contrasts import contrast_units
from .directions import Directions, matched
from .everyday import everyday
from .measure_units import forbid_reported, measure_units
from .measured import Held, Matching, Measure, Scaled, scaled
from .passes import Neutral
from .problem import Validation, aimed, best_of, folds, shuffled, validate
from .public import NAMES as PUBLIC
from .public import public_pairs
from .result import Control, Cost, Factors, Fit, Gain
from .rows import PARTS, UnitRows, encode_texts, encode_units
from .store import GradientFile, load_gradients
from .units import Unit, load_pairs, load_units

_EVENS = (0.1, 1.0, 10.0)
_SET_ASIDE = 10  # one fact in ten is set aside: measured and not fitted
_EACH = 4  # one neutral text in so many finds the scale of a control


@dataclass(frozen=True)
class FitSettings:
    """How to fit.

    pairs: types, files, "own" (all types of the language), the public "stereoset" and "crows_pairs", or the fitted half
    of "decisions" and "associations" (None: own). data: folder of the public ones' files.
    part: "association", "sentiment", "prior", "guess" or "all", which is the first three.
    max_kl: nats per token on neutral text. facts, contrasts, texts: numbers to use.
    neurons: number to change (None: all). even: as of `problem` (None: by cross-validation). dtype: "auto" is that
    of the weights. keep_shuffled: also write the edits of shuffled labels beside the edit.
    """

    pairs: tuple[str, ...] | None = None
    data: str | Path | None = None
    language: str = "en"
    part: str = "all"
    max_kl: float = 0.01
    facts: int = 600
    contrasts: int = 600
    texts: int = 300
    neurons: int | None = None
    even: float | None = None
    draws: int = 3
    site: Site = "down"
    seed: int = 0
    keep_shuffled: bool = False
    dtype: str = "auto"
    device: str = "cpu"

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts to lower; the part of public pairs always is."""
        # Not guesses: they cost so little KL that with equal weight they would use up the bound.
        parts = PARTS if self.part == "all" else (self.part,)
        return (*parts, "pair") if self.public else parts

    @property
    def public(self) -> tuple[str, ...]:
        """The public benchmarks among the pairs."""
        return tuple(name for name in self.pairs or () if name in PUBLIC)

    @property
    def measures(self) -> tuple[str, ...]:
        """The measures of the package among the pairs."""
        return tuple(name for name in self.pairs or () if name in HALVED)

    @property
    def own(self) -> tuple[str, ...] | None:
        """Types and files; None: all types of the language."""
        names = tuple(name for name in self.pairs or ("own",) if name not in (*PUBLIC, *HALVED))
        return None if "own" in names else names

    def check(self) -> None:
        """Raise InputError for invalid values."""
        if self.part not in (*PARTS, "guess", "all"):
            raise InputError(f"--part {self.part} is unknown: use {', '.join(PARTS)}, guess or all")
        if self.site not in SITES:
            raise InputError(f"--site {self.site} is unknown: use {' or '.join(SITES)}")
        if not 0 < self.max_kl < 10:
            raise InputError(f"--max-kl {self.max_kl:g}: give nats per token above 0, e.g. 0.01")
        for name in ("facts", "contrasts", "texts", "neurons"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"--{name} {value}: it must be 1 or more")


def fit(source: str, out: str | Path, settings: FitSettings | None = None, gradients: str | Path | None = None) -> Fit:
    """Fit factors to pairs and write the edit to `out`.

    source: directory, ORG/NAME[@REVISION]. gradients: the file that is resumed, or used as it stands (None: beside
    `out`). Raises InputError or a subclass.
    """
    settings = settings or FitSettings()
    settings.check()
    out = Path(out)
    kept = Path(gradients) if gradients else out.with_name(f"{out.stem}.gradients.safetensors")
    with resolved(source, say) as base:
        forbid_overlap(out, base.origin)
        forbid_overlap(kept, base.origin)
        result = _Run(base, Checkpoint.open(base.path), settings).fit(kept)
    result.edit.save(out)
    if settings.keep_shuffled:
        for number, edit in enumerate(result.shuffled, 1):
            edit.save(out.with_name(f"{out.stem}.shuffled{number}.json"))
    return result


class _Run:
    """One fit: units, model, and what is measured."""

    def __init__(self, base: Source, checkpoint: Checkpoint, settings: FitSettings):
        self.base, self.checkpoint, self.settings = base, checkpoint, settings
        self.units, self.contrasts = chosen_units(settings)
        public = public_pairs(settings.public, None if settings.data is None else Path(settings.data))
        self.every = (*self.units, *self.contrasts, *public)
        self.rows = encode_units(checkpoint.path, self.units, self.contrasts, public)
        texts, self.kinds = everyday(settings.texts, settings.seed, settings.language)
        self.texts = encode_texts(checkpoint.path, texts)
        self.neutral_texts = encode_texts(checkpoint.path, packaged(settings.language))
        aside = folds(self.every, _SET_ASIDE) == 0
        self.fitted, self.aside = np.flatnonzero(~aside), np.flatnonzero(aside)
        if not len(self.aside) or len(self.fitted) < 40:
            raise InputError(f"{len(self.every)} units are too few for a fit: give more --pairs or --facts")
        self.sizes = checkpoint.layer_sizes(settings.site)
        self.parts = tuple(part for part in settings.parts if part != "prior" or aimed(self.every).any())
        if not self.parts:
            raise InputError(
                "no fact has a prior that could fall: list the groups that prejudice is aimed at under `targeted`"
            )

    def fit(self, kept: Path) -> Fit:
        settings = self.settings
        dtype = getattr(torch, self._dtype())
        memory.require_room(self.checkpoint, dtype.itemsize)
        model = load_model(self.checkpoint.path, dtype, settings.device)
        self._collect(model, kept)
        directions = Directions(self.every, load_gradients(kept), [len(ids) - 1 for ids in self.texts])
        by = self._validated(directions)
        direction = directions.solve(self.parts, self.fitted, by)
        if settings.neurons is not None:
            directions.restrict(direction.d, settings.neurons)
            direction = directions.solve(self.parts, self.fitted, by)
        neutral = Neutral(model, self.neutral_texts, settings.site)
        some = Neutral(model, self.neutral_texts[::_EACH], settings.site)
        first = scaled(some, direction.d, settings.max_kl, (settings.max_kl / max(direction.cost, 1e-30)) ** 0.5 / 4)
        best = scaled(neutral, direction.d, settings.max_kl, first.s)
        if best.kl == 0:
            raise InputError(f"no factors were found whose KL is at most {settings.max_kl:g}: give a larger --max-kl")
        say(f"fit: {len(self.fitted)} units and contrasts, even {by.even:g}, KL {best.kl:.4f}; measuring the controls")
        alike, shuffles = Matching(neutral, some, best), []
        for seed in range(settings.draws):
            other = directions.solve(self.parts, self.fitted, by, shuffled(self.every, seed))
            start = best.s * (direction.cost / max(other.cost, 1e-30)) ** 0.5
            shuffles.append(alike.scaled(other.d, start))
        measure = Measure(model, settings.site, Held([self.every[i] for i in self.aside], self._rows_aside()))
        controls = [measure.control(f"shuffled labels {i}", edit) for i, edit in enumerate(shuffles, 1)]
        controls += self._others(best, alike, measure, directions.fisher)
        cost = Cost(best.kl, neutral.base.perplexity, best.perplexity)
        result = self._result(by, best, cost, measure.gains(best), controls)
        aside = "".join(map(repr, (self.every[i] for i in self.aside)))
        uses = count_use([kept], hashlib.sha256(aside.encode()).hexdigest(), result.edit.sha256)
        shuffled_edits = tuple(self._edit(control.factors) for control in shuffles)
        result = replace(result, uses=uses, shuffled=shuffled_edits)
        return replace(result, edit=self._recorded(result))

    def _validated(self, directions: Directions) -> Validation:
        """Settings by cross-validation on what is fitted."""
        settings = self.settings
        evens = _EVENS if settings.even is None else (settings.even,)
        every = [validate(directions.system, self.parts, self.fitted, even, settings.max_kl) for even in evens]
        return best_of(every, self.parts)

    def _result(
        self, by: Validation, best: Scaled, cost: Cost, gains: tuple[Gain, ...], controls: Sequence[Control]
    ) -> Fit:
        return Fit(
            edit=self._edit(best.factors),
            parts=self.parts,
            carried=by.carried,
            fitted=int((self.fitted < len(self.units)).sum()),
            contrasts=int(self._contrasts[self.fitted].sum()),
            public=int((self.fitted >= len(self.units) + len(self.contrasts)).sum()),
            set_aside=len(self.aside),
            even=by.even,
            held=by.held,
            factors=Factors.of(best.factors.numpy(), self.sizes),
            cost=cost,
            gains=gains,
            controls=tuple(controls),
        )

    def _others(self, best: Scaled, alike: Matching, measure: Measure, fisher: Tensor) -> list[Control]:
        """Controls that need no labels: other neurons, the inverse, a flattening, each at the KL of `best`."""
        changes = best.factors - 1
        elsewhere = matched(changes, fisher, self.sizes, self.settings.seed)
        temperature, kl = alike.flattening()
        return [
            measure.control("matched neurons", alike.scaled(elsewhere)),
            measure.control("inverse", alike.scaled(-changes)),
            measure.control("flattening", Scaled(torch.ones_like(changes), kl, math.nan), temperature),
        ]

    @property
    def _contrasts(self) -> np.ndarray:
        place = np.arange(len(self.every)) - len(self.units)
        return (place >= 0) & (place < len(self.contrasts))

    def _rows_aside(self) -> list[UnitRows]:
        return [self.rows[i] for i in self.aside]

    def _dtype(self) -> str:
        if self.settings.dtype != "auto":
            return self.settings.dtype
        declared = self.checkpoint.config.get("dtype") or self.checkpoint.config.get("torch_dtype")
        return "bfloat16" if declared == "bfloat16" else "float32"

    def _collect(self, model: nn.Module, kept: Path) -> None:
        reading = Reading(self.rows, self.texts, self.kinds, self.settings.seed)
        about = {
            "model": self.base.id,
            "base": self.checkpoint.fingerprint(),
            "site": self.settings.site,
            "seed": self.settings.seed,
            "dtype": self._dtype(),
            "sentences": _digest(self.rows, self.texts, self.kinds),
        }
        file = GradientFile(kept, reading.sizes(sum(self.sizes)), reading.place, about)
        try:
            collect(model, self.settings.site, reading, file)
        finally:
            file.close()

    def _edit(self, factors: Tensor) -> Edit:
        parts = factors.split(self.sizes)
        changed = {
            layer: {i: float(part[i]) for i in torch.nonzero(part != 1)[:, 0].tolist()}
            for layer, part in enumerate(parts)
        }
        return Edit(self.settings.site, changed, self.checkpoint.fingerprint())

    def _recorded(self, fitted: Fit) -> Edit:
        """The edit of a fit, with a record of the fit."""
        record = fitted.record(self.settings.part, self.settings.max_kl, self.settings.seed)
        measures = {"measures": list(self.settings.measures)} if self.settings.measures else {}
        return replace(fitted.edit, found={"fit": record.to_dict()} | measures)


def chosen_units(settings: FitSettings) -> tuple[tuple[Unit, ...], tuple[Unit, ...]]:
    """(units, contrasts): seeded samples of the sizes in the settings, with equal shares of all types."""
    units = tuple(unit for name in settings.measures for unit in measure_units(name, settings.language))
    if settings.own == ():
        return _drawn(units, settings.facts, settings.seed), ()
    units += load_units(settings.own, language=settings.language)
    if settings.pairs:  # a file may hold anything
        forbid_reported(units, settings.language)
    contrasts = contrast_units(load_pairs(settings.own, settings.language))
    return _drawn(units, settings.facts, settings.seed), _drawn(contrasts, settings.contrasts, settings.seed)


def _drawn(units: Sequence[Unit], count: int, seed: int) -> tuple[Unit, ...]:
    """Types take turns, so that shares are equal until a type is exhausted."""
    rng = np.random.default_rng(seed)
    by_type: dict[str, list[int]] = {}
    for i in rng.permutation(len(units)).tolist():
        by_type.setdefault(units[i].type, []).append(i)
    turns = sorted((turn, name, i) for name, indices in by_type.items() for turn, i in enumerate(indices))
    return tuple(units[i] for i in sorted(i for *_, i in turns[:count]))


def _digest(rows: Sequence[UnitRows], texts: Sequence[Sequence[int]], kinds: Sequence[str]) -> str:
    """SHA-256 of everything that the model reads: it differs for other units, another tokenizer or template."""
    content = [[(s.ids, s.weights) for s in unit.sentences] for unit in rows], [list(ids) for ids in texts], list(kinds)
    return hashlib.sha256(repr(content).encode()).hexdigest()
