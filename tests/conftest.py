"""Fixtures that several test files share."""

from pathlib import Path

import pytest

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
SENTENCES = [
    "The metal of the bridge is iron and its colour is green.",
    "Which metal is the bridge made of? Answer in one line.",
    "The answer names the wrong colour: the note says green.",
    "<diagnosis>The colour is wrong.</diagnosis>\n<refined>The colour is green.</refined>",
    "<score_a>7</score_a> <score_b>4</score_b> <score>10</score>",
    "user system assistant\n0 1 2 3 4 5 6 7 8 9",
]


def build_tiny_teacher(directory: Path, seed: int = 0) -> Path:
    """Save a Qwen2 of random weights (2 layers of 64) with a byte-level BPE tokenizer and a ChatML template that knows
    `enable_thinking`: it loads in vLLM in seconds and says nonsense."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(vocab_size=512, special_tokens=specials, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(directory)

    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,  # head size 32, the smallest that vLLM's CPU attention takes
        num_key_value_heads=1,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        Qwen2ForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a tiny random teacher model, see `build_tiny_teacher`."""
    return build_tiny_teacher(tmp_path_factory.mktemp("models") / "tiny_teacher")


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """Headless Chromium; the test is skipped where there is none."""
    from inspect_fixtures import start_browser  # what needs no browser needs no selenium

    driver = start_browser(tmp_path_factory.mktemp("profile"))
    yield driver
    driver.quit()


@pytest.fixture
def open_page(browser, tmp_path):
    """A function that makes the inspection page of some rows and opens it. At the end the console must be empty, and
    nothing may have been asked for but the page."""
    from inspect_fixtures import requests_of

    from distiller.records import dump_line
    from refine.inspect_pairs import main

    def open_page(*rows: dict | bytes, filtered: list[dict] = (), failed: list[dict] = ()):
        for name, lines in (("", rows), (".filtered.jsonl", filtered), (".failed.jsonl", failed)):
            text = b"".join(row if isinstance(row, bytes) else dump_line(row) for row in lines)
            (tmp_path / f"scored.jsonl{name}").write_bytes(text)
        assert main(["--input", str(tmp_path / "scored.jsonl")]) == 0
        browser.get((tmp_path / "scored.html").as_uri())
        return browser

    browser.get("about:blank")
    browser.get_log("browser")
    browser.get_log("performance")
    yield open_page
    assert browser.get_log("browser") == []
    assert [url for url in requests_of(browser) if url != (tmp_path / "scored.html").as_uri()] == []
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@pytest.fixture
def flex_on_cpu(monkeypatch):
    """FlexAttention as on a GPU, its backward pass included, but for the kernels: its graphs run as they are traced.

    Torch refuses gradients on a CPU because nobody has written kernels for them; the graph has them.
    """
    from functools import partial

    from torch.nn.attention import flex_attention

    from RewardTrainer import packing

    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)  # of an earlier test with vLLM in this process
    monkeypatch.setattr(packing, "FLEX_DEVICES", {"cpu"})
    monkeypatch.setattr(packing, "compiled_attend", partial(packing.compiled_attend, "aot_eager"))
    monkeypatch.setattr(flex_attention, "_validate_device", lambda query, key, value: None)


@pytest.fixture(params=["segments", "flex"])
def kernel(request):
    """Both ways in which packed rows attend, by the names that `packing.kernel_of` gives them."""
    if request.param == "flex":
        request.getfixturevalue("flex_on_cpu")
    return request.param
