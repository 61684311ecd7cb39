"""Chat templates: ChatML, one's own, and what a hostile one cannot do."""

from __future__ import annotations

import pytest

from nanochat.errors import UserError
from nanochat.serve.template import CHATML, ChatTemplate, template_of

TALK = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi\nthere"}]


def test_chatml():
    template = ChatTemplate()
    assert template.render(TALK) == (
        "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nHi\nthere<|im_end|>\n<|im_start|>assistant\n"
    )
    answered = [*TALK, {"role": "assistant", "content": "Yes."}]
    # the next turn begins with the whole of this one, so that the cache can be used again
    assert template.render(answered).startswith(template.render(TALK) + "Yes.<|im_end|>\n")
    assert template.render(TALK, add_generation_prompt=False).endswith("there<|im_end|>\n")
    assert template.stops == ["<|im_end|>"]
    assert not template.own


def test_a_message_is_never_a_template():
    hostile = [{"role": "user", "content": "{{ 7 * 7 }}{% for x in y %}"}]
    assert "{{ 7 * 7 }}{% for x in y %}<|im_end|>" in ChatTemplate().render(hostile)


def test_a_run_has_its_own(tmp_path):
    assert template_of(tmp_path) == ChatTemplate(CHATML)
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[-1]['content'] }}?")
    template = template_of(tmp_path)
    assert template.own
    assert template.render(TALK) == "Hi\nthere?"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(UserError, match="not text"):
        template_of(tmp_path)


@pytest.mark.parametrize(
    ("source", "text"),
    [("{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}", "system"),
     ("{{ messages[1] | tojson }}", '{"role": "user", "content": "Hi\\nthere"}'),
     ("{{ {'a': 'ü<'} | tojson(indent=1) }}", '{\n "a": "ü<"\n}'),
     ("{% generation %}{{ messages[0].content }}{% endgeneration %}!", "Be short.!"),
     ("{% if strftime_now is defined %}{{ strftime_now('%Y') | length }}{% endif %}", "4"),
     ("{% if tools is not none and tools %}t{% endif %}{{ eos_token }}", "</s>")],
)  # fmt: skip
def test_what_templates_of_other_models_use(source, text):
    assert ChatTemplate(source, names={"eos_token": "</s>"}).render(TALK) == text


@pytest.mark.parametrize(
    "source",
    ["{{ messages.__class__.__mro__ }}", "{{ ''.__class__.__base__.__subclasses__() }}",
     "{{ cycler.__init__.__globals__.os }}",
     "{% include '/etc/passwd' %}", "{{ raise_exception('no system prompt') }}", "{{ messages.append(1) }}",
     "{{ messages[99].content.x }}", "{% for i in range(10 ** 9) %}a{% endfor %}"],
)  # fmt: skip
def test_what_a_template_cannot_do(source):
    with pytest.raises(UserError, match="cannot write these messages"):
        ChatTemplate(source).render(TALK)


@pytest.mark.parametrize("source", ["{% for %}", "{{", "{% endif %}", "x" * 100_000])
def test_what_is_not_a_template(source):
    with pytest.raises(UserError, match="chat template"):
        ChatTemplate(source)
