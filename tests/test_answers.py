"""How a model answers: right, by answer, constant, and whether an answer is what it says next at all."""

import numpy as np
import pytest
import torch
from chat import SURFACES, TEMPLATE, chat_model, save_chat
from transformers import AutoModelForCausalLM, AutoTokenizer

from kbne_edit import Checks, Edit, Settings, bake, load_scores, locate
from kbne_edit.attribution.answers import SMALL, Answers, AttributionSummary, Mass, Tally
from kbne_edit.attribution.scores import Row, Scores, ScoresWriter
from kbne_edit.errors import CheckpointError, InputError, ScoresError
from kbne_edit.models.bounds import check_tokens
from kbne_edit.recipe import Question
from kbne_edit.statistics import wilson

ASKED = Settings(recipe="social-bias", questions=24, quadrature="gauss-2")


def _scores(right, answers, controls, **changes):
    """right, answers, controls: of each question."""
    n = len(right)
    questions = tuple(
        Question(f"q{i}", a, "d", f"f{i % 2}", c) for i, (a, c) in enumerate(zip(answers, controls, strict=True))
    )
    p = np.where(right, 0.6, 0.2).astype(np.float32)
    given = {"p_answers": p + 0.3} | changes
    return Scores(
        np.zeros((n, 1, 2)),
        p,
        0 * p + 0.3,
        np.full((n, 1), 0.25),
        np.full((n, 1), 3),
        questions,
        {},
        "down",
        "b",
        **given,
    )


RIGHT = [True, True, False, True, False, True, True, True]
ANSWERS = ["yes", "yes", "yes", "no", "no", "yes", "no", "no"]
CONTROLS = [False] * 5 + [True] * 3


def test_counts_by_hand():
    answers = Answers.of(_scores(RIGHT, ANSWERS, CONTROLS))
    assert (answers.questions, answers.controls) == ((3, 5), (3, 3))
    assert answers.by_answer == {"no": Tally(1, 2), "yes": Tally(2, 3)}
    assert answers.by_form == {"f0": Tally(1, 3), "f1": Tally(2, 2)}
    assert answers.wrong == ("q2", "q4")
    assert answers.balanced.value == (3 / 4 + 3 / 4) / 2
    assert answers.balanced[1:] == pytest.approx(wilson(3, 4))
    assert answers.constant is not None and "3 of 5" in repr(answers)


@pytest.mark.parametrize("share, constant", [(0.9, None), (0.5, "no")])
def test_the_same_answer_to_everything(share, constant):
    """40 of each answer: "no" is always right; of "yes" so many that the mean is `share`."""
    yes = round(40 * (2 * share - 1))
    right = [True] * 40 + [True] * yes + [False] * (40 - yes)
    answers = Answers.of(_scores(right, ["no"] * 40 + ["yes"] * 40, [False] * 80))
    assert answers.balanced.value == pytest.approx(share) and answers.constant == constant


def test_of_three_answers_a_constant_one_has_a_third():
    answers = ["a", "b", "c"] * 30
    result = Answers.of(_scores([a == "b" for a in answers], answers, [False] * 90))
    assert result.balanced.value == pytest.approx(1 / 3) and result.constant == "b"
    half = Answers.of(_scores([a == "b" or i % 4 == 0 for i, a in enumerate(answers)], answers, [False] * 90))
    assert half.balanced.value == pytest.approx(0.5, abs=0.02) and half.constant is None


def test_worse_than_constant_is_not_constant():
    answers = Answers.of(_scores([False] * 80, ["no", "yes"] * 40, [False] * 80))
    assert answers.constant is None and answers.balanced.high < 0.5


def test_mass_by_hand():
    assert Mass.of([0.05, 0.2, 0.3, 0.09]) == (pytest.approx(0.145), 0.5) and not Mass.of([0.05, 0.2, 0.3]).small
    assert Mass.of([0.05, 0.02, 0.3]).small and SMALL == 0.1


@pytest.mark.parametrize("mass", [{}, {"p_answers": None}])
def test_json_and_back(mass):
    summary = AttributionSummary.of(_scores(RIGHT, ANSWERS, CONTROLS, **mass))
    record = summary.to_dict()
    assert AttributionSummary.from_dict(record) == summary and ("mass" in record) == (mass == {})
    assert (record["largest_residual"], record["nodes_per_layer"]) == (0.25, 3.0)
    old = {key: value for key, value in record.items() if key != "mass"} | {"constant": True}
    assert AttributionSummary.from_dict(old).answers.constant == "yes"  # as far as an earlier version tells
    for key in record:
        if key != "mass":
            with pytest.raises(CheckpointError, match="did not write"):
                AttributionSummary.from_dict({k: v for k, v in record.items() if k != key})


def test_probabilities_are_those_of_a_plain_softmax(chatty, tmp_path):
    """Sums over all surfaces of an answer, from one forward pass of each prompt alone."""
    scores = locate(str(chatty), tmp_path / "s.safetensors", ASKED)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(chatty).eval(), AutoTokenizer.from_pretrained(chatty)
    from kbne_edit import load_recipe

    chat = load_recipe("social-bias").prompt["chat"]
    ids = {answer: tokenizer.convert_tokens_to_ids(sorted(SURFACES[answer])) for answer in SURFACES}
    for q, question in enumerate(scores.questions):
        message = [{"role": "user", "content": chat.replace("{question}", question.text)}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True, enable_thinking=False)
        with torch.no_grad():
            logits = model(torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])).logits[0, -1]
        p = {answer: float(logits.double().softmax(-1)[ids[answer]].sum()) for answer in ids}
        other = "no" if question.answer == "yes" else "yes"
        assert scores.p[q] == pytest.approx(p[question.answer], rel=1e-4)
        assert scores.p_best_wrong[q] == pytest.approx(p[other], rel=1e-4)
        assert scores.p_answers[q] == pytest.approx(p["yes"] + p["no"], rel=1e-4)


def test_a_small_mass_is_said_first(chatty, tmp_path, caplog):
    caplog.set_level("INFO", "kbne_edit")
    locate(str(chatty), tmp_path / "s.safetensors", ASKED)
    (reply,) = [line for line in caplog.messages if "all answers together have a probability of" in line]
    assert reply.startswith("warning: ") and "--prompt plain" in reply


def test_a_template_that_leaves_its_thinking_open(tmp_path, caplog):
    caplog.set_level("INFO", "kbne_edit")
    path = save_chat(
        tmp_path / "m", TEMPLATE.replace("{% if enable_thinking is defined and not", "{% if false and not")
    )
    locate(str(path), tmp_path / "s.safetensors", ASKED)
    assert "the chat template opens <think>" in caplog.text


def test_the_same_to_everything_is_a_doubt_after_the_first_questions(tmp_path):
    """With a final norm of almost nothing all tokens are as likely, and "yes" has four surfaces, "no" three."""
    path, model, doubts = save_chat(tmp_path / "m"), chat_model(), []
    with torch.no_grad():
        model.model.norm.weight.mul_(1e-4)
    model.save_pretrained(path)

    def stop(doubt):
        doubts.append(doubt)
        if "to each of the first" in doubt.reason:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        locate(str(path), tmp_path / "s.safetensors", ASKED, doubtful=stop)
    assert [doubt.part for doubt in doubts] == ["answers", "answers"] and "'yes'" in doubts[-1].reason
    doubts.clear()
    locate(str(path), tmp_path / "s.safetensors", ASKED, doubtful=doubts.append)
    assert len(doubts) == 2  # each once, and the run goes on
    assert Answers.of(load_scores(tmp_path / "s.safetensors")).constant == "yes"


def test_a_large_mass_is_nothing_to_warn_of(tmp_path, caplog):
    caplog.set_level("INFO", "kbne_edit")
    locate("demo", tmp_path / "s.safetensors", Settings(recipe="demo", questions=9, quadrature="gauss-2"))
    assert "warning" not in caplog.text
    assert load_scores(tmp_path / "s.safetensors").p_answers.min() > SMALL


def test_tokens_beyond_the_embedding(tmp_path):
    path = save_chat(tmp_path / "m", vocab_size=270)
    with pytest.raises(InputError, match=r"gives token 2\d\d, but the model has embeddings for 270 tokens"):
        locate(str(path), tmp_path / "s.safetensors", ASKED)


@pytest.mark.parametrize("positions", [16, 64])
def test_prompts_beyond_the_positions(positions, tmp_path):
    path = save_chat(tmp_path / "m", max_position_embeddings=positions)
    with pytest.raises(InputError, match=rf"a text has \d+ tokens, the model takes {positions}"):
        locate(str(path), tmp_path / "s.safetensors", ASKED)


def test_a_base_that_gives_no_numbers(tmp_path):
    """In float16 it overflows, in float32 it does not: what is said is the dtype."""
    path = save_chat(tmp_path / "m")
    model = chat_model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1e7)
    model.save_pretrained(path)
    with pytest.raises(InputError, match="the base gives .* in place of logits, in float16: float32 may hold"):
        locate(str(path), tmp_path / "s.safetensors", Settings(recipe="social-bias", questions=24, dtype="float16"))


def test_templates_decide_whether_scores_are_taken_up(tmp_path):
    """The same weights with another template are asked something else: their scores are not reused."""
    path, out = save_chat(tmp_path / "m"), tmp_path / "s.safetensors"
    locate(str(path), out, ASKED)
    (path / "chat_template.jinja").write_text(TEMPLATE.replace("Answer with yes or no.", "Be brief."))
    with pytest.raises(InputError, match="begun with another model, recipe or setting"):
        locate(str(path), out, ASKED)


@pytest.mark.parametrize(
    "changes", [{"vocab_size": 270}, {"max_position_embeddings": 16}, {"max_position_embeddings": 64}]
)
def test_a_proof_of_a_model_that_cannot_be_asked(changes, tmp_path):
    """One line, where the forward pass would end in an IndexError."""
    path = save_chat(tmp_path / "m", **changes)
    with pytest.raises(InputError, match="embeddings for 270 tokens|the model takes (16|64)"):
        bake(str(path), tmp_path / "out", edit=Edit("down", {0: {1: 2.0}}), checks=Checks(measure=False))
    assert not (tmp_path / "out").exists()


def test_a_proof_of_a_base_that_gives_no_numbers(tmp_path):
    path, model = save_chat(tmp_path / "m"), chat_model()
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[0, 0] = torch.nan
    model.save_pretrained(path)
    with pytest.raises(InputError, match="the base gives NaN in place of logits, in float32: its weights are damaged"):
        bake(str(path), tmp_path / "out", edit=Edit("down", {1: {1: 2.0}}), checks=Checks(measure=False))
    assert not (tmp_path / "out").exists()


def test_a_scores_file_of_an_earlier_version(tmp_path):
    """Without the probability of all answers, which two answers give all the same."""
    from safetensors import safe_open
    from safetensors.numpy import save_file

    path = tmp_path / "s.safetensors"
    new = locate("demo", path, Settings(recipe="demo", questions=9, quadrature="gauss-2"))
    with safe_open(path, "np") as file:
        tensors, about = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    del tensors["p_answers"]
    save_file(tensors, path, about)
    old = load_scores(path)
    assert (old.values == new.values).all() and np.allclose(old.p_answers, new.p_answers, rtol=1e-6)


def test_the_last_token_and_the_last_position_are_taken():
    model = chat_model(max_position_embeddings=64)  # of 320 tokens
    check_tokens(model, [0, 319], [0, 63])
    for ids, positions in (([320], [0]), ([1], [64])):
        with pytest.raises(InputError):
            check_tokens(model, ids, positions)


def test_scores_that_are_no_numbers_are_not_written(tmp_path):
    settings = {"site": "down", "base": "b", "model": "m", "recipe": "r"}
    questions = (Question("Is it?", "yes", "d", "f"), Question("Was it?", "yes", "d", "f"))
    writer = ScoresWriter(tmp_path / "s.safetensors", questions, 1, 2, settings)
    for scores, p in ((np.array([[1.0, np.nan]]), 0.5), (np.zeros((1, 2)), np.inf)):
        with pytest.raises(ScoresError, match="not finite"):
            writer.write(0, Row(scores, p, 0.1, 0.6, 0.0, 0.0, 3))
    for q, p in enumerate((0.4, 0.6)):  # right is what is likelier than every other answer
        with pytest.raises(ScoresError, match=rf"unfinished \({q} questions"):
            load_scores(tmp_path / "s.safetensors")
        writer.write(q, Row(np.ones((1, 2)), p, 0.3 + q / 2, 0.9, 0.0, 0.0, 3))
    writer.close()
    assert load_scores(tmp_path / "s.safetensors").correct.tolist() == [True, False]
