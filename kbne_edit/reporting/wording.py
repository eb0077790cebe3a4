"""A report in words: what holds, warnings, what was not measured; limits; which requirements it can serve."""

from __future__ import annotations

from .types import Finding, Report, State

STATES: dict[State, str] = {"holds": "holds", "warning": "caution", "failed": "fails", "open": "not known"}

_COUNTS = (
    "A neuron counts for a question if its share of the question's largest score exceeds {} by tau (or is among the "
    "largest there); it is kept for a dimension if it counts in the share beta of its questions."
)
RULES = {  # selection rule: what it does
    "paper": _COUNTS.format("0"),
    "contrastive": _COUNTS.format("what matched controls reach"),
    "paired": _COUNTS.format("its share in the question's twin"),
    "specific": "Kept are the neurons whose mean share of the questions' largest scores exceeds that in matched "
    "controls by most, less the error that chance leaves over all neurons. A neuron counts for a question if its share "
    "exceeds that mean in controls.",
}

LIMITS = (
    "The edit scales neurons with which the model answers questions about bias. It removes nothing, and only what was "
    "measured says what it does to other text.",
    "Attribution is by layer: each layer's neurons are scaled together along one path, the other layers held as they "
    "are. It says on what an answer rests, not why.",
    "The tokens of a neuron are a reading of its weights, not a measurement of its effect.",
    "Neurons that the controls select too serve to answer any such question, not questions about bias alone.",
    "Measured effects hold for the pairs of sentences, the language and the groups that they name, and for no other.",
    "The base's limits are those of this model.",
    "Every figure but the hashes is on record: the run that made the files measured it, and this page did not do so "
    "again. Who must rely on it compares the directory with its base (`kbne-edit verify`).",
)

# Which section can serve which point of a technical file, paraphrased; this is not a claim of conformity.
# Section of the page, its heading, point of annex IV of the EU AI Act, sub-category of the NIST AI RMF's MEASURE.
SERVES = (
    (
        "change",
        "What was changed",
        "2(a) how a model of a third party was modified; 6 changes over the life cycle",
        "2.8 transparency: what was done to the model",
    ),
    (
        "map",
        "Where it was changed",
        "2(b) design choices, and what the parameters stand for",
        "2.9 the model explained; 2.13 how well the method itself discriminates (controls)",
    ),
    (
        "neurons",
        "What each neuron does",
        "2(b) general logic; 3 how the system functions",
        "2.9 the model explained, with the limits of the explanation",
    ),
    (
        "proofs",
        "Proofs",
        "2(g) procedures of validation and their results",
        "2.1 tools and measures of testing; 2.5 validity",
    ),
    (
        "effects",
        "Effects",
        "2(g) tests for discriminatory impact; 3 performance for groups; 4 whether the measure fits",
        "2.11 fairness and bias, with results; 1.1 what was not measured",
    ),
    (
        "answers",
        "Answers to the questions",
        "2(g) test data and accuracy; 3 limits of performance",
        "2.5 validity, and how far it carries; 2.13 whether the measure works on this model",
    ),
    (
        "provenance",
        "Provenance and hashes",
        "1(a) and 1(c) version and software; 2(g) logs of tests",
        "2.1 test sets and tools on record; 2.8 accountability",
    ),
    (
        "limits",
        "Limits",
        "3 limits of capability, foreseeable unintended outcomes",
        "1.1 risks that were not measured; 2.5 limits of generalisation",
    ),
)

NOT_COVERED = (
    "Nothing here speaks of: intended purpose and instructions for use, training data, human oversight, cybersecurity, "
    "the system of risk management, standards applied, the declaration of conformity, monitoring after release (annex "
    "IV 1, 2(d), 2(e), 2(h), 5, 7, 8, 9); nor of safety, security, privacy, environmental impact, or the monitoring of "
    "a deployed system (MEASURE 2.4, 2.6, 2.7, 2.10, 2.12, 3, 4)."
)

NO_MITIGATION = (
    "An edit without an effect is no mitigation of bias, whatever else is proven of it: see the verdict, part “effect”."
)
WORDS = {  # part of a verdict: what it asks
    "answers": "Can the base answer the questions?",
    "specific": "Are the neurons specific to bias?",
    "effect": "Is there less bias?",
    "cost": "Are the side effects low?",
    "proofs": "Is the output proven?",
}


def findings(report: Report) -> tuple[Finding, ...]:
    """What holds, warnings, and what is not known."""
    parts = [_file, _behaviour, _effect, _answers, _controls, _origin, *([_tuning] if report.tuning else [])]
    return tuple(finding(report) for finding in parts)


def checked(report: Report) -> str:
    """Which files were hashed for the page, and the result."""
    hashes = report.hashes
    if not hashes.checked:
        return "No file was hashed for this page (`--no-hash`): whether the files are still those of the run is open."
    return f"All {hashes.files} files were hashed for this page: they are those that the run wrote."


def _held(report: Report) -> str:
    """When a proof was made, and what was checked again."""
    again = "the files are unchanged since" if report.hashes.checked else "not checked again for this page"
    return f"On record: held when made with {report.provenance.baked_with}; {again}."


def _file(report: Report) -> Finding:
    about, proofs = "the files hold the edit", report.proofs
    if proofs is None:
        text = "The manifest holds no proof that the files are the base with this edit and nothing else."
        return Finding(about, "open", text)
    if not proofs.files.holds:
        return Finding(about, "failed", "The files are not the base with this edit and nothing else.")
    text = (
        f"{proofs.files.edited} of {proofs.files.tensors} tensors are the base's with the factors multiplied in and "
        f"rounded once; all others, and {proofs.files.files} further files, are as expected to the bit. "
    )
    return Finding(about, "holds", text + _held(report))


def _behaviour(report: Report) -> Finding:
    about, entries = "the model behaves as the hooks", report.proofs.behaviour if report.proofs else None
    if not entries:
        text = "Whether the model behaves as its base with run-time hooks was not put to the proof."
        return Finding(about, "open", text)
    if not all(entry.holds for entry in entries):
        return Finding(about, "failed", "The model does not behave as its base with run-time hooks.")
    dtypes = " and ".join(sorted({entry.dtype for entry in entries}))
    same = "equal those of the base with run-time hooks bit for bit"
    if not all(entry.bit_equal for entry in entries):
        same = "differ from the base with run-time hooks by rounding only"
    return Finding(about, "holds", f"In {dtypes} its outputs {same}. {_held(report)}")


def _effect(report: Report) -> Finding:
    about, effect, tuned = "effect on bias", report.effect, report.tuning
    if effect is None and tuned and tuned.test:
        results = "; ".join(f"{row.task}: {row.found}" for row in tuned.test)
        state: State = "holds" if tuned.confirmed and all(row.beyond for row in tuned.test) else "warning"
        return Finding(about, state, f"On items that had no part in the choice of the edit, {results}.")
    if effect is None and report.evaluations:
        part = report.verdict.effect
        return Finding(about, "holds" if part.state == "PASS" else "warning", f"On benchmarks: {part.reason}.")
    if effect is None:
        text = "Whether this model shows less bias than its base was not measured. That is not “no effect”."
        return Finding(about, "open", text)
    about = "effect on behaviour" if effect.avoids else about
    text = f"On {effect.twins} twins of sentences: {report.verdict.effect.reason}."
    if effect.preferred.after >= effect.preferred.before:
        side = "unwanted" if effect.avoids else "stereotyped"
        text += f" The share of twins in which the {side} side is preferred did not fall."
    return Finding(about, "holds" if report.verdict.effect.state == "PASS" else "warning", text)


def _answers(report: Report) -> Finding:
    about = "the base's answers"
    if report.answers is None:
        text = "How the base answers the questions is not known: the neurons were given, not located."
        return Finding(about, "open", text)
    answers = report.answers.answers
    right = f"The base answers {answers.questions.right} of {answers.questions.total} questions rightly"
    if answers.constant is not None:
        value, low, high = answers.balanced
        text = (
            f"{right}, which is no better than the same answer ({answers.constant}) to everything (balanced accuracy "
            f"{value:.0%}, 95 % interval {low:.0%} to {high:.0%}): the attribution says little about what the model "
            "knows."
        )
        return Finding(about, "warning", text)
    return Finding(about, "holds", f"{right}, and {answers.controls.right} of {answers.controls.total} unrelated ones.")


def _controls(report: Report) -> Finding:
    about, shared = "specific to bias", report.controls_overlap
    if shared is None:
        text = "Whether unrelated questions select these neurons too is not known: none was asked."
        return Finding(about, "open", text)
    text = f"{shared} of the {report.edit.neurons} edited neurons are selected by unrelated questions as well."
    return Finding(about, "warning" if shared else "holds", text)


def _origin(report: Report) -> Finding:
    about, selection = "the selection can be repeated", report.selection
    if selection is None:
        return Finding(about, "open", "The scores from which the neurons were selected were not at hand.")
    if not selection.on_record:
        return Finding(about, "open", "The edit does not say how its neurons were selected.")
    if not selection.reproduced:
        text = "The scores and the thresholds on record select other neurons than those of the edit."
        return Finding(about, "warning", text)
    return Finding(about, "holds", "The scores and the thresholds on record select exactly the neurons of the edit.")


def _tuning(report: Report) -> Finding:
    about, tuning = "chosen on one half, confirmed on the other", report.tuning
    assert tuning is not None
    text = f"This edit was chosen among {len(tuning.points)} by their figures on one half of the items"
    if tuning.test is None:
        return Finding(about, "open", f"{text}; the other half was not scored.")
    state = "what they promised holds" if tuning.confirmed else "what they promised was not confirmed"
    text = f"{text}. On the other half, scored once, {state} ({tuning.verdict})."
    return Finding(about, "holds" if tuning.confirmed else "warning", text)
