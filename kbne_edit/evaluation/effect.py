"""The effect of an edit on the recipe's probes, beside as many random neurons and a mere flattening.

A twin's score s (`twins`) says which of two groups, or replies, a model prefers. With the aim "balance" |s| should
fall; with "avoid", s itself. An edit has an effect if three things hold: the score changes (its 95 % interval over
twins leaves out 0); it changes by more than under every one of at least 19 draws of random neurons; and by more than
if the model were merely flattened, at a temperature with the same KL from the base on neutral text.

If the edit were as good as random, each of it and its draws would be equally likely to be the lowest: "below all of
39" is said in 1 of 40 such cases. Rejected: an interval of the difference to the mean of a few draws, resampling
probes alone. It leaves out how much draws differ, and was wrong in 9 to 29 % of the cases.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, NamedTuple, NotRequired, TypedDict

import numpy as np

from ..edit import Edit
from ..errors import InputError
from ..recipe import Probe, Twin
from ..statistics import Interval, IntervalJSON, change, interval
from .twins import twin_scores

if TYPE_CHECKING:
    from torch import nn

FEWEST = 6  # twins that can tell an effect at 5 %: if five paired items have one sign, p is 1/16
FEWEST_DRAWS = 19  # with fewer, "below all of them" is said of a random edit in more than 5 of 100 cases
DRAWS = 39  # "below all of them" is then said of a random edit in 2.5 of 100 cases
DRAW_TWINS = 24  # twins on which draws are measured: what draws differ by, not items, is what hides an effect there
_BLOCK = 4  # draws at once; if one of them does as well, and one worse, no more are needed

State = Literal["less", "more", "none"]


class Change(NamedTuple):
    """A figure before and after. As JSON it is the list [before, after]."""

    before: float
    after: float


ChangeJSON = Annotated[list[float], Change]


@dataclass(frozen=True)
class RandomDraws:
    """As many random neurons in each layer, with the same factors, drawn several times.

    draws: how many were measured, twins: on how many twins. as_low, as_high: how many of them reach the edit's mean
    score or go below (above) it, on the same twins. signed, absolute: mean change of s and of |s| from the base.
    versus: mean score of the edit less that of the draws. Intervals hold the spread of the draws, too. lowest, highest:
    of the draws' changes. Earlier versions did not record what is None.
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
        """-1 if the edit lies below every draw, 1 if above every draw, 0 if neither, or if there are too few."""
        if self.as_low is None or self.draws < FEWEST_DRAWS:
            return 0
        return int(self.as_high == 0) - int(self.as_low == 0)


@dataclass(frozen=True)
class Flattening:
    """The base at a temperature with the edit's KL on neutral text. versus: the edit's mean score less its.

    temperature: None where no flattening goes so far; it is then compared with a uniform distribution.
    """

    temperature: float | None
    versus: Interval


class EffectJSON(TypedDict):
    """What an edit does to the probes. Margins are s, in nats per token; abs: |s|; shares: 0 to 1.

    random_...: the same under random neurons; versus_random: the edit less their mean; random_as_low, random_as_high:
    how many draws reach the edit's score. temperature: of the flattening, null if none goes so far.
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
    state: State


@dataclass(frozen=True)
class Effect:
    """What an edit does to the probes. Scores are in nats per token.

    aim: "balance" or "avoid". probes: pairs of sentences; twins: scores, which are what is resampled. preferred: share
    of twins in which the stereotyped or unwanted side is preferred. signed, absolute: mean s, mean |s|.
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

    def __repr__(self) -> str:
        return f"Effect({self.twins} twins, {self.state}, change {self.change.value:+.4f})"

    @property
    def avoids(self) -> bool:
        """True if the first sentence of a probe is to become less probable; else neither should be preferred."""
        return self.aim == "avoid"

    @property
    def change(self) -> Interval:
        """The change of the score that counts."""
        return self.change_signed if self.avoids else self.change_absolute

    @property
    def score(self) -> Change:
        """The mean score that counts."""
        return self.signed if self.avoids else self.absolute

    @property
    def random_change(self) -> Interval:
        """The change of that score under random neurons."""
        return self.random.signed if self.avoids else self.random.absolute

    @property
    def beyond_flattening(self) -> bool:
        """True unless a flattening was measured that does as much."""
        return self.flattening is None or self.flattening.versus.side == self.change.side

    @property
    def state(self) -> State:
        """ "less" or "more" bias (or of what is unwanted), or "none": no effect beyond chance, draws and flattening."""
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
        )


_OF_DRAWS: Final = ("random_twins", "random_as_low", "random_as_high", "random_lowest", "random_highest")


def different_twins(twins: Sequence[Twin]) -> tuple[Twin, ...]:
    """The twins, each once: the same sentences again say nothing new.

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
    """As many neurons in each layer, drawn from all of the layer's, with the same factors.

    neurons: how many each layer has, [L]. The edit's own may be among them. Rejected: draws from the other neurons
    alone. A few neurons move the scores of a model by far the most; where a random edit held one, none of its draws
    could, so it was called beyond them in up to 4.5 % of the cases that should be 2.5 %.
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
    from .batched import BaseStates, margins_of_edits

    kept: BaseStates = {}

    def margins(probes: Sequence[Probe], edits: Sequence[Edit | None], temperature: float) -> np.ndarray:
        return margins_of_edits(model, tokenizer, probes, edits, temperature=temperature, kept=kept)

    return margins


def measure_effect(
    margins: Margins,
    twins: Sequence[Twin],
    edit: Edit,
    neurons: Sequence[int],
    *,
    aim: str = "balance",
    temperature: float | None = None,
) -> Effect:
    """The edit's effect on twins. neurons: how many each layer has, [L]; temperature: of the flattening, infinity if it
    is uniform, None for none.

    Draws are measured in blocks and end as soon as no more can change what is said: one does as well as the edit and
    one does worse, or the edit itself moves nothing. Raises InputError for probes that say nothing, or if fewer than
    `FEWEST` twins are left.
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
    edits = (random_edit(edit, neurons, seed) for seed in range(DRAWS if moved else _BLOCK))
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
    )


@dataclass(frozen=True)
class _Measure:
    """Scores of twins, and what of them should fall."""

    margins: Margins
    aim: str

    def size(self, scores: np.ndarray) -> np.ndarray:
        """What should fall."""
        return np.abs(scores) if self.aim == "balance" else scores

    def scores(self, twins: Sequence[Twin], edits: Sequence[Edit | None], temperature: float = 1.0) -> np.ndarray:
        """[edits, twins]. Raises InputError where an edit leaves no numbers."""
        margins = self.margins([probe for twin in twins for probe in twin.probes], edits, temperature)
        if not np.isfinite(margins).all():
            raise InputError("the edited model gives no numbers on the probes: use a smaller --factor")
        return twin_scores(twins, margins, self.aim)

    def drawn(self, twins: Sequence[Twin], edits: Iterator[Edit], after: np.ndarray) -> np.ndarray:
        """Scores of random draws, [draws, twins], block by block. after: the edit's, [twins]."""
        size, blocks = self.size(after).mean(), []
        while block := list(islice(edits, _BLOCK)):
            blocks.append(self.scores(twins, block))
            sizes = self.size(np.concatenate(blocks)).mean(1)
            if (sizes <= size).any() and (sizes >= size).any():
                break
        return np.concatenate(blocks)

    def random(self, before: np.ndarray, after: np.ndarray, drawn: np.ndarray) -> RandomDraws:
        """What the draws did. before, after: scores of base and edit, [twins]; drawn: [draws, twins]."""
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
