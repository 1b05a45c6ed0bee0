"""The commands that speak to the Hugging Face hub, against a stub on the loopback interface and without any network.

They run in processes of their own, because the hub's packages read HF_HOME and HF_ENDPOINT once, on import.
"""

import hashlib
import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest

from data.shards import load_manifest, read_shard, verify, write_shard
from data.tokenizers import tokenizer

ROOT = Path(__file__).parents[2]
RUN = "import sys; from data import fineweb, prepare; fineweb.WAITS = (0, 0); prepare.leave(prepare.main(sys.argv[1:]))"


def run(home: Path, arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """python -m data.prepare with `arguments`, without pauses between attempts."""
    clean = {name: value for name, value in os.environ.items() if not name.upper().startswith(("HF_", "HTTP"))}
    clean |= {"HF_HOME": str(home / "hub"), "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1"} | environment
    command = [sys.executable, "-c", RUN, *arguments.split()]
    return subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, timeout=120)


# ---------------------------------------------------------------------------------------------------------------------
# dataset


@pytest.fixture(scope="module")
def small_fineweb(tmp_path_factory) -> Path:
    """A directory laid out like HuggingFaceFW/fineweb, with 60 short documents in two parquet files."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pytest.importorskip("datasets")
    root = tmp_path_factory.mktemp("fineweb")
    (root / "sample/10BT").mkdir(parents=True)
    for part in range(2):
        texts = [f"web page {i}" for i in range(30 * part, 30 * part + 30)]
        table = pyarrow.table({"text": texts, "token_count": [3] * 30})
        parquet.write_table(table, root / f"sample/10BT/00{part}_00000.parquet")
    (root / "README.md").write_text(
        "---\nconfigs:\n- config_name: sample-10BT\n  data_files:\n  - split: train\n    path: sample/10BT/*\n---\n"
    )
    return root


def test_a_dataset_is_streamed_up_to_a_number_of_tokens(small_fineweb, tmp_path):
    options = f"--config sample-10BT --tokenizer gpt2-256 --val-every 4 --processes 1 --tokens 450 --out {tmp_path}/out"
    result = run(tmp_path, f"dataset {small_fineweb} {options}", HF_HUB_OFFLINE="1")
    assert result.returncode == 0, result.stderr
    tokens = np.concatenate([read_shard(tmp_path / "out" / f"{split}_000000.bin") for split in ("train", "val")])
    text = tokenizer("gpt2-256").decode(tokens.tolist())
    kept = [f"web page {i}" for i in range(41)]  # 10 documents of 11 bytes, 31 of 12 bytes: 482 with the last
    assert sorted(text.split("<|endoftext|>")[1:]) == sorted(kept[: len(text.split("<|endoftext|>")) - 1])
    assert 450 <= len(tokens) < 450 + 12


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ("{root} --config sample-10BT --field body", "row 1 has no field 'body', only text, token_count"),
        ("{root} --config sample-99BT", "(config sample-99BT, split train): "),
        ("{root}/sample/10BT/000_00000.parquet --split test", "(config None, split test): "),
        ("nobody/nothing", "cannot read dataset nobody/nothing"),
    ],
)
def test_a_dataset_that_is_not_there(small_fineweb, tmp_path, arguments, sentence):
    result = run(tmp_path, f"dataset {arguments.format(root=small_fineweb)} --out {tmp_path}/out", HF_HUB_OFFLINE="1")
    assert result.returncode == 2 and sentence in result.stderr
    assert result.stderr.count("\n") == 1


# ---------------------------------------------------------------------------------------------------------------------
# fineweb


COMMIT = "c0ffee" + 34 * "0"  # what the branch main stands for


class Hub:
    """The answers of the hub that a download needs. `broken` holds (method, file) pairs to fail once each."""

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.promised: dict[str, str] = {}  # sha256 by file, where it is not that of the content
        self.broken: list[tuple[str, str]] = []
        self.asked: list[tuple[str, str]] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                length = int(self.headers["Content-Length"])
                self.rfile.read(length)
                if f"/datasets/kjj0/fineweb10B-gpt2/paths-info/{COMMIT}" not in self.path:
                    return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
                if self.fails("paths-info"):
                    return self.answer(503, b"")
                entries = [hub.entry(file) for file in hub.files]
                return self.answer(200, json.dumps(entries).encode())

            def do_GET(self):
                file = self.path.rpartition("/")[2]
                if self.path.startswith("/api/datasets/kjj0/fineweb10B-gpt2/revision/"):
                    known = file in ("main", COMMIT)
                    about = json.dumps({"id": "kjj0/fineweb10B-gpt2", "sha": COMMIT, "tags": [], "siblings": []})
                    error = None if known else {"X-Error-Code": "RevisionNotFound"}
                    return self.answer(200 if known else 404, about.encode(), error)
                if f"/resolve/{COMMIT}/" not in self.path:
                    return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
                content = hub.files[file]
                if self.command == "GET" and self.fails(file):
                    content = content[:-2]
                headers = {"ETag": f'"{hub.sha256(file)}"', "X-Repo-Commit": COMMIT}
                return self.answer(200, content, headers)

            do_HEAD = do_GET

            def fails(self, file: str) -> bool:
                hub.asked.append((self.command, file))
                failing = (self.command, file) in hub.broken
                if failing:
                    hub.broken.remove((self.command, file))
                return failing

            def answer(self, status: int, content: bytes, headers: dict | None = None):
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        Thread(target=self.server.serve_forever, daemon=True).start()

    def sha256(self, file: str) -> str:
        return self.promised.get(file) or hashlib.sha256(self.files[file]).hexdigest()

    def entry(self, file: str) -> dict:
        size = len(self.files[file])
        lfs = {"oid": self.sha256(file), "size": size, "pointerSize": 130}
        return {"type": "file", "path": file, "size": size, "oid": "0" * 40, "lfs": lfs}

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def hub(tmp_path):
    pytest.importorskip("huggingface_hub")
    hub = Hub()
    for number, file in enumerate(["fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"]):
        write_shard(tmp_path / file, np.arange(number, 1000))
        hub.files[file] = (tmp_path / file).read_bytes()
    yield hub
    hub.close()


def test_fineweb_is_downloaded_in_spite_of_failures_and_then_kept(hub, tmp_path):
    hub.broken += [("POST", "paths-info"), ("GET", "fineweb_train_000001.bin")]
    result = run(tmp_path, f"fineweb --shards 1 --out {tmp_path}/out", HF_ENDPOINT=hub.url)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("trying again") == 2 and not hub.broken
    manifest = verify(tmp_path / "out")
    assert manifest.settings == {"revision": "main", "commit": COMMIT}
    assert [shard.file for shard in manifest.shards] == ["fineweb_val_000000.bin", "fineweb_train_000001.bin"]
    assert (tmp_path / "out/fineweb_train_000001.bin").read_bytes() == hub.files["fineweb_train_000001.bin"]

    hub.asked.clear()
    result = run(tmp_path, f"fineweb --shards 2 --out {tmp_path}/out", HF_ENDPOINT=hub.url)
    assert result.returncode == 0 and "already prepared" not in result.stdout
    assert [asked for asked in hub.asked if asked[0] == "GET"] == [("GET", "fineweb_train_000002.bin")]
    assert verify(tmp_path / "out").tokens("train") == 999 + 998

    hub.asked.clear()
    result = run(tmp_path, f"fineweb --shards 2 --out {tmp_path}/out", HF_ENDPOINT=hub.url)
    assert "already prepared" in result.stdout and not hub.asked


def test_a_shard_that_is_wrong_on_the_hub_is_not_kept(hub, tmp_path):
    hub.files["fineweb_train_000001.bin"] = hub.files["fineweb_train_000001.bin"][:-2]
    result = run(tmp_path, f"fineweb --shards 1 --out {tmp_path}/out", HF_ENDPOINT=hub.url)
    assert result.returncode == 2
    assert "cannot download fineweb_train_000001.bin" in result.stderr and "is cut off" in result.stderr
    assert [path.name for path in (tmp_path / "out").glob("*.*") if path.is_file()] == ["fineweb_val_000000.bin"]


def test_a_shard_with_another_sha256_is_not_kept(hub, tmp_path):
    hub.promised["fineweb_val_000000.bin"] = "1" * 64
    result = run(tmp_path, f"fineweb --shards 1 --out {tmp_path}/out", HF_ENDPOINT=hub.url)
    assert result.returncode == 2 and "differs from the hub's sha256" in result.stderr
    assert not [path for path in (tmp_path / "out").glob("*.*") if path.is_file()]


def test_a_revision_or_shard_that_the_hub_has_not(hub, tmp_path):
    result = run(tmp_path, f"fineweb --revision old --out {tmp_path}/out", HF_ENDPOINT=hub.url)
    assert result.returncode == 2 and "cannot download revision old" in result.stderr
    assert "trying again" not in result.stdout
    result = run(tmp_path, f"fineweb --shards 3 --out {tmp_path}/out", HF_ENDPOINT=hub.url)
    assert f"at revision {COMMIT} has no fineweb_train_000003.bin; choose another --revision" in result.stderr


def test_fineweb_without_network(tmp_path):
    result = run(tmp_path, f"fineweb --out {tmp_path}/out", HF_HUB_OFFLINE="1")
    assert result.returncode == 2 and "run the same command again to go on" in result.stderr
    assert not (tmp_path / "out/manifest.json").exists()
    with pytest.raises(ValueError, match="does not exist"):
        load_manifest(tmp_path / "out")
