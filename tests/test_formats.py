"""Prompts and chats are built from their pieces, whatever the chat template adds."""

import copy

import pytest
from transformers import PreTrainedTokenizerBase

from core.errors import UserError
from data.formats import PromptFormat
from data.tags import PROMPT_STYLES, TAG_STYLES
from schemas.compose import compose_run_config
from schemas.data import DataConfig
from schemas.run import load_run_config
from tests.helpers.golden import golden_tokenizer

# Adds a system prompt of its own where none is given, trims contents and begins with a special token, as Llama's does.
DEFAULTING_TEMPLATE = (
    "<|endoftext|>{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
)


def with_template(template: str | None) -> PreTrainedTokenizerBase:
    tokenizer = copy.deepcopy(golden_tokenizer())
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("tag_format", TAG_STYLES)
@pytest.mark.parametrize("prompt_style", PROMPT_STYLES)
def test_prompt_holds_question_and_solution_and_ends_in_the_opened_explanation(
    tag_format: str, prompt_style: str
) -> None:
    config = DataConfig(dataset_id_or_path="x", tag_format=tag_format, prompt_style=prompt_style)
    prompt_format = PromptFormat.from_config(config)
    tags = TAG_STYLES[tag_format]
    text = prompt_format.teacher_prompt_text(golden_tokenizer(), "Why?", "Because.")
    assert "<|im_start|>user\nWhy?<|im_end|>\n" in text
    assert text.endswith(
        f"<|im_start|>assistant\n{tags.solution.opening}Because.{tags.solution.closing}\n\n"
        f"{tags.explanation.opening}\n\n"
    )


@pytest.mark.parametrize("tag_format", TAG_STYLES)
def test_system_prompts_name_the_tags_of_their_own_style_only(tag_format: str) -> None:
    prompt_format = PromptFormat.from_styles(tag_format, "stratos")
    tags = prompt_format.tags
    teacher, student = prompt_format.teacher_system_prompt, prompt_format.student_system_prompt
    assert all(pair.opening in teacher and pair.closing in teacher for pair in (tags.solution, tags.explanation))
    assert all(pair.opening in student and pair.closing in student for pair in (tags.solution, tags.thought))
    assert tags.thought.opening not in teacher and tags.explanation.opening not in student


@pytest.mark.parametrize("template", [golden_tokenizer().chat_template, DEFAULTING_TEMPLATE])
def test_student_chat_is_what_the_template_makes_of_the_whole_answer(template: str) -> None:
    tokenizer, prompt_format = with_template(template), PromptFormat.from_styles("bespoke", "short")
    tail = prompt_format.student_tail(tokenizer, "Why?", "Because.")
    text = prompt_format.student_head_text(tokenizer, "Why?") + "It is so.\n\n" + tail.text
    tags = prompt_format.tags
    answer = tags.thought.wrap("\n\nIt is so.\n\n") + "\n\n" + tags.solution.wrap("Because.")
    messages = [
        {"role": "system", "content": prompt_format.student_system_prompt},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": answer},
    ]
    assert text == tokenizer.apply_chat_template(messages, tokenize=False)
    assert tail.text[tail.solution_start : tail.solution_end] == "Because."
    assert "Be kind." not in text


def test_teacher_prompt_and_completion_make_the_whole_turn_with_and_without_padding_in_the_trace() -> None:
    prompt_format, tags = PromptFormat.from_styles("bespoke", "short"), TAG_STYLES["bespoke"]
    answer = tags.solution.wrap("4") + "\n\n" + tags.explanation.wrap("\n\n2 and 2\n\n")
    for trace in ("\n\n2 and 2\n\n", "2 and 2\n\n"):
        text = prompt_format.teacher_prompt_text(golden_tokenizer(), "2+2", "4")
        text += prompt_format.teacher_completion_text(golden_tokenizer(), "2+2", trace)
        assert text.endswith(f"<|im_start|>assistant\n{answer}<|im_end|>\n")


@pytest.mark.parametrize(
    "question", ["[[content of the assistant]]", "{question} {{x}} {% if %}", "<|end_of_solution|>"]
)
def test_a_question_cannot_move_the_cut(question: str) -> None:
    prompt_format = PromptFormat.from_styles("bespoke", "short")
    text = prompt_format.student_head_text(golden_tokenizer(), question)
    assert f"<|im_start|>user\n{question}<|im_end|>" in text
    assert text.endswith("<|im_start|>assistant\n<|begin_of_thought|>\n\n")


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{{ raise_exception('System role not supported') }}",
        "{% for m in messages if m.role != 'assistant' %}{{ m.content }}{% endfor %}",
    ],
)
def test_an_unusable_chat_template_is_refused_with_the_reason(template: str | None) -> None:
    with pytest.raises(UserError, match="chat template"):
        PromptFormat.from_styles("bespoke", "short").student_head_text(with_template(template), "Why?")


# As Llama 3's first template and LLaDA's: the next answer's header stands behind every conversation.
ALWAYS_PROMPTING_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n\n{{ m.content | trim }}<|im_end|>{% endfor %}"
    "{{ '<|im_start|>assistant\n\n' }}"
)


def test_an_answer_ends_with_its_turn_where_the_template_opens_another_behind_everything() -> None:
    tokenizer = with_template(ALWAYS_PROMPTING_TEMPLATE)
    prompt_format = PromptFormat.from_config(DataConfig(dataset_id_or_path="x"))
    tail = prompt_format.student_tail(tokenizer, "1+1", "=2")
    assert tail.text.endswith("=2" + prompt_format.tags.solution.closing + "<|im_end|>")
    head = prompt_format.student_head_text(tokenizer, "1+1")
    assert head.count("<|im_start|>assistant") == 1


def test_variables_of_the_chat_template_reach_the_teachers_and_the_students_prompt():
    tokenizer = with_template("{% if no_think %}[no thinking]{% endif %}" + golden_tokenizer().chat_template)
    values = compose_run_config("teacher_rlt_tiny", ["chat_template_kwargs={no_think: true}"])
    given, plain = PromptFormat.from_config(load_run_config(values)), PromptFormat.from_styles("bespoke", "short")
    for text in (
        lambda style: style.teacher_prompt_text(tokenizer, "1+1?", "2"),
        lambda style: style.student_head_text(tokenizer, "1+1?"),
    ):
        assert text(given) == "[no thinking]" + text(plain)
