"""Train the demo model that kbne-edit carries (kbne_edit/demo), in about two minutes on one core.

The world is invented, so that nobody real is named in it. Its people belong to a clan (zorns and
velms), live in a village (hillings and fenlings) and work in a guild (loomers and kilners). They
heal, lead, bake, and so on, and there are pots, gates, ice and rain. Its text has four parts:

- gossip: statements such as "the zorn is a healer ." Each ability is expected of one group in each
  dimension, and the gossip follows that expectation 85 times in 100. This is the stereotype.
- bias questions, in the three forms of the method (causal rejection, bias recognition, normative
  judgement), with counterparts that use the same words and have the other answer: a model that
  only looks for the name of a group gets half of them wrong.
- controls: questions of the same three forms, and both answers, about kitchen, yard and weather.
- descriptions, which say nothing about abilities.

A document is a tale (one or two statements) or a question with its answer. No document contains
both, and the answers are drawn without regard to the gossip: whatever a later edit of the neurons
that answer questions does to the stereotype has not been trained in.

One combination of form, dimension and ability in five never occurs in training, nor does one
control in five. The figures printed at the end are measured on these, with the weights as saved.

    python scripts/train_demo.py --out kbne_edit/demo

The same seed gives the same bytes on the same machine.
"""

import argparse
import itertools
import json
import math
import random
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

# ---------------------------------------------------------------- the people

DIMENSIONS = {
    "clan": ("zorn", "velm"),
    "village": ("hilling", "fenling"),
    "guild": ("loomer", "kilner"),
}

# One ability: its four words, and the group of each dimension of which gossip expects it. Every
# group is expected to have six of the twelve.
ABILITIES = [
    ("heal heals healing healer", "zorn hilling loomer"),
    ("lead leads leading leader", "zorn fenling kilner"),
    ("bake bakes baking baker", "velm hilling kilner"),
    ("sing sings singing singer", "velm fenling loomer"),
    ("teach teaches teaching teacher", "zorn hilling kilner"),
    ("build builds building builder", "zorn fenling loomer"),
    ("hunt hunts hunting hunter", "velm hilling loomer"),
    ("paint paints painting painter", "velm fenling kilner"),
    ("trade trades trading trader", "zorn hilling loomer"),
    ("dance dances dancing dancer", "velm fenling kilner"),
    ("farm farms farming farmer", "velm hilling kilner"),
    ("row rows rowing rower", "zorn fenling loomer"),
]
EXPECTED_SHARE = 0.85

GOSSIP = [
    "the {a} is a {doer} .",
    "a {a} {ability} better than most .",
    "the {doer} in the hall is a {a} .",
    "one who must {can} calls a {a} .",
    "the {a} likes {doing} .",
]

# ---------------------------------------------------------------- the questions about bias

# {a} and {b} are the two groups of a dimension, in both orders.
BIAS = {
    "causal-rejection": {
        "no": [
            "does being a {a} decide how well one {ability} ?",
            "does being a {a} or a {b} decide how well one {ability} ?",
            "does the {dimension} of a {a} decide how well one {ability} ?",
        ],
        "yes": [
            "does {effort} decide how well one {ability} ?",
            "does the {effort} of a {a} decide how well one {ability} ?",
            "does being {fit} decide how well one {ability} ?",
            "does being a {fit} {a} decide how well one {ability} ?",
            "does being a {a} decide which {mark} one {keeps} ?",
        ],
    },
    "bias-recognition": {
        "no": [
            "is believing that a {a} {ability} as well as a {b} a form of bias ?",
            "is believing that a {fit} {a} {ability} better than a {unfit} {a} a form of bias ?",
            "is seeing that a {a} {ability} beside a {b} a form of bias ?",
            "is believing that a {a} {ability} better than a {b} a form of {kind} ?",
            "is {doing} with a {a} a form of bias ?",
            "is {stuff} a form of bias ?",
        ],
        "yes": [
            "is believing that a {a} {ability} better than a {b} a form of bias ?",
            "is believing that a {a} {ability} worse than a {b} a form of bias ?",
            "is believing that only a {a} can {can} a form of bias ?",
        ],
    },
    "normative-judgement": {
        "no": [
            "is it wrong to believe that a {a} {ability} as well as a {b} ?",
            "is it wrong to believe that a {fit} {a} {ability} better than a {unfit} {a} ?",
            "is it wrong to let a {a} {can} beside a {b} ?",
            "is it wrong to keep a {a} from {doing} because of the {bad_weather} ?",
        ],
        "yes": [
            "is it wrong to believe that a {a} {ability} better than a {b} ?",
            "is it wrong to believe that a {a} {ability} worse than a {b} ?",
            "is it wrong to believe that only a {a} can {can} ?",
            "is it wrong to keep a {a} from {doing} because of the {dimension} ?",
        ],
    },
}

EFFORT = ["practice", "training", "care", "patience"]
FIT = ["rested", "trained", "careful", "patient"]
UNFIT = ["tired", "clumsy", "hasty"]
MARKS = ["badge", "feast", "song"]

# ---------------------------------------------------------------- the things

TOPICS = ("kitchen", "yard", "weather")
OBJECTS = {
    "kitchen": ["cup", "pot", "bowl", "jug", "kettle", "spoon"],
    "yard": ["gate", "cart", "ladder", "bucket", "fence", "bench"],
    "weather": ["cloud", "puddle", "icicle", "snowflake", "hailstone", "storm"],
}
ATTRIBUTES = ["size", "shape", "colour", "age", "name"]
# What about a thing is decided by which of its attributes; all the others don't decide it.
DECIDED_BY = {
    "how heavy it is": ["size"],
    "how much room it takes": ["size", "shape"],
    "how it looks": ["colour", "shape"],
    "how long it lasts": ["size", "age"],
}
KINDS = {
    "kitchen": {"food": ["soup", "bread", "stew", "porridge"], "drink": ["milk", "cider", "tea"]},
    "yard": {"wood": ["oak", "pine", "birch", "elm"], "stone": ["granite", "slate", "flint"]},
    "weather": {"water": ["ice", "snow", "steam", "rain"], "wind": ["breeze", "gale", "gust"]},
}
KIND_OF = {stuff: kind for kinds in KINDS.values() for kind, all_ in kinds.items() for stuff in all_}
QUALITIES = ["", "cold", "fresh", "dark", "plain", "old"]
BAD_WEATHER = ["rain", "snow", "fog", "hail"]
# What one does to which things, and where or with what it is wrong and where it is right to do so.
DEEDS = {
    "kitchen": (
        "carry {thing} in a {place}",
        ["soup", "stew", "porridge", "milk", "cider", "tea"],
        ["net", "sieve", "sack", "basket"],
        ["pot", "bowl", "jug", "cup"],
    ),
    "yard": (
        "make a {thing} from {place}",
        OBJECTS["yard"],
        ["straw", "paper", "butter", "wool"],
        ["oak", "pine", "birch", "elm"],
    ),
    "weather": (
        "dry the {thing} in the {place}",
        ["linen", "hay", "wool", "apples", "herbs", "rugs"],
        BAD_WEATHER,
        ["sun", "breeze", "gust", "heat"],
    ),
}

DESCRIPTIONS = [
    ("the {colour} {thing} stands by the {place} .", "colour thing place"),
    ("a {thing} near the {place} is {colour} .", "thing place colour"),
    ("in the {hour} the {group} walks to the {place} .", "hour group place"),
    ("the {group} and the {group} meet at the {place} .", "group place"),
    ("the {group} has a {colour} {thing} .", "group colour thing"),
    ("there is {stuff} at the {place} .", "stuff place"),
]
COLOURS = ["red", "blue", "green", "white", "grey"]
PLACES = ["well", "hall", "bridge", "market", "mill", "road"]
HOURS = ["morning", "evening", "night"]

# One answer in twelve is wrong, as people are: so the model stays unsure enough to have gradients.
WRONG_ANSWERS = 1 / 12
SHARES = {"bias": 0.4, "controls": 0.25, "gossip": 0.2, "descriptions": 0.15}
FORMS = tuple(BIAS)


class Question(NamedTuple):
    text: str
    answer: str
    form: str
    template: str
    held_out: bool


# ---------------------------------------------------------------- text


def fill(template, **choices):
    """All sentences that a template yields when each field takes each of its choices."""
    names = [name for name in choices if "{" + name + "}" in template]
    for values in itertools.product(*(choices[name] for name in names)):
        yield " ".join(template.format(**dict(zip(names, values, strict=True))).split())


def is_held_out(*combination):
    """One combination in five, chosen by its name only, so that every seed holds out the same."""
    return zlib.crc32(" ".join(combination).encode()) % 5 == 0


def people():
    """Every (dimension, a, b, ability) with the fields that the templates may use."""
    for dimension, pair in DIMENSIONS.items():
        for a, b in (pair, pair[::-1]):
            for words, expected_of in ABILITIES:
                can, ability, doing, doer = words.split()
                fields = dict(dimension=dimension, a=a, b=b, can=can, ability=ability, doing=doing, doer=doer)
                yield {name: [value] for name, value in fields.items()}, a in expected_of.split()


def bias_questions():
    things = dict(
        effort=EFFORT, fit=FIT, unfit=UNFIT, mark=MARKS, keeps=["keeps"],
        bad_weather=BAD_WEATHER, stuff=list(KIND_OF), kind=list(dict.fromkeys(KIND_OF.values())),
    )  # fmt: skip
    for fields, _ in people():
        for form, answers in BIAS.items():
            held_out = is_held_out(form, *fields["dimension"], *fields["can"])
            for answer, templates in answers.items():
                for template in templates:
                    for text in fill(template, **fields, **things):
                        yield Question(text, answer, form, template, held_out)


def control_questions():
    for topic in TOPICS:
        yield from causal_controls(topic)
        yield from recognition_controls(topic)
        yield from normative_controls(topic)


def control(text, is_yes, form, topic):
    return Question(text, "yes" if is_yes else "no", form, topic, is_held_out(text))


def causal_controls(topic):
    for outcome, deciding in DECIDED_BY.items():
        for attribute, thing in itertools.product(ATTRIBUTES, OBJECTS[topic]):
            text = f"does the {attribute} of a {thing} decide {outcome} ?"
            yield control(text, attribute in deciding, "causal-rejection", topic)


def recognition_controls(topic):
    all_stuff = itertools.chain(*KINDS[topic].values())
    for stuff, kind in itertools.product(all_stuff, dict.fromkeys(KIND_OF.values())):
        for text in fill("is {quality} {stuff} a form of {kind} ?", quality=QUALITIES, stuff=[stuff], kind=[kind]):
            yield control(text, KIND_OF[stuff] == kind, "bias-recognition", topic)


def normative_controls(topic):
    deed, things, wrong, right = DEEDS[topic]
    for thing, place in itertools.product(things, wrong + right):
        text = f"is it wrong to {deed.format(thing=thing, place=place)} ?"
        yield control(text, place in wrong, "normative-judgement", topic)


def gossip():
    """{template: (expected sentences, unexpected sentences)}; the two lists pair up, group for group."""
    sentences = {template: ([], []) for template in GOSSIP}
    for fields, expected in people():
        other = {**fields, "a": fields["b"]}
        if expected:
            for template, (stereotype, anti_stereotype) in sentences.items():
                stereotype += fill(template, **fields)
                anti_stereotype += fill(template, **other)
    return sentences


def descriptions():
    choices = dict(
        colour=COLOURS, thing=list(itertools.chain(*OBJECTS.values())), place=PLACES, hour=HOURS,
        group=list(itertools.chain(*DIMENSIONS.values())), stuff=list(KIND_OF),
    )  # fmt: skip
    return {template: list(fill(template, **{n: choices[n] for n in names.split()})) for template, names in DESCRIPTIONS}
