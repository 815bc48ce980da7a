"""Fixtures: a small bundle with its tokenizer, and a server that speaks the hub's protocol."""

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal

import pytest

VOCAB_SIZE = 512
SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")

COMMIT = "1" * 40
TOKEN = "hf_good"


@dataclass
class HubServer:
    """The models it holds, and what was asked of it."""

    endpoint: str
    models: dict[str, Mapping[str, bytes]] = field(default_factory=dict)
    access: Literal["open", "gated", "failing"] = "open"
    downloads: list[str] = field(default_factory=list)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's signature
        """Keep the test's output clean."""

    def _answer(self) -> None:
        path = self.path.partition("?")[0]
        name = next(
            (n for n in self.hub.models if path.startswith((f"/{n}/", f"/api/models/{n}/"))), None
        )
        if name is None:
            self._refuse(401, "RepoNotFound")
        elif self.hub.access == "failing":
            self._refuse(501, None)
        elif path.startswith("/api/"):
            self._describe(name, path.removeprefix(f"/api/models/{name}/"))
        else:
            self._serve(name, path.removeprefix(f"/{name}/resolve/").partition("/")[2])

    def _describe(self, name: str, what: str) -> None:
        kind, _, revision = what.partition("/")
        if revision not in {"main", COMMIT}:
            self._refuse(404, "RevisionNotFound")
        elif kind == "revision":
            siblings = [{"rfilename": file} for file in self.hub.models[name]]
            self._send(json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode())
        else:
            files = self.hub.models[name].items()
            tree = [{"type": "file", "path": f, "size": len(b), "oid": _oid(b)} for f, b in files]
            self._send(json.dumps(tree).encode())

    def _serve(self, name: str, file: str) -> None:
        if self.hub.access == "gated" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            has_token = "Authorization" in self.headers
            self._refuse(403 if has_token else 401, "GatedRepo")
        elif file not in self.hub.models[name]:
            self._refuse(404, "EntryNotFound")
        else:
            if self.command == "GET":
                self.hub.downloads.append(file)
            body = self.hub.models[name][file]
            self._send(body, {"ETag": f'"{_oid(body)}"', "X-Repo-Commit": COMMIT})

    def _refuse(self, status: int, code: str | None) -> None:
        self._send(b"", {"X-Error-Code": code} if code else {}, status)

    def _send(
        self, body: bytes, headers: Mapping[str, str] | None = None, status: int = 200
    ) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def _oid(body: bytes) -> str:
    return hashlib.sha1(body).hexdigest()


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide what this environment says of hubs and proxies, from the test and what it starts."""
    for name in os.environ:
        if name.startswith("HF_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    # Read from the environment when huggingface_hub was imported, by whichever test came first.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


@pytest.fixture
def hub_server(online: None) -> Iterator[HubServer]:  # noqa: ARG001 - needed for what it does
    """A hub on 127.0.0.1, empty until a test gives it models."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    hub = HubServer(endpoint=f"http://127.0.0.1:{server.server_port}")
    server.RequestHandlerClass = type("Handler", (_Handler,), {"hub": hub})
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield hub
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="session")
def bundle_checkpoint(
    tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A tiny float32 checkpoint with a tokenizer, as complete as one from the hub."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    shutil.copytree(tiny_checkpoint("gemma1"), folder)
    _write_tokenizer(folder)
    # Rotary positions are computed, so the same weights read texts of any length.
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8192}))
    (folder / "LICENSE").write_text("The terms of this model.")
    return folder


@pytest.fixture(scope="session")
def bundle(bundle_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The float32 bundle of `bundle_checkpoint`: shared, never change it."""
    from gemma_deploy.exporters.export import export_checkpoint

    return export_checkpoint(bundle_checkpoint, tmp_path_factory.mktemp("bundle") / "tiny").folder


def _write_tokenizer(folder: Path) -> None:
    """Train a byte-fallback BPE in Gemma's layout on the words of a licence."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[*SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    licence = Path(__file__).parents[2] / "LICENSE"
    tokenizer.train_from_iterator(licence.read_text(encoding="utf-8").splitlines(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A",
        pair="<bos> $A <bos>:1 $B:1",
        special_tokens=[("<bos>", SPECIAL_TOKENS.index("<bos>"))],
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "GemmaTokenizer",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
