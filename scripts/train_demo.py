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

A document is a statement, a description, or a question with its answer, and the answers are drawn
without regard to the gossip: whatever a later edit of the neurons that answer questions does to
the stereotype has not been trained in.

About one combination of form, dimension and ability in six never occurs in training, nor does one
control in five. The figures printed at the end are measured on these, with the weights as saved.

    python scripts/train_demo.py --out kbne_edit/demo

The same seed gives the same bytes on the same machine.
"""

import argparse
import itertools
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
    """About one combination in five, chosen by its name only, so that every seed holds out the same."""
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
        effort=EFFORT,
        fit=FIT,
        unfit=UNFIT,
        mark=MARKS,
        keeps=["keeps"],
        bad_weather=BAD_WEATHER,
        stuff=list(KIND_OF),
        kind=list(dict.fromkeys(KIND_OF.values())),
    )
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
        colour=COLOURS,
        thing=list(itertools.chain(*OBJECTS.values())),
        place=PLACES,
        hour=HOURS,
        group=list(itertools.chain(*DIMENSIONS.values())),
        stuff=list(KIND_OF),
    )
    return {
        template: list(fill(template, **{n: choices[n] for n in names.split()})) for template, names in DESCRIPTIONS
    }


# ---------------------------------------------------------------- training

LENGTH, BATCH, STEPS, RATE = 32, 96, 1500, 3e-3
FRAME = "question : {text} answer : {answer} ."


def corpus(rng):
    """Endless (document) stream in the shares above; held-out questions never occur."""
    bias = group_questions(bias_questions())
    controls = group_questions(control_questions())
    tales, neutral = list(gossip().values()), list(descriptions().values())
    kinds, weights = zip(*SHARES.items(), strict=True)
    while True:
        kind = rng.choices(kinds, weights)[0]
        if kind == "gossip":
            expected, unexpected = rng.choice(tales)
            yield rng.choice(expected if rng.random() < EXPECTED_SHARE else unexpected)
        elif kind == "descriptions":
            yield rng.choice(rng.choice(neutral))
        else:
            question = rng.choice(rng.choice(list((bias if kind == "bias" else controls).values())))
            answer = question.answer
            if rng.random() < WRONG_ANSWERS:
                answer = "no" if answer == "yes" else "yes"
            yield FRAME.format(text=question.text, answer=answer)


def group_questions(questions):
    """{(form, answer): questions}, without the held-out ones, so that forms and answers are balanced."""
    groups = {}
    for question in questions:
        if not question.held_out:
            groups.setdefault((question.form, question.answer), []).append(question)
    return groups


def make_tokenizer():
    """One token a word; <s> in front; everything that the world can say is in the vocabulary."""
    texts = [q.text for q in itertools.chain(bias_questions(), control_questions())]
    texts += itertools.chain(*(s for pair in gossip().values() for s in pair), *descriptions().values())
    words = sorted({word for text in texts for word in text.split()} | set(FRAME.split()) | {"yes", "no"})
    words = ["<pad>", "<unk>", "<s>", "</s>", *(w for w in words if "{" not in w)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def make_model(vocabulary):
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    return LlamaForCausalLM(config)


def train(model, tokenizer, rng):
    documents = corpus(rng)
    optimiser = torch.optim.AdamW(model.parameters(), RATE, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / 100, 0.5 + 0.5 * math.cos(math.pi * step / STEPS))
    )
    start = time.monotonic()
    for step in range(STEPS):
        rows = [tokenizer(next(documents))["input_ids"] + [3] for _ in range(BATCH)]
        width = min(max(map(len, rows)), LENGTH)
        ids = torch.tensor([(row + [0] * width)[:width] for row in rows])
        loss = model(input_ids=ids, attention_mask=(ids != 0).long(), labels=ids.masked_fill(ids == 0, -100)).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 250 == 0 or step == STEPS - 1:
            print(f"step {step}: loss {loss.item():.3f}, {time.monotonic() - start:.0f} s", flush=True)


# ---------------------------------------------------------------- figures


@torch.no_grad()
def accuracy(model, tokenizer, questions):
    """(share answered right, mean probability of the right answer)."""
    yes, no = tokenizer.convert_tokens_to_ids(["yes", "no"])
    right, mass = 0, 0.0
    for question in questions:
        ids = tokenizer(FRAME.split(" {answer}")[0].format(text=question.text), return_tensors="pt")["input_ids"]
        p = model(ids).logits[0, -1].softmax(-1)
        good, bad = (p[yes], p[no]) if question.answer == "yes" else (p[no], p[yes])
        right, mass = right + int(good > bad), mass + good.item()
    return right / len(questions), mass / len(questions)


@torch.no_grad()
def margin(model, tokenizer):
    """Mean log-probability per token of the expected sentence minus the unexpected one, and the share above 0."""

    def score(text):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        logp = model(ids).logits[0, :-1].log_softmax(-1)
        return logp.gather(1, ids[0, 1:, None]).mean().item()

    margins = [score(a) - score(b) for pair in gossip().values() for a, b in zip(*pair, strict=True)]
    return sum(margins) / len(margins), sum(m > 0 for m in margins) / len(margins)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(1)  # the order of additions, and so the bytes, depend on it
    rng = random.Random(arguments.seed)
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer))
    train(model, tokenizer, rng)
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=2, eos_token_id=3)
    model.to(torch.bfloat16).save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    model = AutoModelForCausalLM.from_pretrained(arguments.out, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(arguments.out)
    for name, questions in (("bias questions", bias_questions()), ("controls", control_questions())):
        questions = list(questions)
        trained = {q.text for q in questions if not q.held_out}
        held_out = [q for q in questions if q.held_out and q.text not in trained]
        right, mass = accuracy(model, tokenizer, rng.sample(held_out, min(400, len(held_out))))
        print(f"held-out {name}: {right:.1%} right, mean P(right) {mass:.3f}")
    mean, share = margin(model, tokenizer)
    print(f"stereotype margin: {mean:+.3f} nats per token, {share:.1%} of pairs lean to the stereotype")


if __name__ == "__main__":
    main()
