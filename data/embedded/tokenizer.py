"""The tokenizer of the embedded models: one token per byte, and one for each fixed piece of their prompts."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data.embedded.task import STUDENT_SYSTEM_SHORT, TEACHER_SYSTEM_SHORT
from data.formats import PromptFormat

EMBEDDED_FORMAT = PromptFormat.from_styles(tag_format="bespoke", prompt_style="short")
"""Tags and prompts of the texts that the embedded model is made from."""

_SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_CHAT_PHRASES = ("system\n", "user\n", "assistant\n", "\n\n")
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, ChatML, and one token for each tag and fixed phrase of the prompts.

    Tags are no special tokens: decoding with `skip_special_tokens=True` must keep them.
    """
    bytes_vocab = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=bytes_vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in _SPECIAL_TOKENS])
    phrases = (*EMBEDDED_FORMAT.tags.all_tags, TEACHER_SYSTEM_SHORT, STUDENT_SYSTEM_SHORT, *_CHAT_PHRASES)
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in phrases])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=_CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
