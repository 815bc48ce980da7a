"""Models are made once, whole, and again when what made them changed."""

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import rival_models
from benchmarks.rival_models import RivalModels, _run


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Stand in for processes: each makes a folder at its output; a checkpoint is an empty file."""
    found: list[list[str]] = []

    def run(command: Sequence[str | Path]) -> None:
        words = [str(word) for word in command]
        found.append(words)
        Path(words[words.index("-o") + 1]).mkdir()

    monkeypatch.setattr(rival_models, "_run", run)
    monkeypatch.setattr(RivalModels, "_write_checkpoint", lambda _self, target: target.touch())
    return found


@pytest.fixture
def models(tmp_path: Path) -> RivalModels:
    return RivalModels(tmp_path, "g270m", Path(sys.executable))


def test_a_model_is_made_once(models: RivalModels, commands: list[list[str]]) -> None:
    made = models.of("genai")
    assert made == models.of("genai")
    assert made.is_dir()
    (command,) = commands
    assert command[command.index("-i") + 1].endswith("g270m/checkpoint")
    assert command[-3:] == ["--extra_options", "prune_lm_head=true", "block_size=128"]
    assert models.of("genai-default") != made
    assert "--extra_options" not in commands[1]


def test_a_bundle_is_made_again_when_the_exporter_changed(
    models: RivalModels,
    commands: list[list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = tmp_path / "exporters" / "code.py"
    source.parent.mkdir()
    source.write_text("a = 1")
    monkeypatch.setattr(rival_models, "ROOT", tmp_path)
    first, other = models.bundle("--int4"), models.bundle("--int8")
    assert first == models.bundle("--int4")
    assert len(commands) == 2
    source.write_text("a = 2")
    second = models.bundle("--int4")
    assert second != first
    assert not first.exists(), "nobody will run it again"
    assert other.exists()


def test_a_model_that_was_not_finished_is_not_there(
    models: RivalModels, commands: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(command: Sequence[str | Path]) -> None:
        Path(command[list(command).index("-o") + 1]).mkdir()
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(rival_models, "_run", stop)
        with pytest.raises(KeyboardInterrupt):
            models.bundle("--int4")
    assert models.bundle("--int4").is_dir()
    assert len(commands) == 1


def test_a_conversion_that_fails_shows_its_command_and_words() -> None:
    code = "import sys; print('no space left'); sys.exit(4)"
    with pytest.raises(SystemExit, match=r"-c 'import sys.*\nfailed with exit code 4:\nno space"):
        _run([sys.executable, "-c", code])
