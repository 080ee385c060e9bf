"""`--push_to_hub` against a server on loopback that takes repositories and commits as the hub does."""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from test_lora import LORA
from test_train_launch import flags
from train_fixtures import pair_rows, tiny_model, write_rows

from distiller.records import InputError
from RewardTrainer.train import run_reward_train

REPOSITORY = "someone/rm"


class Hub(BaseHTTPRequestHandler):
    """Creates repositories, asks for every file within the commit, and keeps what the commits hold."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        route = self.path.split("?")[0]
        url = f"http://127.0.0.1:{self.server.server_port}/{REPOSITORY}"
        if route == "/api/repos/create":
            reply = {"url": url, "name": REPOSITORY}
        elif "/preupload/" in route:
            files = [file["path"] for file in json.loads(body)["files"]]
            reply = {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in files]}
        elif "/commit/" in route:
            lines = [json.loads(line) for line in body.splitlines()]
            files = [line["value"] for line in lines if line["key"] == "file"]
            self.server.commits.append({file["path"]: base64.b64decode(file["content"]) for file in files})
            reply = {"success": True, "commitUrl": f"{url}/commit/1", "commitOid": "1"}
        else:
            reply = {}
        payload = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.commits = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def world(tmp_path) -> Path:
    tiny_model(tmp_path / "student")
    tiny_model(tmp_path / "teacher", hidden=48, seed=1)
    write_rows(tmp_path / "scored.jsonl", pair_rows(30))
    return tmp_path


def test_push_is_one_commit_of_the_finished_model_with_its_card_and_metrics_and_no_rows(world, hub):
    output = world / "out"
    given = [*flags(world, output, 2), *LORA, "--max_steps", "4", "--eval_ratio", "0.2"]
    given += ["--push_to_hub", "--hub_model_id", REPOSITORY, "--hub_token", "hf_secret"]
    environment = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-m", "RewardTrainer.train.run_reward_train", *given]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    (pushed,) = hub.commits
    files = {str(path.relative_to(output)): path for path in output.rglob("*") if path.is_file()}
    left = {name for name in files if name.startswith("checkpoint-")} | {"held_out.jsonl"}
    assert left < files.keys() and pushed.keys() == files.keys() - left
    wanted = ("README.md", "metrics.json", "curves.png", "calibration.png", "model.safetensors", "config.json")
    for name in (*wanted, "adapter/adapter_model.safetensors", "trainer_state.json"):
        assert pushed[name] == files[name].read_bytes(), name
    assert "reward_mean" in json.loads(pushed["config.json"]) and "after" in json.loads(pushed["metrics.json"])
    assert not any(b"hf_secret" in content for content in pushed.values())


def test_push_of_checkpoints_is_refused(world):
    with pytest.raises(InputError, match="--hub_strategy"):
        run_reward_train.main([*flags(world, world / "out", 2), "--push_to_hub", "--hub_strategy", "every_save"])
