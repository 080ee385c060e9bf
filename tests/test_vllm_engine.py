"""VLLMEngine on real vLLM with a tiny random model, in processes of their own (see vllm_driver.py)."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from processes import vllm_server
from safetensors.numpy import save_file

from distiller import vllm_setup
from distiller.engine import Ask, AskError, Completion, EngineDead, Sampling
from distiller.vllm_engine import _Stepper
from distiller.vllm_setup import (
    CPU_ENVIRONMENT,
    SMALL_MODEL,
    check_weights,
    cpu_dtype,
    cpu_threads,
    is_cpu_build,
    long_rope,
    prepare_cpu,
)

DRIVER = Path(__file__).with_name("vllm_driver.py")
SAMPLED = {"temperature": 1.0, "top_p": 0.95, "top_k": 50, "max_tokens": 24}
GREEDY = {"temperature": 0.0, "top_p": 1.0, "top_k": -1, "max_tokens": 12}
MAX_MODEL_LEN = 128


def user(text: str | None) -> list[dict]:
    return [{"role": "user", "content": text}]


ASKS = [[user("Which metal is the bridge made of? " * (1 + number % 3)), number] for number in range(24)]
BAD = [[user("green " * 400), 1], [user(None), 2], [[], 3]]


def with_template(teacher: Path, directory: Path, template: str | None) -> str:
    """A copy of the model with another chat template, or with none."""
    shutil.copytree(teacher, directory)
    for path in [directory / "chat_template.jinja", directory / "tokenizer_config.json"]:
        if path.suffix == ".json":
            config = json.loads(path.read_text())
            config.pop("chat_template", None)
            path.write_text(json.dumps(config))
        elif template is None:
            path.unlink()
        else:
            path.write_text(template)
    return str(directory)


@pytest.mark.parametrize(
    "fault", [RuntimeError("worker died"), None], ids=["vLLM says so first", "vLLM waits for ever"]
)
def test_a_process_that_was_killed_is_named_with_its_exit_code(fault):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=time.sleep, args=(600,), name=name) for name in ("ended", "killed", "alive")]
    for process in processes:
        process.start()

    def step():
        processes[1].kill()
        processes[1].join()
        processes[0].terminate()  # as vLLM ends the others, where they do not end by themselves
        processes[0].join()
        if fault is None:
            time.sleep(600)
        raise fault

    stepper = _Stepper(step)
    try:
        with pytest.raises(EngineDead, match="process killed ended with exit code -9"):
            stepper.step(processes)
    finally:
        for process in processes:
            process.kill()


def test_an_engine_that_fails_with_its_processes_alive_says_what_vllm_said():
    process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,))
    process.start()

    def step():
        raise RuntimeError("out of blocks")

    try:
        with pytest.raises(RuntimeError, match="out of blocks"):
            _Stepper(step).step([process])
    finally:
        process.kill()


def run_driver(jobs: list[dict], directory: Path) -> list[dict]:
    job, result = directory / "job.json", directory / "result.json"
    job.write_text(json.dumps(jobs))
    subprocess.run([sys.executable, str(DRIVER), str(job), str(result)], check=True, timeout=1200)
    return json.loads(result.read_text())


@pytest.fixture(scope="module")
def runs(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """The results of several engines, run one after the other in one process."""
    directory = tmp_path_factory.mktemp("vllm")
    thinking = (tiny_teacher / "chat_template.jinja").read_text() + "{{ '<think>\n' }}"
    arguments = {"model": str(tiny_teacher), "max_model_len": MAX_MODEL_LEN}
    odd = {"enable_thinking": False, "no_template_knows_this": 1}
    jobs = {
        "sampled": {
            "arguments": arguments,
            "sampling": SAMPLED,
            "rounds": [ASKS, *([ask] for ask in ASKS[:8]), [*BAD, *ASKS[:2]], ASKS[::-1]],
        },
        "greedy": {
            "arguments": arguments | {"max_num_seqs": 4, "chat_template_kwargs": odd},
            "sampling": GREEDY,
            "rounds": [ASKS[:6], [[messages, seed + 1] for messages, seed in ASKS[:6]]],
        },
        "opened": {
            "arguments": arguments | {"model": with_template(tiny_teacher, directory / "opened", thinking)},
            "sampling": SAMPLED,
            "rounds": [ASKS[:1]],
        },
        "no template": {
            "arguments": arguments | {"model": with_template(tiny_teacher, directory / "bare", None)},
            "sampling": GREEDY,
            "rounds": [],
        },
        "no room": {
            "arguments": arguments,
            "sampling": GREEDY | {"max_tokens": MAX_MODEL_LEN},
            "rounds": [],
        },
    }
    return dict(zip(jobs, run_driver(list(jobs.values()), directory), strict=True))


def test_a_seeded_ask_says_the_same_whatever_else_is_in_flight(runs):
    together, *rest = runs["sampled"]["rounds"]
    assert [answer for (answer,) in rest[:8]] == together[:8]
    assert rest[-1] == together[::-1]
    assert rest[8][len(BAD) :] == together[:2]


def test_another_seed_says_something_else(runs):
    same_prompt = runs["sampled"]["rounds"][0][::3]
    assert len({answer["text"] for answer in same_prompt}) == len(same_prompt)


def test_a_bad_ask_comes_back_alone_with_its_numbers_and_remedy(runs):
    too_long, no_content, no_messages = runs["sampled"]["rounds"][9][: len(BAD)]
    assert "max_tokens is 24" in too_long["error"] and f"max_model_len {MAX_MODEL_LEN}" in too_long["error"]
    assert "--max_model_len" in too_long["error"]
    assert "content" in no_content["error"] and "empty" in no_messages["error"]


def test_greedy_answers_are_those_of_transformers_and_do_not_depend_on_the_seed(runs, tiny_teacher):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    first, second = runs["greedy"]["rounds"]  # of the template with thinking switched off
    assert first == second
    tokenizer = AutoTokenizer.from_pretrained(tiny_teacher)
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher, dtype=torch.float32)
    for (messages, _), answer in zip(ASKS, first, strict=False):
        text = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, enable_thinking=False, tokenize=False
        )
        prompt = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        count = prompt["input_ids"].shape[1]
        with torch.no_grad():
            output = model.generate(**prompt, max_new_tokens=GREEDY["max_tokens"], do_sample=False)[0, count:]
        assert answer["text"] == tokenizer.decode(output, skip_special_tokens=True)
        assert (answer["prompt_tokens"], answer["completion_tokens"]) == (count, len(output))
        assert answer["finish_reason"] == ("stop" if output[-1] == tokenizer.eos_token_id else "length")


def test_template_arguments_reach_the_template_and_unknown_ones_are_ignored(runs):
    thinking, off = runs["sampled"]["rounds"][0][0], runs["greedy"]["rounds"][0][0]
    assert off["prompt_tokens"] > thinking["prompt_tokens"]  # by the empty thinking block that the template writes
    assert off["reasoning"] is None
    assert runs["greedy"]["facts"]["chat_template_kwargs"]["enable_thinking"] is False


def test_a_reply_cut_inside_thinking_that_the_template_opened_is_an_empty_answer(runs):
    ((answer,),) = runs["opened"]["rounds"]
    assert (answer["text"], answer["finish_reason"]) == ("", "length") and answer["reasoning"]


def test_a_model_without_chat_template_is_refused(runs):
    assert "chat template" in runs["no template"]["dead"]


def test_max_tokens_that_leave_no_room_for_a_prompt_are_refused(runs):
    assert "max_tokens" in runs["no room"]["dead"] and "max_model_len" in runs["no room"]["dead"]


def test_facts_name_the_engine_and_what_it_runs_on(runs, tiny_teacher):
    facts = runs["sampled"]["facts"]
    assert (facts["engine"], facts["model"], facts["max_model_len"]) == ("vllm", str(tiny_teacher), MAX_MODEL_LEN)
    assert facts["vllm"] and facts["torch"] and facts["transformers"] and facts["dtype"]
    assert runs["greedy"]["capacity"] == 5 < runs["sampled"]["capacity"]


def test_a_missing_model_is_refused_before_vllm_is_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for model in ["./nowhere", "nobody/nothing-here", str(tmp_path / "gone")]:
        with pytest.raises(EngineDead, match="no such directory"):
            check_weights(model)
    with pytest.raises(EngineDead, match=r"config\.json"):
        check_weights(str(tmp_path))


def test_pickled_weights_are_refused_and_safetensors_beside_them_are_not(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(EngineDead, match="pickled"):
        check_weights(str(tmp_path))
    save_file({"weight": np.zeros(100)}, tmp_path / "model.safetensors")
    check_weights(str(tmp_path))


def test_weights_that_are_not_whole_are_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    save_file({"weight": np.zeros(100)}, tmp_path / "model-00001-of-00002.safetensors")
    second = tmp_path / "model-00002-of-00002.safetensors"
    whole = (tmp_path / "model-00001-of-00002.safetensors").read_bytes()
    for content in (
        whole[:-1],
        whole[:20],
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        b"",
    ):
        second.write_bytes(content)
        with pytest.raises(EngineDead, match=r"model-00002-of-00002\.safetensors is not whole .*git lfs pull"):
            check_weights(str(tmp_path))
    second.write_bytes(whole)
    check_weights(str(tmp_path))


def test_the_rotary_factors_of_a_longrope_model_follow_the_context():
    from transformers import Phi3Config, Qwen2Config

    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 256}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, **factors}
    config = Phi3Config(**sizes, rope_parameters=rope, original_max_position_embeddings=64).to_dict()
    assert [long_rope(config, length) for length in (32, 64, 65, 256)] == ["short", "short", "long", "long"]
    assert long_rope({"rope_parameters": {"full_attention": config["rope_parameters"]}}, 65) == "long"
    assert long_rope(Qwen2Config().to_dict(), 65) is None and long_rope({}, 65) is None


def test_a_tiny_model_takes_one_thread_and_fp32_and_another_one_a_core_and_bf16(tmp_path, monkeypatch):
    for size, threads in ((SMALL_MODEL - 1, 1), (SMALL_MODEL, len(os.sched_getaffinity(0)))):
        with (tmp_path / "model.safetensors").open("wb") as file:
            file.truncate(size)
        assert cpu_threads(str(tmp_path)) == threads
        for flags, dtype in (("avx512f avx512_bf16", "bfloat16"), ("avx512f", "float32")):
            (tmp_path / "cpuinfo").write_text(f"flags : {flags}\n")
            monkeypatch.setattr(vllm_setup, "CPU_INFO", tmp_path / "cpuinfo")
            assert cpu_dtype(str(tmp_path)) == ("float32" if size < SMALL_MODEL else dtype)
    assert cpu_threads("someone/on-the-hub") == len(os.sched_getaffinity(0))


def test_cpu_settings_leave_alone_what_the_user_exported(monkeypatch):
    for name in CPU_ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    prepare_cpu()
    assert (os.environ["OMP_NUM_THREADS"], os.environ["VLLM_CPU_KVCACHE_SPACE"]) == ("3", "7")
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    for name in CPU_ENVIRONMENT:  # monkeypatch restores what it has seen: let it see what prepare_cpu set
        monkeypatch.setenv(name, os.environ[name])


KILL = """
import os, signal, sys, time
from distiller.engine import Ask, EngineDead, Sampling
from distiller.vllm_engine import VLLMEngine

if __name__ == "__main__":
    engine = VLLMEngine(sys.argv[1], Sampling(1.0, 1.0, -1, 900), max_model_len=1024)
    for seed in range(8):
        engine.submit(seed, Ask([{"role": "user", "content": "bridge"}], seed))
    engine.collect()
    (process,) = engine.processes
    os.kill(process.pid, signal.SIGKILL)
    begin = time.monotonic()
    try:
        while True:
            engine.collect()
    except EngineDead as error:
        print("dead", time.monotonic() - begin, error)
    engine.close()
"""


@pytest.mark.slow
def test_a_killed_engine_process_is_noticed_within_a_minute(tiny_teacher, tmp_path):
    script = tmp_path / "kill.py"
    script.write_text(KILL)
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    run = subprocess.run(
        [sys.executable, str(script), str(tiny_teacher)], env=environment, capture_output=True, text=True, timeout=400
    )
    assert run.returncode == 0, run.stderr
    word, seconds, reason = next(line for line in run.stdout.splitlines() if line.startswith("dead")).split(" ", 2)
    assert float(seconds) < 60 and "-9" in reason


@pytest.mark.slow
def test_a_real_vllm_server_answers_as_the_engine_in_process(runs, tiny_teacher, monkeypatch):
    from distiller.openai_engine import OpenAIEngine

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    off = {"enable_thinking": False}
    asks = [Ask(messages, seed) for messages, seed in [*ASKS[:6], BAD[0]]]
    with vllm_server(tiny_teacher, "--max-model-len", str(MAX_MODEL_LEN)) as (url, process):
        engine = OpenAIEngine(str(tiny_teacher), Sampling(**GREEDY), url, chat_template_kwargs=off)
        for key, ask in enumerate(asks):
            engine.submit(key, ask)
        got: dict[int, Completion | AskError] = {}
        while len(got) < len(asks):
            got.update(engine.collect())
        *good, too_long = [got[key] for key in range(len(asks))]
        # Of a cut reply the server does not say whether it is an answer or a thinking that the template opened.
        said = [answer.reasoning if answer.finish_reason == "length" else answer.text for answer in good]
        assert said == [answer["text"] for answer in runs["greedy"]["rounds"][0]]
        assert isinstance(too_long, AskError) and "400" in str(too_long)
        wrong = OpenAIEngine("another", Sampling(**GREEDY), url)
        wrong.submit(0, asks[0])
        with pytest.raises(EngineDead, match=tiny_teacher.name):
            wrong.collect()
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        engine.submit(0, asks[0])
        with pytest.raises(EngineDead, match="cannot be reached"):
            engine.collect()
        engine.close()
        wrong.close()


@pytest.mark.skipif(not is_cpu_build(), reason="settings of the CPU build")
def test_the_cpu_build_is_told_from_package_metadata_without_importing_torch():
    code = (
        "import sys; from distiller.vllm_setup import is_cpu_build as cpu; assert cpu() and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
