import json
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module, metadata
from pathlib import Path

import pytest
from click.testing import Result

from gemma_deploy.cli.main import COMMANDS
from gemma_deploy.install_hint import install_line

HEAVY = {"torch", "onnx", "onnxruntime", "transformers", "numpy", "rich", "tokenizers", "jinja2"}

# Refused even to root, whom no permission stops.
UNREACHABLE = "x" * 300


class TestStart:
    @pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["generate", "--help"]])
    def test_imports_nothing_heavy(self, arguments: list[str]) -> None:
        imported = modules_after(arguments)

        assert not HEAVY & imported
        assert "gemma_deploy.cli.main" in imported

    def test_help_imports_no_verb(self) -> None:
        verbs = {command.module for command in COMMANDS.values()}

        assert not verbs & modules_after(["--help"])

    def test_generating_imports_no_torch(self, bundle: Path) -> None:
        imported = modules_after(["generate", str(bundle), "a", "--max-new-tokens", "2"])

        assert "onnxruntime" in imported
        assert not {"torch", "transformers", "onnxscript"} & imported


class TestHelp:
    def test_the_overview_says_what_each_verb_says_of_itself(self) -> None:
        for name, lazy in COMMANDS.items():
            command = import_module(lazy.module).command
            assert (command.name, command.short_help) == (name, lazy.short_help)

    @pytest.mark.parametrize("name", COMMANDS)
    @pytest.mark.parametrize("flag", ["-h", "--help"])
    def test_every_verb_has_help_with_examples(
        self, name: str, flag: str, invoke: Callable[..., Result]
    ) -> None:
        result = invoke(name, flag)

        assert result.exit_code == 0
        assert f"gemma-deploy {name} " in result.stdout or f"gemma-deploy {name}\n" in result.stdout
        assert "Examples:" in result.stdout

    @pytest.mark.parametrize("name", ["export", "generate", "verify"])
    def test_says_what_a_float16_run_on_a_cpu_does_not_show(
        self, name: str, invoke: Callable[..., Result]
    ) -> None:
        text = " ".join(invoke(name, "--help").stdout.split())

        assert "on CUDA: ONNX Runtime's CPU multiplies matrices in float32" in text

    def test_every_option_is_explained(self) -> None:
        for lazy in COMMANDS.values():
            for option in import_module(lazy.module).command.params:
                assert option.param_type_name == "argument" or option.help

    def test_version(self, invoke: Callable[..., Result]) -> None:
        assert metadata.version("gemma-deploy") in invoke("--version").stdout


class TestUsageErrors:
    def test_misspelled_verb(self, invoke: Callable[..., Result]) -> None:
        result = invoke("genrate")

        assert result.exit_code == 2
        assert "No such command 'genrate': did you mean generate?" in result.stderr

    def test_unknown_verb(self, invoke: Callable[..., Result]) -> None:
        result = invoke("zzz")

        assert result.exit_code == 2
        assert "No such command 'zzz': see `gemma-deploy --help`" in result.stderr

    def test_unknown_option(self, invoke: Callable[..., Result]) -> None:
        result = invoke("generate", "bundle", "--temprature", "1")

        assert result.exit_code == 2
        assert "--temperature" in result.stderr


class TestErrors:
    def test_failure_is_one_line_and_exit_code_1(
        self, invoke: Callable[..., Result], tmp_path: Path
    ) -> None:
        (tmp_path / "manifest.json").write_text("[]")

        result = invoke("inspect", tmp_path)

        assert result.exit_code == 1
        assert result.stdout == ""
        assert result.stderr.startswith("Error: ")
        assert "Traceback" not in result.stderr

    @pytest.mark.parametrize("path", ["nowhere", "notes.txt", "empty"])
    @pytest.mark.parametrize(
        "arguments",
        [
            ["export", "PATH", "-o", "out"],
            ["build", "PATH", "--backend", "tensorrt-rtx"],
            ["pack", "PATH", "--backend", "tensorrt-rtx", "-o", "out"],
            ["generate", "PATH", "a prompt"],
            ["chat", "PATH"],
            ["inspect", "PATH"],
            ["verify", "PATH"],
            ["evaluate", "PATH", "--text", "notes.txt"],
            ["evaluate", "CHECKPOINT", "--text", "notes.txt", "--reference", "PATH"],
            ["bench", "PATH"],
            ["bench", "CHECKPOINT", "--against", "torch-eager", "--checkpoint", "PATH"],
            ["doctor", "PATH"],
        ],
        ids=lambda arguments: " ".join(arguments[:2]),
    )
    def test_a_path_that_is_not_what_the_verb_takes_is_exit_code_2(
        self,
        arguments: list[str],
        path: str,
        invoke: Callable[..., Result],
        tiny_checkpoint: Callable[[str], Path],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "notes.txt").write_text("Some text.")
        (tmp_path / "empty").mkdir()
        places = {"PATH": path, "CHECKPOINT": str(tiny_checkpoint("gemma1"))}

        result = invoke(*(places.get(argument, argument) for argument in arguments))

        assert result.exit_code == 2
        assert result.stdout == ""
        assert re.match(f"(Usage: |Error: {path}).*", result.stderr)
        assert path in result.stderr

    @pytest.mark.parametrize(
        "arguments",
        [
            ["export", "DAMAGED", "-o", "out"],
            ["inspect", "DAMAGED"],
            ["generate", "DAMAGED", "a prompt"],
            ["bench", "DAMAGED"],
            ["evaluate", "DAMAGED", "--text", "notes.txt"],
            # What was asked for can be, on another machine.
            ["generate", "BUNDLE", "a prompt", "--device", "cuda:7"],
        ],
        ids=lambda arguments: " ".join(arguments[:2]),
    )
    def test_what_was_typed_can_be_and_failed_is_exit_code_1(
        self,
        arguments: list[str],
        invoke: Callable[..., Result],
        bundle: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "notes.txt").write_text("Some text.")
        (tmp_path / "damaged").mkdir()
        (tmp_path / "damaged" / "config.json").write_text("{")
        places = {"DAMAGED": "damaged", "BUNDLE": str(bundle)}

        result = invoke(*(places.get(argument, argument) for argument in arguments))

        assert result.exit_code == 1, result.stderr

    @pytest.mark.parametrize(
        "arguments",
        [
            ["generate", "BUNDLE", "a prompt", "--device", "gpu"],
            ["generate", "BUNDLE", "a prompt", "--backend", "tpu"],
            ["export", "CHECKPOINT", "-o", "out", "--fp16", "--bf16"],
            ["inspect", "CHECKPOINT", "--max-seq-len", "100000"],
        ],
        ids=lambda arguments: " ".join(arguments[2:]),
    )
    def test_a_value_that_cannot_be_is_exit_code_2(
        self,
        arguments: list[str],
        invoke: Callable[..., Result],
        tiny_checkpoint: Callable[[str], Path],
        bundle: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        places = {"CHECKPOINT": str(tiny_checkpoint("gemma1")), "BUNDLE": str(bundle)}

        result = invoke(*(places.get(argument, argument) for argument in arguments))

        assert result.exit_code == 2, result.stderr

    @pytest.mark.parametrize(
        "arguments",
        [
            ["generate", UNREACHABLE, "a prompt"],
            ["inspect", UNREACHABLE],
            ["verify", UNREACHABLE],
            ["export", UNREACHABLE, "-o", "out"],
        ],
        ids=lambda arguments: str(arguments[0]),
    )
    def test_a_path_that_the_system_refuses_is_one_line_and_exit_code_1(
        self, arguments: list[str], invoke: Callable[..., Result]
    ) -> None:
        result = invoke(*arguments)

        assert result.exit_code == 1
        assert result.stderr.startswith(f"Error: {UNREACHABLE}")
        assert "cannot be used: File name too long; check the path" in result.stderr

    @pytest.mark.parametrize(
        ("verb", "package", "advice"),
        [
            ("inspect", "safetensors", ""),
            ("verify", "onnx", f". All that verify needs: {install_line()}"),
            ("export", "onnx_ir", f". All that export needs: {install_line()}"),
        ],
    )
    def test_a_package_that_is_not_installed(
        self,
        verb: str,
        package: str,
        advice: str,
        bundle: Path,
        bundle_checkpoint: Path,
        tmp_path: Path,
    ) -> None:
        inputs = [bundle_checkpoint, "-o", tmp_path / "out"] if verb == "export" else [bundle]

        short = run_without(package, verb, *inputs)
        long = run_without(package, "--debug", verb, *inputs)

        assert (short.returncode, long.returncode) == (1, 1)
        assert short.stderr.splitlines()[-1] == (
            f"Error: this needs the Python package {package}, which is not installed: "
            f"pip install {package}{advice}"
        )
        assert "Traceback" not in short.stderr
        assert "Traceback" in long.stderr
        assert f"ModuleNotFoundError: import of {package}" in long.stderr

    @pytest.mark.parametrize("module", ["gemma_deploy.inspection", "json", "click.gone"])
    def test_a_module_missing_from_what_is_installed_is_a_bug(
        self,
        module: str,
        invoke: Callable[..., Result],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def fail(_: Path) -> None:
            raise ModuleNotFoundError(f"No module named {module!r}", name=module)

        monkeypatch.setattr("gemma_deploy.inspection.inspect_folder", fail)

        assert isinstance(invoke("inspect", tmp_path).exception, ModuleNotFoundError)

    @pytest.mark.parametrize(
        ("flag", "environment"), [(["--debug"], {}), ([], {"GEMMA_DEPLOY_DEBUG": "1"})]
    )
    def test_debug_shows_the_traceback(
        self,
        flag: list[str],
        environment: dict[str, str],
        start: Callable[..., "subprocess.Popen[bytes]"],
        tmp_path: Path,
    ) -> None:
        with start(*flag, "inspect", tmp_path, environment=environment) as process:
            _, stderr = process.communicate()

        assert b"Traceback" in stderr
        assert b"gemma_deploy.errors.RequestError" in stderr

    def test_a_reader_that_leaves_early_is_no_error(
        self, start: Callable[..., "subprocess.Popen[bytes]"], bundle: Path
    ) -> None:
        with start("generate", bundle, "a", "--max-new-tokens", "2000") as process:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.read(1)
            process.stdout.close()
            assert process.stderr.read() == b""


def modules_after(arguments: list[str]) -> set[str]:
    """Return the modules that a process has imported after running the program."""
    code = (
        "import json, sys\n"
        "from gemma_deploy.cli.main import cli\n"
        f"cli({arguments!r}, standalone_mode=False)\n"
        "print('\\n' + json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def run_without(package: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
    """Run the program in a process that cannot import a package."""
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from gemma_deploy.cli.main import main; main()"
    )
    line = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("arguments", ["--help", "doctor --help"])
def test_a_full_disk_behind_stdout_is_an_error(arguments: str) -> None:
    command = f'"{sys.executable}" -m gemma_deploy {arguments} > /dev/full'
    result = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith("Error: ")
    assert result.stderr.endswith(": No space left on device\n")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_closed_streams_are_no_crash(closed: str) -> None:
    command = f'"{sys.executable}" -m gemma_deploy --help {closed}'
    result = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert result.returncode == 0
    assert result.stderr == ""
    assert ("Usage" in result.stdout) == (closed != ">&-")
