"""Chat templates by name, beside what the public descriptions of their formats show."""

import pytest
from jinja2 import StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ties_ray.libraries.chat_templates import TEMPLATES

SAYS = {"role": "system", "content": "Be brief."}
ASKS = {"role": "user", "content": "Why?"}
ANSWERS = {"role": "assistant", "content": "So."}
ASKS_AGAIN = {"role": "user", "content": "And?"}
EXPECTED = {
    "chatml": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
        "<|im_start|>assistant\nSo.<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n"
    ),
    "llama3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nSo.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nAnd?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "mistral": "<s>[INST] Be brief.\n\nWhy? [/INST] So.</s>[INST] And? [/INST]",
    "alpaca": (
        "Be brief.\n\n### Instruction:\nWhy?\n\n### Response:\nSo.</s>\n\n### Instruction:\nAnd?\n\n### Response:\n"
    ),
    "exaone": (
        "[|system|]Be brief.[|endofturn|]\n[|user|]Why?\n[|assistant|]So.[|endofturn|]\n[|user|]And?\n[|assistant|]"
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_named_template_writes_its_format(name: str) -> None:
    assert EXPECTED.keys() == TEMPLATES.keys()
    # transformers renders templates with these settings
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    template = environment.from_string(TEMPLATES[name])
    words = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True}
    assert template.render(messages=[SAYS, ASKS, ANSWERS, ASKS_AGAIN], **words) == EXPECTED[name]
