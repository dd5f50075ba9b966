"""Chat templates do what transformers' do, and nothing else."""

import json

import pytest

from cs336.inference import template_sandbox
from cs336.inference.chat import ChatTemplate

MESSAGES = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "naïve <b> 'q'"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "why?"},
]
TEMPLATES = {
    "plain": "{% for m in messages %}{{ m['role'] }}: {{ m['content'] | trim }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}",
    "blocks": "{{ bos_token }}\n{% for m in messages -%}\n    {% if loop.first %}\n  [{{ m.role }}]\n    {% endif %}\n"
    "{{ m.content }}\n{% if loop.index == 2 %}{% break %}{% endif %}\n{% endfor %}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m | tojson }}{% endif %}{% endfor %}",
    "none": "{% if tools is not none %}{{ tools | tojson }}{% endif %}{{ documents is none }}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}"
    "{{ tools | tojson(indent=2) if tools else 'none' }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_equals_transformers(name):
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    for prompt in (True, False):
        want, _ = utils.render_jinja_template(
            [MESSAGES], None, None, TEMPLATES[name], add_generation_prompt=prompt, **tokens
        )
        got = ChatTemplate(TEMPLATES[name], tokens).render(MESSAGES, add_generation_prompt=prompt)
        assert [got] == want


def test_the_default():
    template = ChatTemplate()
    assert template.render(MESSAGES[:1]) == "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>assistant\n"
    assert template.render(MESSAGES[:1], add_generation_prompt=False) == "<|im_start|>system\nbe brief<|im_end|>\n"
    assert template.stop == ("<|im_end|>",)
    assert ChatTemplate("x").stop == ()
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert "user\nab<|im_end|>" in template.render(parts)


def test_found_in_a_directory(tmp_path):
    assert ChatTemplate.find(tmp_path).is_default
    config = {"eos_token": {"content": "</s>"}, "bos_token": None, "chat_template": "{{ eos_token }}one"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert ChatTemplate.find(tmp_path).render(MESSAGES) == "</s>one"
    config["chat_template"] = [{"name": "rag", "template": "no"}, {"name": "default", "template": "several"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert ChatTemplate.find(tmp_path).render(MESSAGES) == "several"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert ChatTemplate.find(tmp_path).render(MESSAGES) == "file"
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        ChatTemplate.find(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    for wrong, message in (("[]", "must hold a JSON object"), ('{"chat_template": 5}', "chat template 5, no text")):
        (tmp_path / "tokenizer_config.json").write_text(wrong)
        with pytest.raises(ValueError, match=message):
            ChatTemplate.find(tmp_path)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "refuses these messages"),
        ("{{ ''.__class__.__base__ }}{{ cycler.__init__.__globals__.os.system('true') }}", "refuses these messages"),
        ("{% set x = messages.append(1) %}", "refuses these messages"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for m in messages %}", "is not Jinja"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{{ 'x' * 1000 }}{% endfor %}{% endfor %}", "more than"),
        ("{{ 1 + 'a' }}", "refuses these messages"),
        ("{{ 1 / 0 }}", "refuses these messages"),
        ("{{ 'a'.encode('none') }}", "refuses these messages"),
        ("{{ 'a' * 10 ** 9 }}", "more than"),
        ("{{ 9 ** (9 ** 9) }}", "bits"),
        ("{{ 'x' | center(10 ** 9) }}", "more than"),
        ("{{ 'x'.ljust(10 ** 9) }}", "more than"),
        ("{{ 1.5 | round(10 ** 9, 'floor') }}", "more than"),
        ("{{ [1] | tojson(indent=10 ** 9) }}", "more than"),
        ("{{ [[[[[[1]]]]]] | tojson(indent=10 ** 6) }}", "more than"),
        ("{{ '%1000000000d' % 1 }}{{ '{:>1000000000}'.format(1) }}", "width"),
        ("{{ '{:>1000000000}'.format(1) }}", "width"),
        ("{{ '%999999999d' | format(1) }}", "width"),
        ("{{ ('a' * 99999).replace('a', 'b' * 99999) }}", "times"),
        ("{% set n = namespace(a='aa') %}{% for i in range(60) %}{% set n.a = n.a + n.a %}{% endfor %}", "more than"),
        ("{% set n = namespace(a='aa') %}{% for i in range(60) %}{% set n.a = n.a ~ n.a %}{% endfor %}", "more than"),
        (
            "{% set n = namespace(a='a' * 99999) %}{% for i in range(60) %}"
            "{% set n.a = [n.a, n.a] %}{% endfor %}{{ n.a }}",
            "more",
        ),
        ("{% set x %}" + "{{ 'x' * 4000000 }}" * 2 + "{% endset %}", "more than"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "takes too much"),
        ("{% for i in range(9) %}" * 30 + "{% endfor %}" * 30, "is not Jinja"),
        ("{{ " + "(" * 9999 + ")" * 9999 + " }}", "is not Jinja"),
    ],
)
def test_bad_templates(template, message):
    with pytest.raises(ValueError, match=message):
        ChatTemplate(template).render(MESSAGES)


@pytest.mark.parametrize(("bound", "at_most"), [("MOST_TURNS", 5000), ("MOST_SECONDS", -1.0)])
def test_a_template_that_writes_nothing_ends_too(monkeypatch, bound, at_most):
    monkeypatch.setattr(template_sandbox, bound, at_most)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    macros = "{% macro m() %}{% endmacro %}{% for i in range(4000) %}{{ m() }}{% endfor %}"
    for template in (endless, macros):
        with pytest.raises(ValueError, match="more than"):
            ChatTemplate(template).render(MESSAGES)


def test_large_numbers_are_no_widths():
    template = (
        "{% macro say(x) %}{{ x }}{% endmacro %}{% set n = 1733000000 %}"
        "{{ n | string }} {{ n | tojson }} {{ n | round | int }} {{ '%d' | format(n) }} {{ '{}'.format(n) }} "
        "{{ say(n) }}"
    )
    assert ChatTemplate(template).render(MESSAGES) == " ".join(["1733000000"] * 6)


def test_what_is_within_bounds_is_written():
    template = "{% set x = ['a', messages[0].role] %}{{ '%-4s|' % x[1] ~ '{:>9}'.format(2 ** 9) }}{{ x | join('-') }}"
    assert ChatTemplate(template).render(MESSAGES) == "system|      512a-system"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "there are no messages"),
        (["hi"], 'message 0 must be {"role"'),
        ([{"content": "hi"}], 'message 0 must be {"role"'),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "only parts of text"),
        ([{"role": "user", "content": 5}], "content of type int"),
    ],
)
def test_bad_messages(messages, message):
    with pytest.raises(ValueError, match=message):
        ChatTemplate().render(messages)
