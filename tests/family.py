"""Small tokenizers, templates and checkpoints of the family's form, for tests.

`TEMPLATE` follows the published structure (turns, reasoning tags, tool calls and results), with a
short tool instruction of its own.
"""

import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

TAGS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
SPECIAL = [
    "<unk>", "<s>", "</s>", *[f"<SPECIAL_{i}>" for i in range(3, 10)], "<|im_start|>", "<|im_end|>"
]  # fmt: skip

TEMPLATE = r"""
{%- macro render_tool(tool) %}
{%- set fn = tool.function if tool.function is defined else tool %}
{{- '\n<function>\n<name>' ~ fn.name ~ '</name>' }}
{{- '\n<description>' ~ (fn.description | default('')) ~ '</description>\n<parameters>' }}
{%- for name, field in ((fn.parameters | default({})).properties | default({})) | items %}
{{- '\n<parameter>\n<name>' ~ name ~ '</name>\n<type>' ~ (field.type | string) ~ '</type>' }}
{{- '\n</parameter>' }}
{%- endfor %}
{{- '\n<required>' ~ ((fn.parameters | default({})).required | default([]) | tojson) }}
{{- '</required>\n</parameters>\n</function>' }}
{%- endmacro %}
{%- set enable_thinking = enable_thinking if enable_thinking is defined else true %}
{%- set ns = namespace(last_user=-1, in_tools=false) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last_user = loop.index0 %}{% endif %}
{%- endfor %}
{{- '<|im_start|>system\n' }}
{%- if messages and messages[0].role == 'system' %}{{ messages[0].content }}
{%- set rest = messages[1:] %}{% set shift = 1 %}
{%- else %}{% set rest = messages %}{% set shift = 0 %}{% endif %}
{%- if tools %}
{{- '\n\n# Tools\n<tools>' }}
{%- for tool in tools %}{{ render_tool(tool) }}{% endfor %}
{{- '\n</tools>\nReply with <tool_call> blocks.' }}
{%- endif %}
{{- '<|im_end|>\n' }}
{%- for m in rest %}
{%- if m.role == 'assistant' %}
{%- set content = m.content | default('', true) %}
{%- if m.reasoning_content is defined and m.reasoning_content is string %}
{%- set content = '<think>\n' ~ m.reasoning_content ~ '</think>' ~ content %}
{%- elif '<think>' not in content and '</think>' not in content %}
{%- set content = '<think></think>' ~ content %}
{%- endif %}
{%- if loop.index0 + shift < ns.last_user %}
{%- set content = '<think></think>' ~ content.split('</think>')[-1] %}
{%- endif %}
{{- '<|im_start|>assistant\n' ~ (content | trim) }}
{%- if m.tool_calls %}
{{- '\n' }}
{%- for call in m.tool_calls %}
{%- set call = call.function if call.function is defined else call %}
{{- '<tool_call>\n<function=' ~ call.name ~ '>\n' }}
{%- for key, value in call.arguments | items %}
{{- '<parameter=' ~ key ~ '>\n' }}
{{- value | tojson if value is mapping or (value is sequence and value is not string) else value }}
{{- '\n</parameter>\n' }}
{%- endfor %}
{{- '</function>\n</tool_call>\n' }}
{%- endfor %}
{%- endif %}
{{- '<|im_end|>\n' }}
{%- elif m.role == 'tool' %}
{%- if not ns.in_tools %}{{ '<|im_start|>user\n' }}{% set ns.in_tools = true %}{% endif %}
{{- '<tool_response>\n' ~ m.content ~ '\n</tool_response>\n' }}
{%- if loop.last or loop.nextitem.role != 'tool' %}
{{- '<|im_end|>\n' }}{% set ns.in_tools = false %}
{%- endif %}
{%- elif m.role in ('user', 'system') %}
{{- '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}
{%- else %}
{{- raise_exception('unknown role ' ~ m.role) }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\n' ~ ('<think>\n' if enable_thinking else '<think></think>') }}
{%- endif %}
"""

CORPUS = [
    f"the quick brown fox number {i} jumps over the lazy dog; what is {i} plus {i * 7 % 90}?"
    for i in range(200)
]


def write_tokenizer(
    directory: Path, vocab_size: int = 400, template: str | None = TEMPLATE
) -> None:
    """Write a byte-level BPE tokenizer with the family's special ids, and a chat template."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIAL, *TAGS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "<|im_end|>",
        "unk_token": "<unk>",
        "pad_token": "<unk>",
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)


def write_generation_config(directory: Path, **values: object) -> None:
    """Write generation_config.json with the family's two end tokens."""
    data = {"eos_token_id": [2, 11], **values}
    (directory / "generation_config.json").write_text(json.dumps(data))
