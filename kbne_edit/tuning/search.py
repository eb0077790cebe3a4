"""Which edits a sweep tries: a full grid if it is small, else the points that Optuna's sampler proposes.

A setting (site, rule, thresholds, factors) selects an edit from the scores files, without a model. Settings that select
the same edit are one candidate, which is measured once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import product
from typing import TYPE_CHECKING, NotRequired, TypedDict, cast

from ..edit import Edit
from ..errors import EditError, InputError, shown
from ..rule import COMBINE, RULES, Rule
from ..selection.select import by_dimension, selection

if TYPE_CHECKING:
    from ..attribution.scores import Scores
    from ..selection.select import Selection

_EITHER = "tau or top"  # one axis of (name, value), because the two exclude each other
_ASKS = 5  # proposals of the sampler per edit to measure: it repeats itself

# Of an edit: (first value to minimise, second value to minimise, constraint: violated above 0)
Measure = Callable[[Edit], tuple[float, float, float]]


class SpaceJSON(TypedDict):
    """The values of each setting to try."""

    factors: list[float]
    taus: list[float]
    betas: list[float]
    rules: list[str] | None
    combines: list[str]
    per_dimension: bool
    tops: NotRequired[list[float]]


@dataclass(frozen=True)
class Space:
    """The space of a sweep. factors: by default 2 and 4, which fold exactly, 1.5 and 3 between them, and 0.5 as a
    reversal.

    rules: None for all that the scores allow. per_dimension: a separate factor for each dimension of the recipe,
    including 1 (its neurons are not edited). tops: shares of all neurons, each in place of a tau; taus: None for 0.05,
    0.1 and 0.2, or for no tau if there are tops. Raises InputError on construction for values out of range.
    """

    factors: Sequence[float] = (0.5, 1.5, 2.0, 3.0, 4.0)
    taus: Sequence[float] | None = None
    betas: Sequence[float] = (0.1,)
    rules: Sequence[str] | None = None
    combines: Sequence[str] = ("union",)
    per_dimension: bool = False
    tops: Sequence[float] = ()

    def __post_init__(self) -> None:
        if self.taus is None:
            object.__setattr__(self, "taus", () if self.tops else (0.05, 0.1, 0.2))
        optional = {"tops", "taus"} if self.tops else {"tops"}
        for name, (good, allowed) in _VALUES.items():
            values = getattr(self, name)
            if values is None or (not values and name in optional):
                continue
            if not values or len(set(values)) != len(values):
                raise InputError(f"the space needs values, each once: {name} is {shown(list(values))}")
            if wrong := [value for value in values if not good(value)]:
                raise InputError(f"the space: {shown(wrong[0])} is no value for {name} ({allowed})")

    def to_dict(self) -> SpaceJSON:
        """JSON form; `tops` only if there are any."""
        values = {name: values for name, values in asdict(self).items() if name != "tops" or values}
        return cast(SpaceJSON, values)


def _share(value: float) -> bool:
    return 0 <= value <= 1


_VALUES: dict[str, tuple[Callable, str]] = {
    "factors": (lambda f: 0 <= f <= 2**16 and f != 1, "numbers from 0, and not 1, which changes nothing"),
    "taus": (_share, "numbers from 0 to 1"),
    "betas": (_share, "numbers from 0 to 1"),
    "tops": (lambda top: 0 < top <= 1, "numbers above 0, up to 1"),
    "rules": (RULES.__contains__, ", ".join(RULES)),
    "combines": (COMBINE.__contains__, ", ".join(COMBINE)),
}


@dataclass(frozen=True)
class Candidate:
    """An edit, and all tried settings that select it."""

    edit: Edit
    settings: list[dict] = field(default_factory=list)


@dataclass(frozen=True)
class Sweep:
    """The candidates of a sweep: {SHA-256 of the edit: candidate}, in the order of trial. how: "grid", or Optuna's
    sampler; empty: number of settings that select no neuron; size: of the space."""

    candidates: dict[str, Candidate]
    how: str
    size: int
    empty: int


def sweep(space: Space, scores: dict[str, Scores], trials: int, seed: int, measure: Measure) -> Sweep:
    """Measure the edits of a space, `trials` of them at most. scores: by site. seed: of the sampler.

    Raises InputError if the space is larger than `trials` and Optuna is not installed, and if it has no edit at all.
    """
    axes, edit_of = _axes(space, scores), _selector(scores)
    size = math.prod(map(len, axes.values()))
    candidates: dict[str, Candidate] = {}
    empty: list[dict] = []

    def visit(setting: dict) -> tuple[float, float, float] | None:
        edit = edit_of(setting)
        if edit is None:
            empty.append(setting)
            return None
        candidate = candidates.setdefault(edit.sha256, Candidate(edit))
        if setting not in candidate.settings:
            candidate.settings.append(setting)
        return measure(candidate.edit)

    if size <= trials:
        how = "grid"
        for values in product(*axes.values()):
            visit(_setting(dict(zip(axes, values, strict=True))))
    else:
        how = _ask_optuna(axes, size, trials, seed, visit, candidates)
    if not candidates:
        raise InputError("no setting of the space selects a neuron: add smaller --taus or --betas, or larger --tops")
    return Sweep(candidates, how, size, len({str(setting) for setting in empty}))


def _axes(space: Space, scores: dict[str, Scores]) -> dict[str, Sequence]:
    """{name: its values}: the space is their product."""
    thresholds: dict[str, Sequence]
    rules = space.rules or tuple(rule for rule in RULES if all(_allows(s, rule) for s in scores.values()))
    if space.taus and space.tops:
        thresholds = {_EITHER: (*(("tau", v) for v in space.taus), *(("top", v) for v in space.tops))}
    else:
        thresholds = {"tau": space.taus} if space.taus else {"top": space.tops}
    axes: dict[str, Sequence] = {
        "site": tuple(scores),
        "rule": rules,
        "combine": space.combines,
        **thresholds,
        "beta": space.betas,
    }
    if not space.per_dimension:
        return axes | {"factor": space.factors}
    dimensions = dict.fromkeys(q.dimension for s in scores.values() for q in s.questions if not q.control)
    return axes | {f"factor of {name}": (1.0, *space.factors) for name in dimensions}


def _allows(scores: Scores, rule: str) -> bool:
    """True if the questions have what a rule needs, such as controls."""
    try:
        selection(scores, rule)
    except EditError:  # no neuron at these thresholds
        return True
    except InputError:
        return False
    return True


def _setting(values: dict) -> dict:
    """The values of the axes, with a tau or a top under its own name, and factors by dimension as one dict."""
    named = {name.removeprefix("factor of "): v for name, v in values.items() if name.startswith("factor of ")}
    kept = dict(v if name == _EITHER else (name, v) for name, v in values.items() if not name.startswith("factor of "))
    return kept | {"factor": named} if named else kept


def _selector(scores: dict[str, Scores]) -> Callable[[dict], Edit | None]:
    """A function: setting -> edit, None if it selects nothing."""

    @cache
    def chosen(site: str, rule: Rule) -> Selection | None:
        try:
            return selection(scores[site], rule)
        except EditError:
            return None

    def edit_of(setting: dict) -> Edit | None:
        factor = setting["factor"]
        selected = chosen(setting["site"], Rule.from_dict(setting))
        if selected is None:
            return None
        if isinstance(factor, dict):
            edit = by_dimension(selected, factor)
            return edit if edit.factors else None
        return selected.edit.with_factor(factor)

    return edit_of


def _ask_optuna(
    axes: dict[str, Sequence],
    size: int,
    trials: int,
    seed: int,
    visit: Callable[[dict], tuple[float, float, float] | None],
    candidates: dict,
) -> str:
    """Let Optuna's TPE propose settings until `trials` edits are measured. Seeded, so it is deterministic."""
    try:
        import optuna
    except ImportError:
        raise InputError(
            f"the space has {size} points, more than --trials {trials}, and Optuna is not installed: "
            f"`pip install 'kbne-edit[tune]'`, or --trials {size} for all of them, or fewer values"
        ) from None
    ordered = {name: all(isinstance(value, (int, float)) for value in values) for name, values in axes.items()}
    space: dict[str, optuna.distributions.BaseDistribution] = {
        name: optuna.distributions.IntDistribution(0, len(values) - 1)
        if ordered[name]
        else optuna.distributions.CategoricalDistribution(range(len(values)))
        for name, values in axes.items()
    }
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=seed)
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
    for _ in range(_ASKS * trials):
        if len(candidates) == trials:
            break
        trial = study.ask(space)
        values = {name: axes[name][place] for name, place in trial.params.items()}
        first, second, breaks = visit(_setting(values)) or (0.0, 0.0, 1.0)  # no neuron: the base, and of no use
        trial.set_constraint("loss", breaks)
        study.tell(trial, [first, second])
    return f"Optuna {optuna.__version__}, TPE"


def front(values: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the pairs on the Pareto front (both numbers are minimised), ordered by the first number."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    kept: list[int] = []
    for i in order:
        if not kept or values[i][1] < values[kept[-1]][1] or values[i] == values[kept[-1]]:
            kept.append(i)
    return kept


def in_words(settings: Sequence[dict], known: Iterable[str] = ()) -> str:
    """The first of the settings that select an edit, and the number of others. known: names to leave out."""
    first, more = settings[0], len(settings) - 1
    factor = first["factor"]
    texts = {
        "site": f"site {first['site']}",
        "rule": first["rule"],
        **{name: f"{name} {first[name]:g}" for name in ("tau", "top", "beta") if name in first},
        "combine": first["combine"],
        "factor": "factor "
        + (", ".join(f"{name} {f:g}" for name, f in factor.items()) if isinstance(factor, dict) else f"{factor:g}"),
    }
    if first["rule"] == "specific":  # its only threshold is top
        known = {*known, "tau", "beta"}
    return ", ".join(text for name, text in texts.items() if name not in known) + (
        f" (so do {more} other settings)" if more else ""
    )
