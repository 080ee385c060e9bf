"""Chat templates that write today's date: the same tokens on every day, in every command and in what is exported."""

import json
from datetime import datetime

import pytest
from jinja2 import TemplateError
from train_fixtures import tiny_model
from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

from distiller.tokens import with_fixed_date
from distiller.vllm_engine import VLLMEngine
from RewardTrainer.eval.engines.loading import load_config
from RewardTrainer.train.checkpoint import load_tokenizer

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
# As Llama 3's and gpt-oss's templates ask for it.
TEMPLATE = """{%- if not date_string is defined %}{%- if strftime_now is defined %}
{%- set date_string = strftime_now("%d %b %Y") %}{%- else %}{%- set date_string = "none" %}{%- endif %}{%- endif %}
{{- date_string + "|" + strftime_now('%Y-%m-%d') + "|" }}
{%- for message in messages %}
{{- "<|im_start|>" + message.role + "\\n" + message.content + "<|im_end|>\\n" }}{%- endfor %}
{%- if add_generation_prompt %}{{- "<|im_start|>assistant\\n" }}{%- endif %}"""


@pytest.fixture
def model(tmp_path):
    """Of a reward model and of a teacher alike: only its tokenizer and configuration are loaded."""
    path = tiny_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def days(monkeypatch):
    """Sets the day that chat templates are told."""

    def set_to(day: int) -> None:
        class Clock(datetime):
            @classmethod
            def now(cls, tz=None):
                return cls(2030, 1, day)

        monkeypatch.setattr(chat_template_utils, "datetime", Clock)
        chat_template_utils._compile_jinja_template.cache_clear()

    return set_to


def test_the_clock_of_these_tests_is_the_one_that_templates_see(model, days):
    tokenizer = AutoTokenizer.from_pretrained(model)
    days(1)
    assert tokenizer.apply_chat_template(MESSAGES, tokenize=False).startswith("01 Jan 2030|2030-01-01|")
    days(2)
    assert tokenizer.apply_chat_template(MESSAGES, tokenize=False).startswith("02 Jan 2030|2030-01-02|")


def test_every_command_writes_the_same_date_on_two_days(model, days, monkeypatch):
    config = json.loads((model / "config.json").read_text()) | {"num_labels": 1, "id2label": {"0": "LABEL_0"}}
    (model / "config.json").write_text(json.dumps(config))
    loaders = {
        "teacher": lambda: VLLMEngine._load_tokenizer(str(model), False),
        "training": lambda: load_tokenizer(str(model)),
        "evaluation": lambda: load_config(str(model), False)[1],
    }
    for name, load in loaders.items():
        texts = []
        for day in (1, 2):
            days(day)
            texts.append(load().apply_chat_template(MESSAGES, tokenize=False))
        assert texts[0] == texts[1], name
        assert texts[0].startswith("26 Jul 2024|2024-07-26|<|im_start|>user\nhi"), name


def test_a_saved_tokenizer_keeps_the_date_and_is_changed_once(model, days, tmp_path):
    tokenizer = load_tokenizer(str(model))
    tokenizer.save_pretrained(tmp_path / "saved")
    days(3)
    stock = AutoTokenizer.from_pretrained(tmp_path / "saved")
    text = stock.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert text.startswith("26 Jul 2024|") and text.endswith("assistant\n")
    before = stock.chat_template
    assert with_fixed_date(stock).chat_template == before


def test_other_templates_stay_as_they_are(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model(tmp_path / "model"))
    before = tokenizer.chat_template
    assert with_fixed_date(tokenizer).chat_template == before and before
    tokenizer.chat_template = None
    assert with_fixed_date(tokenizer).chat_template is None


def test_formats_in_variables_and_the_text_around_are_kept(tmp_path, days):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model(tmp_path / "model"))
    tokenizer.chat_template = """  don't {% set form = "%d %B" %}{{ strftime_now(form) }} {{ strftime_now('%Y') }}"""
    days(1)
    assert tokenizer.apply_chat_template(MESSAGES, tokenize=False) == "  don't 01 January 2030"
    assert with_fixed_date(tokenizer).apply_chat_template(MESSAGES, tokenize=False) == "  don't 26 July 2024"
    tokenizer.chat_template = """{{ strftime_now("%d 'x'") }}{{ '{%' }}"""
    assert with_fixed_date(tokenizer).apply_chat_template(MESSAGES, tokenize=False) == "26 'x'{%"
    tokenizer.chat_template = "{{ strftime_now('%' + 'd') }}"
    with pytest.raises(TemplateError, match="no text of the template"):
        with_fixed_date(tokenizer).apply_chat_template(MESSAGES, tokenize=False)
