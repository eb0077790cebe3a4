"""The effect of an edit on the recipe's probes, compared with random neurons and with a flattened base.

A twin's score s (`twins`) says which of two groups, or replies, a model prefers. With the aim "balance" |s| should
fall, with "avoid" s itself. An edit has an effect if three conditions hold: the score changes (its 95 % interval over
twins excludes 0); it changes by more than under each of at least 19 draws of random neurons; and by more than in the
flattened base, the base at a temperature with the same KL on neutral text.

If the edit is no better than random, it and its draws are equally likely to be the lowest, so it is below all of 39
draws in 1 of 40 cases. Rejected: an interval of the difference to the mean of a few draws that resamples only probes.
It ignores the spread between draws, and was wrong in 9 to 29 % of the cases.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, Literal, NotRequired, TypedDict

import numpy as np

from ..edit import Edit
from ..errors import InputError
from ..recipe import Probe, Twin
from ..statistics import Interval, IntervalJSON, change, interval
from .dimensions import Change, ChangeJSON, DimensionJSON, OfDimension, by_dimension
from .twins import twin_scores

if TYPE_CHECKING:
    from torch import nn

    from .batched import BaseStates

FEWEST = 6  # twins needed for an effect at 5 %: with five paired items of one sign, p is 1/16
FEWEST_DRAWS = 19  # with fewer, a random edit is below all draws in more than 5 of 100 cases
DRAWS = 39  # a random edit is below all of them in 2.5 of 100 cases
DRAW_TWINS = 24  # twins on which draws are measured: there the spread of draws, not of items, limits the power
DRAWS_AT_ONCE = 4  # if one draw is as good as the edit and one is worse, no more are needed

State = Literal["less", "more", "none"]


@dataclass(frozen=True)
class RandomDraws:
    """As many random neurons in each layer, with the same factors, drawn several times.

    draws: number of draws; twins: number of twins on which they were measured. as_low, as_high: number of draws whose
    mean score is at most (at least) the edit's, on the same twins. signed, absolute: mean change of s and of |s|.
    versus: mean score of the edit minus that of the draws. Intervals include the spread of the draws. lowest, highest:
    of the draws' changes. None: not recorded by earlier versions.
    """

    draws: int
    signed: Interval
    absolute: Interval
    versus: Interval
    twins: int | None = None
    as_low: int | None = None
    as_high: int | None = None
    lowest: float | None = None
    highest: float | None = None

    @property
    def beyond(self) -> int:
        """-1 if the edit is below every draw, 1 if above every draw, 0 if neither, or if there are too few draws."""
        if self.as_low is None or self.draws < FEWEST_DRAWS:
            return 0
        return int(self.as_high == 0) - int(self.as_low == 0)


@dataclass(frozen=True)
class Flattening:
    """The base at a temperature with the edit's KL on neutral text. versus: the edit's mean score minus its.

    temperature: None if no temperature gives this KL; then the edit is compared with a uniform distribution.
    """

    temperature: float | None
    versus: Interval


class EffectJSON(TypedDict):
    """The effect of an edit on the probes. Margins are s, in nats per token; abs: |s|; shares: 0 to 1.

    random_...: under random neurons; versus_random: the edit minus their mean; random_as_low, random_as_high: number of
    draws that reach the edit's score. temperature: of the flattened base, null if none gives the KL.
    """

    aim: str
    probes: int
    twins: int
    stereotype_share: ChangeJSON
    mean_margin: ChangeJSON
    mean_abs_margin: ChangeJSON
    change_abs: IntervalJSON
    change_signed: IntervalJSON
    random_change_abs: IntervalJSON
    random_change_signed: IntervalJSON
    random_draws: int
    versus_random: IntervalJSON
    random_twins: NotRequired[int]
    random_as_low: NotRequired[int]
    random_as_high: NotRequired[int]
    random_lowest: NotRequired[float]
    random_highest: NotRequired[float]
    temperature: NotRequired[float | None]
    versus_flattened: NotRequired[IntervalJSON]
    dimensions: NotRequired[list[DimensionJSON]]
    state: State


@dataclass(frozen=True)
class Effect:
    """The effect of an edit on the probes. Scores are in nats per token.

    aim: "balance" or "avoid". probes: number of pairs of sentences; twins: number of scores, which are resampled.
    preferred: share of twins in which the stereotyped or unwanted side is preferred. signed, absolute: mean s and |s|.
    """

    aim: str
    probes: int
    twins: int
    preferred: Change
    signed: Change
    absolute: Change
    change_signed: Interval
    change_absolute: Interval
    random: RandomDraws
    flattening: Flattening | None = None
    dimensions: tuple[OfDimension, ...] = ()

    def __repr__(self) -> str:
        return f"Effect({self.twins} twins, {self.state}, change {self.change.value:+.4f})"

    @property
    def avoids(self) -> bool:
        """True if the first sentence of a probe should become less probable; else neither should be preferred."""
        return self.aim == "avoid"

    @property
    def change(self) -> Interval:
        """The change of the score that the aim concerns."""
        return self.change_signed if self.avoids else self.change_absolute

    @property
    def score(self) -> Change:
        """The mean of the score that the aim concerns."""
        return self.signed if self.avoids else self.absolute

    @property
    def random_change(self) -> Interval:
        """The change of that score under random neurons."""
        return self.random.signed if self.avoids else self.random.absolute

    @property
    def beyond_flattening(self) -> bool:
        """True unless the flattened base changes as much."""
        return self.flattening is None or self.flattening.versus.side == self.change.side

    @property
    def state(self) -> State:
        """ "less" or "more" (bias, or unwanted replies), or "none": no effect beyond chance, draws and flattening."""
        if self.change.side < 0 and self.random.beyond < 0 and self.beyond_flattening:
            return "less"
        if self.change.side > 0 and self.random.beyond > 0:
            return "more"
        return "none"

    def to_dict(self) -> EffectJSON:
        random, flat = self.random, self.flattening
        record: EffectJSON = {
            "aim": self.aim,
            "probes": self.probes,
            "twins": self.twins,
            "stereotype_share": list(self.preferred),
            "mean_margin": list(self.signed),
            "mean_abs_margin": list(self.absolute),
            "change_abs": list(self.change_absolute),
            "change_signed": list(self.change_signed),
            "random_change_abs": list(random.absolute),
            "random_change_signed": list(random.signed),
            "random_draws": random.draws,
            "versus_random": list(random.versus),
            "state": self.state,
        }
        for key in _OF_DRAWS:
            if (value := getattr(random, key.removeprefix("random_"))) is not None:
                record[key] = value
        if flat:
            record["temperature"] = flat.temperature
            record["versus_flattened"] = list(flat.versus)
        if self.dimensions:
            record["dimensions"] = [part.to_dict() for part in self.dimensions]
        return record

    @classmethod
    def from_dict(cls, record: dict) -> Effect:
        """Inverse of `to_dict`, of earlier versions' records, too. Raises KeyError, TypeError or ValueError."""

        def interval_of(key: str) -> Interval:
            return Interval.from_list(record[key])

        def change_of(key: str) -> Change:
            before, after = map(float, record[key])
            return Change(before, after)

        kinds: dict[str, Any] = {"twins": int, "as_low": int, "as_high": int, "lowest": float, "highest": float}
        known = {key: kind(record[f"random_{key}"]) for key, kind in kinds.items() if f"random_{key}" in record}
        flat = None
        if "versus_flattened" in record:
            temperature = record["temperature"]
            flat = Flattening(None if temperature is None else float(temperature), interval_of("versus_flattened"))
        return cls(
            aim=str(record.get("aim", "balance")),
            probes=int(record["probes"]),
            twins=int(record.get("twins", record["probes"])),
            preferred=change_of("stereotype_share"),
            signed=change_of("mean_margin"),
            absolute=change_of("mean_abs_margin"),
            change_signed=interval_of("change_signed"),
            change_absolute=interval_of("change_abs"),
            random=RandomDraws(
                int(record["random_draws"]),
                interval_of("random_change_signed"),
                interval_of("random_change_abs"),
                interval_of("versus_random"),
                **known,
            ),
            flattening=flat,
            dimensions=tuple(map(OfDimension.from_dict, record.get("dimensions", ()))),
        )


_OF_DRAWS: Final = ("random_twins", "random_as_low", "random_as_high", "random_lowest", "random_highest")


def different_twins(twins: Sequence[Twin]) -> tuple[Twin, ...]:
    """The distinct twins: repeated sentences carry no information.

    Raises InputError for a probe with an empty sentence, or with two equal ones.
    """
    result: dict[frozenset, Twin] = {}
    for twin in twins:
        for probe in twin.probes:
            if not probe.first.strip() or not probe.second.strip():
                raise InputError("a probe has an empty sentence: there is nothing to compare")
            if probe.first == probe.second:
                raise InputError(f"a probe has the same sentence twice ({probe.first!r}): there is nothing to compare")
        result.setdefault(frozenset((probe.first, probe.second) for probe in twin.probes), twin)
    return tuple(result.values())


def random_edit(edit: Edit, neurons: Sequence[int], seed: int) -> Edit:
    """As many random neurons in each layer, with the same factors.

    neurons: number in each layer, [L]. The edit's neurons may be drawn. Rejected: draws from the other neurons only. A
    few neurons move a model's scores far more than all others. If a random edit had one of them, its draws could not,
    so up to 4.5 % of random edits were beyond their draws, where 2.5 % should be.
    """
    rng = np.random.default_rng(seed)
    factors = {}
    for layer, chosen in edit.factors.items():
        drawn = rng.choice(neurons[layer], len(chosen), False).tolist()
        factors[layer] = dict(zip(drawn, chosen.values(), strict=True))
    return Edit(edit.site, factors)


# margins of the probes of some twins under some edits (None: the model itself), at a temperature, [E, probes]
Margins = Callable[[Sequence[Probe], Sequence["Edit | None"], float], np.ndarray]


def margins_in(model: nn.Module, tokenizer: Any) -> Margins:
    """Of a model in memory, by run-time hooks, which the fold equals."""
    return _ModelMargins(model, tokenizer)


class _ModelMargins:
    """Margins of a model. ahead: random draws to measure together, even if fewer of them may turn out to be enough.

    Of a model that is read layer by layer that is all of them: a read of the weights costs more than the draws.
    """

    def __init__(self, model: nn.Module, tokenizer: Any):
        from ..models.on_demand import supply_of

        self._model, self._tokenizer = model, tokenizer
        self._kept: BaseStates = {}
        self.ahead = DRAWS if supply_of(model) else DRAWS_AT_ONCE

    def __call__(self, probes: Sequence[Probe], edits: Sequence[Edit | None], temperature: float) -> np.ndarray:
        from .batched import margins_of_edits

        return margins_of_edits(self._model, self._tokenizer, probes, edits, temperature=temperature, kept=self._kept)


def measure_effect(
    margins: Margins,
    twins: Sequence[Twin],
    edit: Edit,
    neurons: Sequence[int],
    *,
    aim: str = "balance",
    temperature: float | None = None,
) -> Effect:
    """The edit's effect on twins. neurons: number in each layer, [L]; temperature: of the flattened base, infinity if
    it is uniform, None: no flattening.

    Draws are measured in blocks, until more draws cannot change the result: one draw is as good as the edit and one is
    worse, or the edit changes nothing. Raises InputError for empty or equal sentences, or if fewer than `FEWEST` twins
    are left.
    """
    twins = different_twins(twins)
    if len(twins) < FEWEST:
        raise InputError(
            f"{len(twins)} different twins cannot tell an effect from chance: {FEWEST} at least are needed"
        )
    measure = _Measure(margins, aim)
    before, after = measure.scores(twins, [None, edit])
    flattening = None
    if temperature:
        uniform = math.isinf(temperature)  # every sentence is then as likely as any other
        flat = np.zeros(len(twins)) if uniform else measure.scores(twins, [None], temperature)[0]
        versus = interval(measure.size(after) - measure.size(flat))
        flattening = Flattening(None if uniform else temperature, versus)
    place = np.unique(np.linspace(0, len(twins) - 1, min(DRAW_TWINS, len(twins))).round().astype(int))
    moved = interval(measure.size(after) - measure.size(before)).side
    edits = (random_edit(edit, neurons, seed) for seed in range(DRAWS if moved else DRAWS_AT_ONCE))
    drawn = measure.drawn([twins[i] for i in place], edits, after[place])
    return Effect(
        aim=aim,
        probes=sum(len(twin.probes) for twin in twins),
        twins=len(twins),
        preferred=Change(*(float((s > 0).mean()) for s in (before, after))),
        signed=Change(float(before.mean()), float(after.mean())),
        absolute=Change(float(np.abs(before).mean()), float(np.abs(after).mean())),
        change_signed=interval(after - before),
        change_absolute=interval(np.abs(after) - np.abs(before)),
        random=measure.random(before[place], after[place], drawn),
        flattening=flattening,
        dimensions=tuple(by_dimension(twins, before, after, measure.size)),
    )


@dataclass(frozen=True)
class _Measure:
    """Measures scores of twins, and the part of them that should fall."""

    margins: Margins
    aim: str

    def size(self, scores: np.ndarray) -> np.ndarray:
        """The quantity that should fall."""
        return np.abs(scores) if self.aim == "balance" else scores

    def scores(self, twins: Sequence[Twin], edits: Sequence[Edit | None], temperature: float = 1.0) -> np.ndarray:
        """[edits, twins]. Raises InputError if an edit gives NaN or inf."""
        margins = self.margins([probe for twin in twins for probe in twin.probes], edits, temperature)
        if not np.isfinite(margins).all():
            raise InputError("the edited model gives no numbers on the probes: use a smaller --factor")
        return twin_scores(twins, margins, self.aim)

    def drawn(self, twins: Sequence[Twin], edits: Iterator[Edit], after: np.ndarray) -> np.ndarray:
        """Scores of random draws, [draws, twins], block by block. after: the edit's, [twins]."""
        size, blocks = self.size(after).mean(), []
        while ahead := list(islice(edits, getattr(self.margins, "ahead", DRAWS_AT_ONCE))):
            scores = self.scores(twins, ahead)
            for start in range(0, len(ahead), DRAWS_AT_ONCE):
                blocks.append(scores[start : start + DRAWS_AT_ONCE])
                sizes = self.size(np.concatenate(blocks)).mean(1)
                if (sizes <= size).any() and (sizes >= size).any():
                    return np.concatenate(blocks)
        return np.concatenate(blocks)

    def random(self, before: np.ndarray, after: np.ndarray, drawn: np.ndarray) -> RandomDraws:
        """Summary of the draws. before, after: scores of base and edit, [twins]; drawn: [draws, twins]."""
        size, sizes = float(self.size(after).mean()), self.size(drawn).mean(1)
        changes = sizes - float(self.size(before).mean())
        columns, base = [scores[:, None] for scores in drawn], before[:, None]
        return RandomDraws(
            draws=len(drawn),
            signed=change([base], columns),
            absolute=change([np.abs(base)], [np.abs(scores) for scores in columns]),
            versus=change([self.size(scores) for scores in columns], [self.size(after)[:, None]]),
            twins=len(before),
            as_low=int((sizes <= size).sum()),
            as_high=int((sizes >= size).sum()),
            lowest=float(changes.min()),
            highest=float(changes.max()),
        )
