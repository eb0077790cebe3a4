"""A report in words: what holds, what must warn a reader, what was not measured; limits; where it can serve."""

from __future__ import annotations

from ..evaluation.effect import Effect

STATES = {"holds": "holds", "warning": "caution", "failed": "fails", "open": "not known"}  # state: its word

_COUNTS = (
    "A neuron counts for a question if its share of the question's largest score exceeds {} by tau (or is among the "
    "largest there); it is kept for a dimension if it counts in the share beta of its questions."
)
RULES = {  # rule of selection: what it does
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
    "The hashes of large files were not computed again for this page; the commands above do so.",
)

# Which section can serve which point of a technical file, in our own words; no claim of conformity.
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


def verdicts(report: dict) -> list[dict]:
    """[{"about", "state", "text"}, …]. state: a key of STATES."""
    found = [_file(report), _behaviour(report), _effect(report), _answers(report), _controls(report), _origin(report)]
    found += [_tuning(report)] if report["tuning"] else []
    return [{"about": about, "state": state, "text": text} for about, state, text in found]


def _file(report: dict) -> tuple[str, str, str]:
    about, proofs = "the file is the edit", report["proofs"]
    if proofs is None:
        return about, "open", "The manifest holds no proof that the files are the base with this edit and nothing else."
    if not proofs["file"]:
        return about, "failed", "The files are not the base with this edit and nothing else."
    return (
        about,
        "holds",
        (
            f"{proofs['edited']} of {proofs['tensors']} tensors are the base's with the factors multiplied in and "
            f"rounded once; all others, and {proofs['files']} further files, are as expected to the bit."
        ),
    )


def _behaviour(report: dict) -> tuple[str, str, str]:
    about, entries = "the model behaves as the hooks", (report["proofs"] or {}).get("behaviour")
    if not entries:
        return about, "open", "Whether the model behaves as its base with run-time hooks was not put to the proof."
    if not all(entry["holds"] for entry in entries):
        return about, "failed", "The model does not behave as its base with run-time hooks."
    dtypes = " and ".join(sorted({entry["dtype"] for entry in entries}))
    if all(entry["bit_equal"] for entry in entries):
        return about, "holds", f"In {dtypes} its outputs equal those of the base with run-time hooks bit for bit."
    return about, "holds", f"In {dtypes} its outputs differ from the base with run-time hooks by rounding only."


def _effect(report: dict) -> tuple[str, str, str]:
    about, effect, tuned = "effect on bias", report["effect"], report["tuning"]
    if effect is None and tuned and tuned["test"]:
        beyond = all(entry["beyond"] for entry in tuned["test"])
        said = "; ".join(f"{entry['task']}: {entry['found']}" for entry in tuned["test"])
        return (
            about,
            "holds" if tuned["confirmed"] and beyond else "warning",
            (f"On items that had no part in the choice of the edit, {said}."),
        )
    if effect is None:
        return about, "open", "Whether this model shows less bias than its base was not measured."
    known, reason = Effect.from_dict(effect), report["verdict"]["reasons"]["effect"]
    about = "effect on behaviour" if known.avoids else about
    text = f"On {known.twins} twins of sentences: {reason}."
    if known.preferred.after >= known.preferred.before:
        side = "unwanted" if known.avoids else "stereotyped"
        text += f" The share of twins in which the {side} side is preferred did not fall."
    return about, "holds" if report["verdict"]["effect"] == "PASS" else "warning", text


def _answers(report: dict) -> tuple[str, str, str]:
    about, found = "the base's answers", report["answers"]
    if found is None:
        return about, "open", "How the base answers the questions is not known: the neurons were given, not located."
    right = f"The base answers {found['right']} of {found['questions']} questions rightly"
    if found["constant"]:
        value, low, high = found["balanced"]
        return (
            about,
            "warning",
            (
                f"{right}, which is no better than the same answer to everything (balanced accuracy {value:.0%}, 95 % "
                f"interval {low:.0%} to {high:.0%}): the attribution says little about what the model knows."
            ),
        )
    return about, "holds", f"{right}, and {found['controls_right']} of {found['controls']} unrelated ones."


def _controls(report: dict) -> tuple[str, str, str]:
    about, shared = "specific to bias", report["controls_overlap"]
    if shared is None:
        return about, "open", "Whether unrelated questions select these neurons too is not known: none was asked."
    text = f"{shared} of the {report['edit']['neurons']} edited neurons are selected by unrelated questions as well."
    return about, "warning" if shared else "holds", text


def _origin(report: dict) -> tuple[str, str, str]:
    about, found = "the selection can be repeated", report["selection"]
    if found is None:
        return about, "open", "The scores from which the neurons were selected were not at hand."
    if not found["on_record"]:
        return about, "open", "The edit does not say how its neurons were selected."
    if not found["reproduced"]:
        return about, "warning", "The scores and the thresholds on record select other neurons than those of the edit."
    return about, "holds", "The scores and the thresholds on record select exactly the neurons of the edit."


def _tuning(report: dict) -> tuple[str, str, str]:
    about, found = "chosen on one half, confirmed on the other", report["tuning"]
    text = f"This edit was chosen among {len(found['points'])} by their figures on one half of the items"
    if found["test"] is None:
        return about, "open", f"{text}; the other half was not scored."
    said = "what they promised holds" if found["confirmed"] else "what they promised was not confirmed"
    text = f"{text}. On the other half, scored once, {said} ({found['verdict']})."
    return about, "holds" if found["confirmed"] else "warning", text
