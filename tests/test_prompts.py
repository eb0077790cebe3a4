"""Answers to tokens, with tokenizers that are made here."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kbne_edit.errors import InputError
from kbne_edit.models.prompts import answer_tokens


def _tokenizer(*words):
    """Byte-level BPE that knows these words (Ġ: a space) and their beginnings; others fall into single bytes."""
    tokens = dict.fromkeys([*sorted(pre_tokenizers.ByteLevel.alphabet()), *(w[:n] for w in words for n in range(2, 9))])
    merges = [(token[:-1], token[-1]) for token in tokens if len(token) > 1]
    model = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=model)


def _texts(tokenizer, answers):
    found = answer_tokens(tokenizer, answers)
    for surfaces in found.values():
        assert [tokenizer.convert_ids_to_tokens(i) for i in surfaces.values()] == [s.rstrip("…") for s in surfaces]
    return {answer: set(surfaces) for answer, surfaces in found.items()}


def test_every_single_token_that_reads_as_the_answer():
    tokenizer = _tokenizer("yes", "Yes", "Ġyes", "ĠYES", "ĠYes", "no", "No", "Ġno", "ĠNo", "Ġnorth", "yesterday")
    found = _texts(tokenizer, ("yes", "no"))
    assert found == {"yes": {"yes", "Yes", "Ġyes", "ĠYES", "ĠYes"}, "no": {"no", "No", "Ġno", "ĠNo"}}


def test_the_first_of_several_tokens():
    tokenizer = _tokenizer("Ġne", "Ġja", "ĠJa", "Ja", "ja", "Ne", "ne")
    found = _texts(tokenizer, ("ja", "nein"))
    assert tokenizer.tokenize(" Nein")[0] == "Ġ"  # a space alone says nothing
    assert found == {"ja": {"Ja", "Ġja", "ja", "ĠJa"}, "nein": {"ne…", "Ġne…", "Ne…"}}


def test_neither_half_a_character_nor_a_beginning_that_two_answers_share():
    tokenizer = _tokenizer("not", "Not", "Ġnot", "ĠNot", "sure")
    assert _texts(tokenizer, ("not", "sure"))["not"] == {"not", "Not", "Ġnot", "ĠNot"}
    for answer in ("not sure", "否"):
        with pytest.raises(InputError, match=f"begins the answer '{answer}' and no other.*--answers"):
            answer_tokens(tokenizer, ("not", answer))


def test_answers_by_hand():
    tokenizer = _tokenizer("yes", "no", "ĠNo")
    ids = {word: tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no", "ĠNo")}
    found = answer_tokens(tokenizer, ("yes", "no"), {"yes": ["yes"], "no": ["no", " No"]})
    assert found == {"yes": {"yes": ids["yes"]}, "no": {"no": ids["no"], " No": ids["ĠNo"]}}
    for fixed, message in (({"yes": ["yes"]}, "no surface form for 'no'"), ({"yes": ["yes no"]}, "tokens in this")):
        with pytest.raises(InputError, match=message):
            answer_tokens(tokenizer, ("yes", "no"), fixed)
