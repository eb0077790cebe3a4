"""A tiny chat model with variety: a template, a system prompt, several surfaces of each answer, not equally many.

The demo has one token an answer and no template, so that much of what can go wrong with either shows nowhere there.
"""

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# Four surfaces of yes, three of no: " no" is a space and "no".
WORDS = ("Yes", "yes", "ĠYes", "Ġyes", "No", "no", "ĠNo", "Ġform", "Ġbias", "Ġgroup", "Ġa", "Ġof", "Is", "Ġpeople")
SURFACES = {"yes": {"Yes", "yes", "ĠYes", "Ġyes"}, "no": {"No", "no", "ĠNo"}}
TEMPLATE = (
    "{{ bos_token }}<|im_start|>system\nAnswer with yes or no.<|im_end|>\n"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}"
    "{% endif %}"
)
# Multimodal templates go through the parts of a message's content; a string has none.
PARTS = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] | capitalize }}: {% for part in m['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
SPECIAL = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")


def chat_tokenizer(template=TEMPLATE, ending=""):
    """ending: a special token that the tokenizer puts behind a text, such as "</s>"."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = dict.fromkeys([*SPECIAL, *alphabet, *(word[:n] for word in WORDS for n in range(2, len(word) + 1))])
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = [(piece[:-1], piece[-1]) for piece in pieces if len(piece) > 1 and piece not in SPECIAL]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"<s> $A {ending}".strip(), special_tokens=[(token, vocabulary[token]) for token in SPECIAL]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = template
    return fast


def chat_model(dtype=torch.float32, **changes):
    torch.manual_seed(7)
    size = dict(vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    size |= dict(num_key_value_heads=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model = LlamaForCausalLM(LlamaConfig(**size | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    return model.to(dtype).eval()


def save_chat(path, template=TEMPLATE, ending="", dtype=torch.float32, **changes):
    """The model's directory, for `--in`."""
    chat_model(dtype, **changes).save_pretrained(path)
    chat_tokenizer(template, ending).save_pretrained(path)
    return path
