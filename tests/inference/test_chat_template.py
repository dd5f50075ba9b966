"""Chat templates do what transformers' do, and nothing else."""

import json

import pytest

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
    ],
)
def test_bad_templates(template, message):
    with pytest.raises(ValueError, match=message):
        ChatTemplate(template).render(MESSAGES)


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
