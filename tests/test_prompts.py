"""Answers to tokens, with tokenizers that are made here."""

import fcntl
import json
import os
import resource
from pathlib import Path

import pytest
from chat import PARTS, SURFACES, save_chat
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kbne_edit import load_recipe
from kbne_edit.errors import CheckpointError, InputError
from kbne_edit.models.confined import confined
from kbne_edit.models.loading import load_tokenizer, read_tokenizer
from kbne_edit.models.prompts import answer_tokens, ask, render
from kbne_edit.models.tokenizers import Tokenizer as Confined


def _tokenizer(*words):
    """Byte-level BPE that knows these words (Ġ: a space) and their beginnings; others fall into single bytes."""
    tokens = dict.fromkeys([*sorted(pre_tokenizers.ByteLevel.alphabet()), *(w[:n] for w in words for n in range(2, 9))])
    merges = [(token[:-1], token[-1]) for token in tokens if len(token) > 1]
    model = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=model)


def _texts(tokenizer, answers):
    result = answer_tokens(tokenizer, answers)
    for surfaces in result.values():
        assert [tokenizer.convert_ids_to_tokens(i) for i in surfaces.values()] == [s.rstrip("…") for s in surfaces]
    return {answer: set(surfaces) for answer, surfaces in result.items()}


def test_every_single_token_that_reads_as_the_answer():
    tokenizer = _tokenizer("yes", "Yes", "Ġyes", "ĠYES", "ĠYes", "no", "No", "Ġno", "ĠNo", "Ġnorth", "yesterday")
    result = _texts(tokenizer, ("yes", "no"))
    assert result == {"yes": {"yes", "Yes", "Ġyes", "ĠYES", "ĠYes"}, "no": {"no", "No", "Ġno", "ĠNo"}}


def test_the_first_of_several_tokens():
    tokenizer = _tokenizer("Ġne", "Ġja", "ĠJa", "Ja", "ja", "Ne", "ne")
    result = _texts(tokenizer, ("ja", "nein"))
    assert tokenizer.tokenize(" Nein")[0] == "Ġ"  # a space alone says nothing
    assert result == {"ja": {"Ja", "Ġja", "ja", "ĠJa"}, "nein": {"ne…", "Ġne…", "Ne…"}}


def test_other_words_that_mean_an_answer():
    """Each token once, though "nope" begins with "no", and none that begins words for both answers."""
    tokenizer = _tokenizer("yes", "Ġyes", "no", "Ġno", "No", "true", "Ġtrue", "so")
    plain = answer_tokens(tokenizer, ("yes", "no"))
    result = answer_tokens(tokenizer, ("yes", "no"), also={"yes": ["true", "so far"], "no": ["nope", "sooth"]})
    assert set(result["yes"]) == {*plain["yes"], "true", "Ġtrue", "T…"}
    assert result["no"] == plain["no"] and len(set(result["no"].values())) == len(result["no"])


def test_neither_half_a_character_nor_a_beginning_that_two_answers_share():
    tokenizer = _tokenizer("not", "Not", "Ġnot", "ĠNot", "sure")
    assert _texts(tokenizer, ("not", "sure"))["not"] == {"not", "Not", "Ġnot", "ĠNot"}
    for answer in ("not sure", "否"):
        with pytest.raises(InputError, match=f"begins the answer '{answer}' and no other.*--answers"):
            answer_tokens(tokenizer, ("not", answer))


def test_answers_by_hand():
    tokenizer = _tokenizer("yes", "no", "ĠNo")
    ids = {word: tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no", "ĠNo")}
    result = answer_tokens(tokenizer, ("yes", "no"), {"yes": ["yes"], "no": ["no", " No"]})
    assert result == {"yes": {"yes": ids["yes"]}, "no": {"no": ids["no"], " No": ids["ĠNo"]}}
    for fixed, message in (({"yes": ["yes"]}, "no surface form for 'no'"), ({"yes": ["yes no"]}, "tokens in this")):
        with pytest.raises(InputError, match=message):
            answer_tokens(tokenizer, ("yes", "no"), fixed)


def _asked(path, count=6, **changes):
    recipe = load_recipe("social-bias")
    given = {"plain": False, "before": "", "fixed": None} | changes
    return recipe.questions[:count], ask(path, recipe, recipe.questions[:count], **given)


def test_a_chat_model_is_asked_through_its_template(chatty):
    """The rendering is Jinja's own; the tokens are those of the tokenizer, without a second BOS."""
    questions, prompts = _asked(chatty)
    tokenizer, chat = AutoTokenizer.from_pretrained(chatty), load_recipe("social-bias").prompt["chat"]
    for question, ids in zip(questions, prompts.ids, strict=True):
        text = (
            "<s><|im_start|>system\nAnswer with yes or no.<|im_end|>\n<|im_start|>user\n"
            + chat.replace("{question}", question.text).strip()
            + "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
        )
        assert tokenizer.decode(ids) == text and ids.count(tokenizer.bos_token_id) == 1
    assert {answer: set(surfaces) for answer, surfaces in prompts.answers.items()} == SURFACES
    assert prompts.ending.endswith("</think>\n\n")


def test_what_comes_before_the_question(chatty):
    questions, prompts = _asked(chatty, before="We spoke of fairness. ")
    tokenizer = AutoTokenizer.from_pretrained(chatty)
    assert all("user\nWe spoke of fairness. " in tokenizer.decode(ids) for ids in prompts.ids)


def test_templates_that_want_parts(tmp_path):
    """SmolVLM's way, LLaVA's way: a string as content is dropped there."""
    path = save_chat(tmp_path / "m", PARTS)
    questions, prompts = _asked(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    for question, ids in zip(questions, prompts.ids, strict=True):
        text = tokenizer.decode(ids)
        assert question.text in text and text.startswith("<s>User: ") and text.endswith("<|im_end|>\nAssistant:")


MESSAGES = "{% for m in messages %}"
BAD = {
    "another role": (
        MESSAGES + "{% if m['role'] == 'human' %}{{ m['content'] }}{% endif %}{% endfor %}A:",
        "drops the question",
    ),
    "an error": ("{{ raise_exception('no\x1b[31m way') }}", r"drops the question \(no\\x1b\[31m way\)"),
    "nothing follows": (MESSAGES + "{{ m['content'] }}{{ eos_token }}{% endfor %}", "ends the prompt with '</s>'"),
}


@pytest.mark.parametrize("name", BAD)
def test_templates_that_do_not_ask(name, tmp_path):
    path = save_chat(tmp_path / "m", BAD[name][0])
    with pytest.raises(InputError, match=f"{BAD[name][1]}.*--prompt plain"):
        _asked(path)
    _asked(path, plain=True)


def test_no_token_follows_the_question(tmp_path):
    """A tokenizer that puts </s> behind a text."""
    path = save_chat(tmp_path / "m", None, ending="</s>")
    tokenizer = AutoTokenizer.from_pretrained(path)
    questions, prompts = _asked(path)
    for question, ids in zip(questions, prompts.ids, strict=True):
        text = load_recipe("social-bias").prompt["plain"].replace("{question}", question.text)
        assert tokenizer(text)["input_ids"] == [*ids, tokenizer.eos_token_id]


def test_questions_that_become_the_same_tokens(tmp_path):
    path = save_chat(tmp_path / "m")
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"Regex": "[A-Z][a-z]+ .*[?]"}, "content": "x"}
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(InputError, match="6 questions become . different prompts"):
        _asked(path, plain=True)


def test_a_template_in_a_file_of_its_own(tmp_path):
    path = save_chat(tmp_path / "m")
    expected = _asked(path)[1]
    template = (path / "chat_template.jinja").read_text()
    (path / "chat_template.jinja").unlink()
    (path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert _asked(path)[1] == expected


def test_a_pointer_in_place_of_the_tokenizer(tmp_path):
    path = save_chat(tmp_path / "m")
    (path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is a pointer of Git LFS.*git lfs pull"):
        _asked(path)


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}x"


def _with_normalizer(path, normalizer):
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    (path / "tokenizer.json").write_text(json.dumps(tokenizer | {"normalizer": normalizer}))
    return path


def test_a_template_that_never_ends(tmp_path):
    path = save_chat(tmp_path / "m", LOOP)
    with pytest.raises(CheckpointError, match="takes more than 1 s, the limit"):
        confined(path, lambda: render(read_tokenizer(path), "Is it?"), seconds=1)


def test_a_normaliser_that_doubles(tmp_path):
    double = {"type": "Replace", "pattern": {"String": "e"}, "content": "ee"}
    path = _with_normalizer(save_chat(tmp_path / "m"), {"type": "Sequence", "normalizers": [double] * 40})
    with pytest.raises(CheckpointError, match="takes more than .*, the limit"):
        confined(path, lambda: read_tokenizer(path)("e" * 100)["input_ids"], seconds=2, memory=300 << 20)


def test_a_child_says_what_it_met():
    path = Path("m")
    assert confined(path, lambda a, b: {"sum": a + b}, 1, 2) == {"sum": 3}
    with pytest.raises(InputError, match="^of the work itself$"):
        confined(path, _raise, InputError("of the work itself"))
    with pytest.raises(CheckpointError, match="^transformers cannot use m: first line$"):
        confined(path, _raise, ValueError("first line\nsecond"))
    with pytest.raises(CheckpointError, match="more than 0.25 GB of memory"):
        confined(path, lambda: len(bytearray(1 << 30)), memory=1 << 28)
    with pytest.raises(CheckpointError, match="ended its process"):
        confined(path, os._exit, 3)
    assert confined(path, lambda: resource.getrlimit(resource.RLIMIT_CPU)[0], seconds=3) == 3


def _raise(error):
    raise error


def test_the_same_tokenizer_is_loaded_once(chatty, monkeypatch):
    first = load_tokenizer(chatty)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", _raise)
    assert load_tokenizer(chatty) is first


def test_the_tokenizer_of_the_child_is_that_of_transformers(chatty):
    ours, theirs = load_tokenizer(chatty), read_tokenizer(chatty)
    for text in ("Is it fair?", "Äöü 为什么", ""):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"] == ours.encode(text)
        plain = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours(text, add_special_tokens=False)["input_ids"] == plain
        assert ours.decode(plain) == theirs.decode(plain)
        assert ours.decode(theirs(text)["input_ids"], skip_special_tokens=True) == text
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.convert_ids_to_tokens(5) == theirs.convert_ids_to_tokens(5)
    assert render(ours, "Is it?") == render(theirs, "Is it?")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "eos_token", "vocab_size"):
        assert getattr(ours, name) == getattr(theirs, name), name


def test_a_tokenizer_that_explodes_after_its_first_texts(tmp_path):
    double = {"type": "Replace", "pattern": {"String": "zq"}, "content": "zqzq"}
    path = _with_normalizer(save_chat(tmp_path / "m"), {"type": "Sequence", "normalizers": [double] * 40})
    tokenizer = Confined(path, read_tokenizer, seconds=2, memory=300 << 20)
    expected = tokenizer("Is it fair?")
    for _ in range(2):  # and the next text is read by another child
        with pytest.raises(CheckpointError, match="takes more than .*, the limit: use another model"):
            tokenizer("Is it zq?")
        assert tokenizer("Is it fair?") == expected


def test_a_tokenizer_that_makes_much_of_little(tmp_path):
    many = {"type": "Replace", "pattern": {"String": "q"}, "content": "ab " * 999}
    tokenizer = load_tokenizer(_with_normalizer(save_chat(tmp_path / "m"), many))
    assert tokenizer("Is it?")["input_ids"]
    with pytest.raises(CheckpointError, match=r"makes \d{4} tokens of 1 characters \(the limit is 100 a character\)"):
        tokenizer("q")


def test_a_fork_has_a_tokenizer_of_its_own(chatty):
    tokenizer = load_tokenizer(chatty)
    expected = tokenizer("Is it fair?")
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        os.write(write, json.dumps([tokenizer("Is it fair?"), len(_children())]).encode())
        os._exit(0)
    assert json.loads(os.read(read, 1 << 16)) == [expected, 1]
    os.waitpid(child, 0)
    os.close(read)
    os.close(write)
    assert tokenizer("Is it fair?") == expected


def test_the_child_ends_with_its_tokenizer_and_holds_no_lock(chatty, tmp_path):
    """What a bake locks, the next one in the same process can lock again."""
    children = set(_children())
    with open(tmp_path / "lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        tokenizer = Confined(chatty, read_tokenizer)
    with open(tmp_path / "lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert set(_children()) - children
    del tokenizer
    assert not set(_children()) - children


def _children():
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


def test_a_template_that_writes_the_date_writes_the_same_one_every_day(tmp_path):
    path = save_chat(tmp_path / "m", "{{ strftime_now('%d %b %Y') }}: {{ messages[0]['content'] }}")
    assert render(load_tokenizer(path), "Is it?") == "01 Jan 2025: Is it?"
