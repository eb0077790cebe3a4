"""Asking: what is shown is what the models say, by a plain loop over transformers' own forward pass."""

import pytest
import torch
from click.testing import CliRunner
from printed import parsed
from transformers import AutoModelForCausalLM, AutoTokenizer

from kbne_edit import Edit, ask, fold
from kbne_edit.commands import cli
from kbne_edit.hub.source import DEMO
from kbne_edit.models.generation import Sampling, generate

PROMPTS = ["is the clan of the hill", "the village"]
EDIT = Edit("down", {0: {n: 8.0 for n in range(60)}})


@pytest.fixture(scope="module")
def edited(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ask") / "edited"
    fold(DEMO, EDIT, folder)
    return folder


def greedy(folder, prompt, count):
    """The most probable token, again and again, without a cache."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    for _ in range(count):
        with torch.inference_mode():
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(token)
        if token == model.generation_config.eos_token_id:
            break
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_greedy_replies_are_those_of_a_plain_loop(edited):
    replies = ask(str(edited), PROMPTS, against="demo", sampling=Sampling(6), plain=True)
    assert [reply.prompt for reply in replies] == PROMPTS
    assert [reply.edited for reply in replies] == [greedy(edited, prompt, 6) for prompt in PROMPTS]
    assert [reply.base for reply in replies] == [greedy(DEMO, prompt, 6) for prompt in PROMPTS]
    assert replies[0].edited != replies[0].base  # or one model could stand for both


def test_hooks_say_what_the_file_says(edited):
    by_hooks = ask("demo", PROMPTS, edit=EDIT, sampling=Sampling(6))
    assert by_hooks == ask(str(edited), PROMPTS, against="demo", sampling=Sampling(6))


def test_without_a_base_nothing_is_compared(edited):
    (reply,) = ask(str(edited), PROMPTS[:1], sampling=Sampling(2))
    assert reply.base is None and reply.edited


def test_draws_follow_the_seed_and_leave_torch_s_alone():
    first, again, other = (
        ask("demo", PROMPTS[:1], edit=EDIT, sampling=Sampling(12, temperature=2.0, seed=seed)) for seed in (3, 3, 4)
    )
    assert first == again and first != other
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    ask("demo", PROMPTS[:1], edit=EDIT, sampling=Sampling(3, temperature=2.0, seed=3))
    assert torch.equal(torch.rand(1), expected)


def test_the_stream_is_the_text():
    model, tokenizer = AutoModelForCausalLM.from_pretrained(DEMO), AutoTokenizer.from_pretrained(DEMO)
    pieces = []
    text = generate(model, tokenizer, tokenizer(PROMPTS[0])["input_ids"], Sampling(6), pieces.append)
    assert len(pieces) > 1 and "".join(pieces).strip() == text.strip()


def run(*arguments, **kwargs):
    return CliRunner().invoke(cli, ["ask", *map(str, arguments)], **kwargs)


def test_command(edited, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text(f"\n{PROMPTS[1]}\n", encoding="utf-8-sig")
    result = run(edited, PROMPTS[0], "--against", "demo", "--file", file, "--max-tokens", 4, "--json")
    assert result.exit_code == 0, result.output
    actual = parsed("ask", result.stdout)
    expected = ask(str(edited), PROMPTS, against="demo", sampling=Sampling(4))
    assert actual == {"version": 1, "replies": [reply.to_dict() for reply in expected]}
    lines = run(edited, *PROMPTS, "--against", "demo", "--max-tokens", 4).stdout.splitlines()
    assert lines[0] == f"> {PROMPTS[0]}" and lines[1].startswith("  base:") and lines[2].startswith("  edited:")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "give the edited directory"),
        (("--edit", "edit.json"), "--edit needs --in"),
        (("folder", "--in", "demo"), "give the edited directory"),
        (("folder",), "there is no prompt"),
        (("folder", "--file", "/dev/zero"), "not a regular file"),
    ],
)
def test_wrong_arguments(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    EDIT.save(tmp_path / "edit.json")
    result = run(*arguments, input="")
    assert result.exit_code != 0 and message in result.output + str(result.exception)
