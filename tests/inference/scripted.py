"""A tiny model that knows tools, and writes what it is told: a grammar leaves it nothing else."""

import contextlib
import dataclasses

import torch

from cs336.inference import LLM, SamplingParams
from cs336.inference.answer_grammar import constrained
from cs336.inference.chat import ChatTemplate
from cs336.inference.tool_formats import FORMATS
from cs336.models import Transformer, TransformerConfig
from cs336.tokenizer import Tokenizer

SPECIAL = {"<|im_start|>": 256, "<|im_end|>": 257, "<tool_call>": 258, "</tool_call>": 259, "[TOOL_CALLS]": 260}
SPECIAL |= {"<|python_tag|>": 261, "<|endoftext|>": 262, "<think>": 263, "</think>": 264}
TOKENIZER = Tokenizer(
    {i: bytes([i]) for i in range(256)} | {i: text.encode() for text, i in SPECIAL.items()}, [], [*SPECIAL]
)
CONFIG = TransformerConfig(265, 2048, num_layers=1, d_model=32, num_heads=4, num_kv_heads=2, init_std=0.3)

# As their families' are, in short.
HERMES = """
{%- if tools %}<|im_start|>system
# Tools
{%- for tool in tools %}
{{ tool | tojson }}{% endfor %}
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call><|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ 'user' if message.role == 'tool' else message.role }}
{% if message.role == 'tool' %}<tool_response>
{{ message.content }}
</tool_response>{% else %}{{ message.content }}{% endif %}
{%- for call in message.tool_calls %}
{{- '\\n' if message.content or not loop.first }}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
LLAMA = """
{%- if tools is not none and tools is defined %}{% for tool in tools %}{{ tool | tojson(indent=4) }}{% endfor %}
Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.{% endif %}
{%- for message in messages %}[{{ message.role }}]
{%- if 'tool_calls' in message %}
{%- if message.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}
{%- set call = message.tool_calls[0].function %}
{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}
{%- else %}{{ message.content | trim }}{% endif %}
{%- endfor %}"""
MISTRAL = """
{%- if tools is not none and tools is defined %}[AVAILABLE_TOOLS]
{{- tools | map(attribute='function') | list | tojson }}{% endif %}
{%- for message in messages %}
{%- if message.tool_calls is defined %}[TOOL_CALLS] [
{%- for call in message.tool_calls %}
{%- if call.id is undefined or call.id | length != 9 %}{{ raise_exception('ids have length 9') }}{% endif %}
{{- call.function | tojson }}{{ '' if loop.last else ', ' }}
{%- endfor %}]
{%- elif message.role == 'tool' %}[TOOL_RESULTS]{{ message.tool_call_id }} {{ message.content }}
{%- else %}[{{ message.role }}] {{ message.content }}{% endif %}
{%- endfor %}"""
THINKING = """
{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.reasoning_content %}<think>
{{ message.reasoning_content }}
</think>

{% endif %}{{ message.content }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined %}<think>
{{ '' if enable_thinking else '\n</think>\n\n' }}{% endif %}{% endif %}"""
TEMPLATES = {"hermes": HERMES, "llama3_json": LLAMA, "mistral": MISTRAL}

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 5}, "days": {"enum": [1, 2, 30]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
DIGIT = {"type": "object", "properties": {"n": {"$ref": "#/$defs/n"}}, "required": ["n"]}
DIGIT |= {"additionalProperties": False, "$defs": {"n": {"type": "integer", "minimum": 0, "maximum": 9}}}
SCHEMAS = {"weather": CITY, "square": DIGIT, "now": {"type": "object", "properties": {}, "additionalProperties": False}}


def tool(name, parameters=None, **more):
    function = {"name": name, "description": f"The {name}, <b>é</b>."} | more
    return {"type": "function", "function": function | ({} if parameters is None else {"parameters": parameters})}


TOOLS = [tool("weather", CITY), tool("square", DIGIT, strict=True), tool("now")]
ASK = [{"role": "user", "content": "Is it warm in Łódź?"}]


def written(kind, *calls):
    """Calls, (name, arguments), as the family writes them."""
    return FORMATS[kind].write(calls)


def lark_of(tools, kind, specials=SPECIAL, reasoning=None, place="behind", **wanted):
    """Of an answer of a model that writes calls as this family does."""
    return constrained(SamplingParams(**wanted), tools, FORMATS.get(kind), reasoning, place, specials).lark


def tool_llm(kind="hermes"):
    torch.manual_seed(5)
    options = {"quiet": True, "page_size": 16, "max_seqs": 8, "max_step_tokens": 512}
    if kind not in TEMPLATES:
        options["tool_parser"] = kind
    llm = LLM(Transformer(CONFIG).eval(), TOKENIZER, **options)
    llm.chat_template = ChatTemplate(TEMPLATES.get(kind, HERMES))
    return llm


@contextlib.contextmanager
def saying(llm, *texts):
    """Its answers are these, one after the other."""
    left, usual = list(texts), llm.calling

    def calling(params, tools, prompt):
        return dataclasses.replace(usual(params, tools, prompt), lark=None, choice=(left.pop(0),))

    llm.calling = calling
    try:
        yield
        assert not left, "there was more to say"
    finally:
        llm.calling = usual
