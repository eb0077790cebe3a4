"""The public benchmarks, as lm-eval's tasks (for StereoSet a task of the package, since lm-eval has none)."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError
from ..progress import say
from .benchmark import Answer, Benchmark, Figure, sample
from .datafiles import NoDataError, rows
from .figures import ACCURACIES, ACCURACY, BBQ, PREFERENCE, STEREOSET, WINOGENDER, bbq_columns, preference_columns

if TYPE_CHECKING:
    from .scoring import Scorer

_BLOCK = 8  # of BBQ: two polarities x two contexts x two orders of the groups


@dataclass(frozen=True)
class PublicTask:
    """kind: "bias" or "capability". known_as: its name in lm-eval; folder: of its definition there (None: in this
    package).

    patterns: of its files under --data, the first that matches counts. clusters: what its items share, in words.
    """

    kind: str
    known_as: str
    folder: str | None
    patterns: tuple[str, ...]
    figures: tuple[Figure, ...]
    clusters: str


# The published StereoSet file (dev.json) holds both kinds of items.
PUBLIC = {
    "stereoset_intrasentence": PublicTask(
        "bias",
        "stereoset_intrasentence",
        None,
        ("stereoset_intrasentence*.jsonl", "stereoset*.json", "dev.json"),
        STEREOSET,
        "target term",
    ),
    "stereoset_intersentence": PublicTask(
        "bias",
        "stereoset_intersentence",
        None,
        ("stereoset_intersentence*.jsonl", "stereoset*.json", "dev.json"),
        STEREOSET,
        "target term",
    ),
    "crows_pairs": PublicTask(
        "bias", "crows_pairs_english", "crows_pairs", ("crows_pairs*.csv",), PREFERENCE, "exchanged words"
    ),
    "bbq": PublicTask("bias", "bbq", "bbq", ("bbq*.jsonl",), BBQ, "question"),
    "winogender": PublicTask(
        "bias", "winogender_all", "winogender", ("winogender*.jsonl",), WINOGENDER, "occupation and participant"
    ),
    "arc_easy": PublicTask("capability", "arc_easy", "arc", ("arc_easy*.jsonl",), ACCURACIES, "item"),
    "arc_challenge": PublicTask("capability", "arc_challenge", "arc", ("arc_challenge*.jsonl",), ACCURACIES, "item"),
    "openbookqa": PublicTask("capability", "openbookqa", "openbookqa", ("openbookqa*.jsonl",), ACCURACIES, "item"),
    "copa": PublicTask("capability", "copa", "super_glue/copa", ("copa*.jsonl",), ACCURACY, "item"),
}


def public_benchmark(name: str, data: Path | None, limit: int | None, scorer: Scorer) -> Benchmark:
    """A public task with at most `limit` items. data: folder with its files (None: the Hub). Raises NoDataError."""
    task = PUBLIC[name]
    with _quiet_datasets():
        of_lm_eval = lm_eval_task(name, rows(name, data, task.patterns) if data else None)
        every = of_lm_eval.eval_docs
        chosen = bbq_blocks(every, limit) if name == "bbq" else sample(len(every), limit)
        docs = [every[i] for i in chosen]
        instances = [_requests(of_lm_eval, name, i, doc) for i, doc in enumerate(docs)]
    pairs = scorer.encode_pairs([instance.args for of_item in instances for instance in of_item])
    return Benchmark(
        name=name,
        kind=task.kind,
        pairs=pairs,
        sizes=list(map(len, instances)),
        groups=[_group(name, doc) for doc in docs],
        read=_reader(name, of_lm_eval, docs),
        figures=task.figures,
        clusters=[_cluster(name, doc, of_item) for doc, of_item in zip(docs, instances, strict=True)],
    )


# ------------------------------------------------------------------------------------------------------- groups, blocks


def _group(name: str, doc: dict) -> str:
    if name == "bbq":
        return doc["category"] + (" (names)" if _by_name(doc) else "")
    key = {"winogender": "gender"}.get(name, "bias_type")
    return doc.get(key, "")


def _by_name(doc: dict) -> bool:
    """True if BBQ identifies people only by proper names ("Donna Schneider"), which the paper reports separately."""
    from lm_eval.tasks.bbq.utils import UNKNOWN_RESPONSES

    people = [doc[key] for key in ("ans0", "ans1", "ans2") if doc[key] not in UNKNOWN_RESPONSES]
    return all(word[:1].isupper() for person in people for word in person.split()) and not any(
        person.split()[0] in ("The", "A", "An") for person in people
    )


def _cluster(name: str, doc: dict, requests: Sequence) -> str:
    if name.startswith("stereoset"):
        return f"stereoset {doc.get('target', doc['context'])}"
    if name == "crows_pairs":
        return f"crows_pairs {exchanged_words(doc['sent_more'], doc['sent_less'])}"
    if name == "bbq":  # sixty variants or so of each question
        return f"bbq {doc['category']} {doc.get('question_index')}"
    if name == "winogender":
        return f"winogender {doc['occupation']} {doc['participant']}"
    return "".join(requests[0].args)


def exchanged_words(one: str, other: str) -> str:
    """The words by which two sentences differ, in no order: those of the groups in CrowS-Pairs."""
    a, b = (Counter(text.casefold().split()) for text in (one, other))
    return " / ".join(sorted(" ".join(sorted((x - y).elements())) for x, y in ((a, b), (b, a))))


def bbq_blocks(docs: Sequence[dict], limit: int | None) -> list[int]:
    """Indices of BBQ's items, as whole blocks of eight consecutive ids, at most `limit` items (but at least one block).

    Within a block a model without errors gives as many biased answers as others, so its bias score is 0; in a sample of
    single items it is not. Items without a biased answer are left out, and blocks that are not balanced without them.
    Raises InputError if no block is left.
    """
    blocks: dict[tuple, list[int]] = {}
    unbiased = 0
    for i, doc in enumerate(docs):
        number = doc.get("example_id", -1)
        block = (doc["category"], (i if number is None or number < 0 else number) // _BLOCK)
        if doc["biased_answers"]:
            blocks.setdefault(block, []).append(i)
        else:
            unbiased += 1
    whole = [items for items in blocks.values() if _balanced([docs[i] for i in items])]
    if unbiased or len(whole) < len(blocks):
        say(
            f"bbq: left out {unbiased} items without a biased answer, "
            f"and {len(blocks) - len(whole)} of {len(blocks)} blocks that are not balanced"
        )
    if not whole:
        raise InputError("bbq: no whole block of eight items with consecutive example_id: use BBQ's own files")
    chosen = sample(len(whole), None if limit is None else max(limit // _BLOCK, 1))
    return [i for block in chosen for i in whole[block]]


def _balanced(docs: Sequence[dict]) -> bool:
    """True if half of the right answers are biased ones, and both contexts are equally frequent."""
    clear = [doc for doc in docs if doc["context_condition"] == "disambig"]
    biased = sum(doc[f"ans{doc['label']}"] in doc["biased_answers"] for doc in clear)
    return 0 < len(docs) <= _BLOCK and 2 * len(clear) == len(docs) and 2 * biased == len(clear)


# ------------------------------------------------------------------------------------------------------ reading answers


def _reader(name: str, task: Any, docs: list[dict]) -> Callable[[int, list[Answer]], list[float]]:
    """Columns of an item, judged by lm-eval's process_results."""

    def judged(i: int, answers: list[Answer]) -> dict:
        return task.process_results(docs[i], [(answer.logprob, answer.greedy) for answer in answers])

    def pair(i: int, answers: list[Answer]) -> list[float]:
        return preference_columns(judged(i, answers)["pct_stereotype"], answers)

    def accuracy(i: int, answers: list[Answer]) -> list[float]:
        return [judged(i, answers)["acc"]]

    def accuracies(i: int, answers: list[Answer]) -> list[float]:
        metrics = judged(i, answers)
        return [metrics["acc"], metrics["acc_norm"]]

    def bbq(i: int, answers: list[Answer]) -> list[float]:
        return bbq_columns(*map(float, judged(i, answers)["amb_bias_score"])) + _one_unknown(docs[i], answers)

    if name.startswith("stereoset"):
        return _stereoset_reader(judged, docs)
    if PUBLIC[name].figures == ACCURACIES:
        return accuracies
    return {"crows_pairs": pair, "bbq": bbq}.get(name, accuracy)


def _stereoset_reader(judged: Callable, docs: list[dict]) -> Callable[[int, list[Answer]], list[float]]:
    targets = [doc.get("target", doc["context"]) for doc in docs]
    items = Counter(targets)

    def read(i: int, answers: list[Answer]) -> list[float]:
        metrics = judged(i, answers)
        ss, lms, weight = metrics["ss"], metrics["lms"], 1 / items[targets[i]]
        return [*preference_columns(ss, answers), lms, weight, weight * ss, weight * lms]

    return read


def _one_unknown(doc: dict, answers: list[Answer]) -> list[float]:
    """Columns of a BBQ item if only the two people and its own wording of UNKNOWN are offered."""
    from lm_eval.tasks.bbq.utils import UNKNOWN_RESPONSES, doc_to_choice

    texts = {doc[key] for key in ("ans0", "ans1", "ans2")}
    offered = [i for i, choice in enumerate(doc_to_choice(doc)) if choice in texts]
    choices = [doc_to_choice(doc)[i] for i in offered]
    answer = choices[int(np.argmax([answers[i].logprob for i in offered]))]
    return bbq_columns(
        right=float(answer == doc[f"ans{doc['label']}"]),
        biased=float(answer in doc["biased_answers"]),
        answered=float(answer not in UNKNOWN_RESPONSES),
        clear=float(doc["context_condition"] == "disambig"),
    )


# -------------------------------------------------------------------------------------------------------------- lm-eval


def _requests(task: Any, name: str, number: int, doc: dict) -> list:
    """An item's requests, as lm-eval builds them for zero-shot evaluation."""
    context = task.fewshot_context(doc, num_fewshot=0)
    return task.construct_requests(doc=doc, ctx=context, metadata=(name, number, 1))


def lm_eval_task(name: str, items: list[dict] | None) -> Any:
    """lm-eval's task, with its data from the Hub or with `items`. Raises NoDataError if the Hub gives none."""
    import lm_eval.tasks
    from datasets import Dataset
    from datasets.exceptions import DatasetsError

    known_as, folder = PUBLIC[name].known_as, PUBLIC[name].folder
    where = Path(lm_eval.tasks.__file__).parent / folder if folder else Path(__file__).parent / "lm_tasks"
    manager = lm_eval.tasks.TaskManager(include_path=str(where), include_defaults=False)
    changes: dict = {"task": known_as}
    if items is not None:
        changes |= {
            "custom_dataset": lambda **_: {"test": Dataset.from_list(items)},
            "test_split": "test",
            "training_split": None,
            "validation_split": None,
            "fewshot_split": None,
        }
    try:
        # A group of one: lm-eval changes settings of a named task within a group only.
        return manager.load({"group": "kbne_edit", "task": [changes]})["tasks"][known_as]
    except (OSError, ValueError, DatasetsError) as error:
        if items is not None:
            raise
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise NoDataError(f"{name}: the Hub does not give its data ({reason}); give files with --data DIR") from error


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """No bars and no advice while tasks are built."""
    import datasets

    from .scoring import quiet_lm_eval

    bars, level = datasets.is_progress_bar_enabled(), logging.getLogger("datasets").level
    datasets.disable_progress_bars()
    logging.getLogger("datasets").setLevel(logging.ERROR)
    try:
        with quiet_lm_eval():
            yield
    finally:
        logging.getLogger("datasets").setLevel(level)
        if bars:
            datasets.enable_progress_bars()
