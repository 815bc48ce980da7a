import errno
import re
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from gemma_deploy import hub
from gemma_deploy.checkpoint_files import is_licence
from gemma_deploy.errors import HubError, RequestError
from gemma_deploy.install_hint import install_line

if TYPE_CHECKING:
    from tests.gemma_deploy.conftest import HubServer

pytestmark = pytest.mark.usefixtures("online")

MODEL = "org/tiny-gemma"
FILES = {
    "config.json": b"config",
    "generation_config.json": b"generation",
    "model.safetensors.index.json": b"index",
    "model-00001-of-00002.safetensors": b"first shard",
    "model-00002-of-00002.safetensors": b"second shard",
    "tokenizer.json": b"tokenizer",
    "tokenizer_config.json": b"its config",
    "chat_template.jinja": b"template",
    "LICENSE": b"terms",
    "LICENCE": b"British terms",
    "license.txt": b"small terms",
    "NOTICE": b"notice",
    "notice.txt": b"small notice",
    "COPYING": b"GNU terms",
    "Gemma_Terms_of_Use.md": b"terms of use",
    "PROHIBITED_USE_POLICY.md": b"policy",
}
REFUSED = {
    "pytorch_model.bin": b"pickle",
    "model.gguf": b"gguf",
    "README.md": b"words",
    "consolidated.safetensors": b"again",
    "onnx/model.safetensors": b"elsewhere",
    "onnx/LICENSE": b"its terms",
}


class TestDownload:
    def test_fetches_what_an_export_needs_and_nothing_else(
        self, hub_server: "HubServer", tmp_path: Path
    ) -> None:
        hub_server.models[MODEL] = FILES | REFUSED

        folder = download(hub_server, tmp_path)

        assert {p.name: p.read_bytes() for p in folder.iterdir()} == FILES
        assert sorted(hub_server.downloads) == sorted(FILES)

    def test_every_licence_travels(self, hub_server: "HubServer", tmp_path: Path) -> None:
        hub_server.models[MODEL] = FILES | REFUSED

        folder = download(hub_server, tmp_path)

        licences = {name for name in FILES | REFUSED if is_licence(name)}
        assert len(licences) == 8
        assert licences <= {path.name for path in folder.iterdir()}

    def test_a_second_time_fetches_nothing(self, hub_server: "HubServer", tmp_path: Path) -> None:
        hub_server.models[MODEL] = FILES
        download(hub_server, tmp_path)
        hub_server.downloads.clear()

        download(hub_server, tmp_path)

        assert not hub_server.downloads

    def test_gated_model_with_the_token_of_who_accepted_its_licence(
        self, hub_server: "HubServer", tmp_path: Path
    ) -> None:
        hub_server.models[MODEL] = FILES
        hub_server.access = "gated"

        folder = download(hub_server, tmp_path, token="hf_good")

        assert (folder / "config.json").is_file()

    @pytest.mark.parametrize("token", [False, "hf_of_somebody_else"])
    def test_gated_model_without_access(
        self, hub_server: "HubServer", tmp_path: Path, token: str | bool
    ) -> None:
        hub_server.models[MODEL] = FILES
        hub_server.access = "gated"

        with pytest.raises(HubError, match=r"is gated: .* accepted at http.*org/tiny-gemma") as err:
            download(hub_server, tmp_path, token=token)

        assert "hf auth login" in str(err.value)
        assert "HF_TOKEN" in str(err.value)

    def test_unknown_model(self, hub_server: "HubServer", tmp_path: Path) -> None:
        with pytest.raises(HubError, match="neither a folder org/tiny-gemma here nor a model"):
            download(hub_server, tmp_path)

    def test_unknown_revision(self, hub_server: "HubServer", tmp_path: Path) -> None:
        hub_server.models[MODEL] = FILES

        with pytest.raises(HubError, match="org/tiny-gemma has no revision 'v9'"):
            download(hub_server, tmp_path, revision="v9")

    def test_model_without_safetensors(self, hub_server: "HubServer", tmp_path: Path) -> None:
        hub_server.models[MODEL] = {"config.json": b"{}", "pytorch_model.bin": b"pickle"}

        with pytest.raises(HubError, match=r"has no \*\.safetensors weights.*pickle"):
            download(hub_server, tmp_path)

        assert hub_server.downloads == ["config.json"]

    def test_server_that_fails(self, hub_server: "HubServer", tmp_path: Path) -> None:
        hub_server.models[MODEL] = FILES
        hub_server.access = "failing"

        with pytest.raises(
            HubError, match=r"refused org/tiny-gemma \(HTTP 501\)|cannot be downloaded"
        ):
            download(hub_server, tmp_path)

    def test_nobody_listens(self, tmp_path: Path) -> None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"

            with pytest.raises(HubError, match=f"cannot be downloaded from {endpoint}.*network"):
                hub.download(MODEL, endpoint=endpoint, cache_folder=tmp_path, token=False)

    def test_offline_and_not_in_the_cache(
        self, hub_server: "HubServer", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

        with pytest.raises(HubError, match="HF_HUB_OFFLINE forbids downloads"):
            download(hub_server, tmp_path)

    def test_name_that_no_hub_has(self, tmp_path: Path) -> None:
        with pytest.raises(HubError, match="'org/a--b' is not a name that a hub can have"):
            hub.download("org/a--b", cache_folder=tmp_path, token=False)

    def test_without_the_extra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)

        with pytest.raises(HubError, match=re.escape(f"not installed: {install_line('hub')}")):
            hub.download(MODEL)

    def test_cache_that_cannot_be_written(self, hub_server: "HubServer", tmp_path: Path) -> None:
        hub_server.models[MODEL] = FILES
        (tmp_path / "file").write_text("in the way")

        with pytest.raises(HubError, match=r"org/tiny-gemma cannot be stored in .*file"):
            download(hub_server, tmp_path / "file")

    def test_full_disk(
        self, hub_server: "HubServer", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_args: object, **_kwargs: object) -> object:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("huggingface_hub.snapshot_download", fail)

        with pytest.raises(HubError, match=r"cannot be stored in .*No space left.*HF_HOME"):
            download(hub_server, tmp_path)


class TestResolveCheckpoint:
    def test_a_folder_is_itself(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{}")

        assert hub.resolve_checkpoint(str(tmp_path)) == tmp_path

    def test_a_folder_wins_over_a_hub_id(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "org" / "tiny-gemma").mkdir(parents=True)
        (tmp_path / "org" / "tiny-gemma" / "config.json").write_text("{}")
        monkeypatch.chdir(tmp_path)

        assert hub.resolve_checkpoint(MODEL) == Path(MODEL)

    def test_a_folder_has_no_revisions(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{}")

        with pytest.raises(RequestError, match=r"revision 'v1' was given, but .* is a folder"):
            hub.resolve_checkpoint(str(tmp_path), revision="v1")

    @pytest.mark.parametrize("source", ["./org/name", "/org/name", "a/b/c", "name", "~/name"])
    def test_neither_a_folder_nor_a_hub_id(self, source: str) -> None:
        with pytest.raises(RequestError, match=r"does not exist; expected .*on the hub such as"):
            hub.resolve_checkpoint(source)

    def test_a_file(self, tmp_path: Path) -> None:
        file = tmp_path / "model.safetensors"
        file.touch()

        with pytest.raises(RequestError, match="is a file; expected a checkpoint"):
            hub.resolve_checkpoint(str(file))

    def test_a_home_of_nobody(self) -> None:
        with pytest.raises(RequestError, match="cannot be found: Could not determine home"):
            hub.resolve_checkpoint("~nobody-of-this-name/gemma")


def download(
    server: "HubServer",
    cache_folder: Path,
    *,
    revision: str | None = None,
    token: str | bool = False,
) -> Path:
    return hub.download(
        MODEL,
        endpoint=server.endpoint,
        cache_folder=cache_folder,
        revision=revision,
        token=token,
    )
