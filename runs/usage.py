"""Usage code for a trained teacher, from one source for model cards and README.md.

python -m runs.usage            write it into README.md, for the embedded run
python -m runs.usage --check    status 1 where README.md says something else
"""

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.log import console
from core.marked_block import with_block
from data.tags import TAG_STYLES, TEACHER_PROMPT_FILE
from planner.constants import lora_rank_slot
from schemas.compose import CONFIG_ROOT, compose_run_config
from schemas.model import ModelArgs
from schemas.run import RunConfig, load_teacher_config

START, END = "<!-- use -->", "<!-- /use -->"
_README_RUN = "teacher_rlt_tiny"
_README_BASE = "~/.cache/rlt/arithmetic-qwen2-v4"
_README_ROW = ("7+4+7-2-9", "=7")


@dataclass(frozen=True, kw_only=True)
class Usage:
    """A teacher, a dataset row for it, and how the code is to name its folder and its base."""

    config: RunConfig
    folder: str
    base: str
    """For vLLM's server; the other ways find it in the adapter."""
    question: str
    solution: str

    def markdown(self) -> str:
        """Three ways, each complete: transformers and peft, vLLM, one merged checkpoint."""
        closing = self._closing_tag()
        rounding = "\n" + _ROUNDING if quantisation(self.config.model_args) else ""
        return f"""\
`{TEACHER_PROMPT_FILE}` beside the adapter is the prompt: it holds question and solution and ends with the opened
explanation tag. What the model writes up to `{closing}` is the explanation.

With transformers and peft, in the run's precision:

```python
{self.with_peft()}
```

With vLLM, in Python or as a server:

```python
{self.with_vllm()}
```

```bash
{self.with_vllm_server()}
```
{rounding}
As one 16-bit checkpoint, for programs that know no adapters. In the environment of the framework:

```bash
python -m models.merge {self.folder} merged
```

Base and adapter are added in float32, on the values that the run trained on. `LLM("merged")`, vLLM's server with
`--model merged` and `AutoModelForCausalLM.from_pretrained("merged")` load the result; it samples as the run did."""

    def with_peft(self) -> str:
        args = self.config.model_args
        quantised = quantisation(args)
        imports = "AutoTokenizer" + (", BitsAndBytesConfig" if quantised else "")
        keywords = [f'dtype="{args.torch_dtype}"', 'device_map="auto"']
        keywords += [f"quantization_config={quantised}"] if quantised else []
        keywords += ["trust_remote_code=True"] if args.trust_remote_code else []
        sampling = {**self._sampling(), "max_new_tokens": self.config.grpo.max_completion_length}
        return f"""{_imports("from peft import AutoPeftModelForCausalLM", f"from transformers import {imports}")}
folder = "{self.folder}"
model = AutoPeftModelForCausalLM.from_pretrained(
{_lines(["folder", *keywords])}
).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
{self._prompt()}
inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").to(model.device)
output = model.generate(
{_lines(["**inputs", "do_sample=True", *(f"{name}={value}" for name, value in sampling.items())])}
)
text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
print(text.partition({literal(self._closing_tag())})[0])"""

    def with_vllm(self) -> str:
        config = self.config
        row_len = config.max_prompt_length + config.grpo.max_completion_length
        lora = f"enable_lora=True, max_lora_rank={lora_rank_slot(config.model_args.lora_r)}"
        trust = ", trust_remote_code=True" if config.model_args.trust_remote_code else ""
        sampling = {
            **self._sampling(),
            "max_tokens": config.grpo.max_completion_length,
            "stop": literal(self._closing_tag()),
        }
        imports = ("from peft import PeftConfig", "from transformers import AutoTokenizer")
        vllm = ("from vllm import LLM, SamplingParams", "from vllm.lora.request import LoRARequest")
        return f"""import os
{_imports(*imports, *vllm)}
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process; a script then needs no main guard
folder = "{self.folder}"
base = PeftConfig.from_pretrained(folder).base_model_name_or_path
llm = LLM(base, dtype="{config.model_args.torch_dtype}", max_model_len={row_len}, {lora}{trust})
tokenizer = AutoTokenizer.from_pretrained(folder)
{self._prompt()}
prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
sampling = SamplingParams(
{_lines(f"{name}={value}" for name, value in sampling.items())}
)
teacher = LoRARequest("teacher", 1, folder)
(output,) = llm.generate({{"prompt_token_ids": prompt_ids}}, sampling, lora_request=teacher)
print(output.outputs[0].text)"""

    def with_vllm_server(self) -> str:
        slot = lora_rank_slot(self.config.model_args.lora_r)
        trust = " --trust-remote-code" if self.config.model_args.trust_remote_code else ""
        return f"""python -m vllm.entrypoints.openai.api_server --model {self.base}{trust} \\
    --enable-lora --max-lora-rank {slot} --lora-modules teacher={self.folder} --host 127.0.0.1
# then POST /v1/completions with "model": "teacher", the prompt, and "add_special_tokens": false"""

    def _prompt(self) -> str:
        return f"""
question = {literal(self.question)}
solution = {literal(self.solution)}
template = Path(folder, "{TEACHER_PROMPT_FILE}").read_text(encoding="utf-8")
prompt = template.replace("{{question}}", question).replace("{{solution}}", solution)"""

    def _sampling(self) -> dict[str, Any]:
        """As the run samples, stated in full: a base brings defaults of its own."""
        grpo = self.config.grpo
        names = ("temperature", "top_p", "top_k", "repetition_penalty", *(["min_p"] if grpo.min_p else []))
        return {name: getattr(grpo, name) for name in names}

    def _closing_tag(self) -> str:
        return TAG_STYLES[self.config.tag_format].explanation.closing


_ROUNDING = """\
vLLM reads the base's own 16-bit weights here, and the adapter was trained on top of their rounded values: close to the
policy that was trained, not equal to it. The merged checkpoint holds the rounded values.
"""


def _lines(arguments: Iterable[str]) -> str:
    return "\n".join(f"    {argument}," for argument in arguments)


def _imports(*lines: str) -> str:
    return "\n".join(["from pathlib import Path", "", *lines, ""])


def quantisation(args: ModelArgs) -> str:
    """The Python expression of the base's quantisation; empty for 16-bit weights."""
    if args.load_in_8bit:
        return f"BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold={args.llm_int8_threshold})"
    if args.load_in_4bit:
        return (
            f'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="{args.bnb_4bit_quant_type}", '
            f"bnb_4bit_use_double_quant={args.bnb_4bit_use_double_quant}, "
            f'bnb_4bit_compute_dtype="{args.torch_dtype}")'
        )
    return ""


def literal(text: str) -> str:
    """A Python expression for a text, one source line per line of the text."""
    lines = [json.dumps(line, ensure_ascii=False) for line in text.splitlines(keepends=True)]
    return (
        "(\n" + "".join(f"    {line}\n" for line in lines) + ")"
        if len(lines) > 1
        else json.dumps(text, ensure_ascii=False)
    )


def readme_part() -> str:
    """The code in README.md: for the embedded run, which everybody has after the first `./launch_mono.sh`."""
    config = load_teacher_config(compose_run_config(_README_RUN))
    question, solution = _README_ROW
    folder = config.grpo.output_dir
    usage = Usage(config=config, folder=folder, base=_README_BASE, question=question, solution=solution)
    return usage.markdown()


def main(words: list[str] | None = None, readme: Path = CONFIG_ROOT.parent / "README.md") -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 where README.md is out of date")
    arguments = parser.parse_args(words)
    old = readme.read_text(encoding="utf-8")
    new = with_block(old, readme_part(), start=START, end=END)
    if arguments.check:
        if old != new:
            console.print("README.md: its use of a teacher is out of date; run python -m runs.usage")
        return int(old != new)
    readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
