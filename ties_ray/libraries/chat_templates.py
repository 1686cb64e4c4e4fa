"""Chat templates by name, in Jinja, written from the public descriptions of their formats."""

from collections.abc import Mapping

_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""Each message stands between two tokens, after its role."""
_LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
"""Each message follows a header with its role, and ends with a token.
https://www.llama.com/docs/model-cards-and-prompt-formats/meta-llama-3/"""
_MISTRAL = (
    "{{ bos_token }}{% set told = namespace(system='') %}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{% set told.system = message['content'] + '\\n\\n' %}"
    "{% elif message['role'] == 'user' %}{{ '[INST] ' + told.system + message['content'] + ' [/INST]' }}"
    "{% set told.system = '' %}"
    "{% else %}{{ ' ' + message['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)
"""Each question stands between [INST] and [/INST], the first one after what the system says; answers end a sequence.
https://docs.mistral.ai/cookbooks/concept-deep-dive-tokenization-chat_templates"""
_ALPACA = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '### Instruction:\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ '### Response:\\n' }}{% endif %}"
    "{{ message['content'] | trim }}{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
)
"""Each message stands under a heading. https://github.com/tatsu-lab/stanford_alpaca#data-release"""
_EXAONE = (
    "{% for message in messages %}{{ '[|' + message['role'] + '|]' + message['content'] }}"
    "{% if message['role'] == 'user' %}{{ '\\n' }}{% else %}{{ '[|endofturn|]\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '[|assistant|]' }}{% endif %}"
)
"""Each message follows a token with its role; what users say ends with the line.
https://huggingface.co/LGAI-EXAONE/EXAONE-3.5-7.8B-Instruct"""
TEMPLATES: Mapping[str, str] = {
    "alpaca": _ALPACA,
    "chatml": _CHATML,
    "exaone": _EXAONE,
    "llama3": _LLAMA3,
    "mistral": _MISTRAL,
}
"""Templates by the names that mergekit gives them."""
