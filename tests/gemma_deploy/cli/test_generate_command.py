import contextlib
import json
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from gemma_deploy.api import load
from gemma_deploy.cli import generate_command

PROMPT = "def run("
MANY = [PROMPT, "The hub", "assert"]


@pytest.fixture(scope="module")
def expected(bundle: Path) -> dict[str, str]:
    """Texts of the library, each prompt by itself."""
    with load(bundle) as generator:
        return {p: generator.generate(p, max_new_tokens=12)[0].text for p in MANY}


class TestText:
    @pytest.mark.parametrize("options", [[], ["--no-stream"], ["--greedy"]])
    def test_of_one_prompt_is_the_continuation_alone(
        self,
        options: list[str],
        invoke: Callable[..., Result],
        bundle: Path,
        expected: dict[str, str],
    ) -> None:
        result = invoke("generate", bundle, PROMPT, "--max-new-tokens", 12, *options)

        assert result.exit_code == 0
        assert result.stdout == expected[PROMPT] + "\n"
        assert "stopped at the limit: 12 tokens in" in result.stderr

    @pytest.mark.parametrize("batch_size", [1, 2, 8])
    def test_of_several_prompts_is_under_headers(
        self,
        batch_size: int,
        invoke: Callable[..., Result],
        bundle: Path,
        expected: dict[str, str],
    ) -> None:
        result = invoke(
            "generate", bundle, *MANY, "--max-new-tokens", 12, "--batch-size", batch_size
        )

        blocks = [f"[{n}/3] {prompt}\n{expected[prompt]}\n" for n, prompt in enumerate(MANY, 1)]
        assert result.stdout == "".join(blocks)
        assert "3 prompts: 36 tokens in" in result.stderr

    def test_of_stdin(
        self, invoke: Callable[..., Result], bundle: Path, expected: dict[str, str]
    ) -> None:
        result = invoke("generate", bundle, "--max-new-tokens", 12, input=PROMPT + "\n")

        assert result.stdout == expected[PROMPT] + "\n"

    def test_is_streamed(
        self, start: Callable[..., "subprocess.Popen[bytes]"], bundle: Path
    ) -> None:
        # Thousands of tokens: without streaming the first byte would come with the last.
        with start("generate", bundle, PROMPT, "--max-new-tokens", "8000") as process:
            assert process.stdout is not None
            assert process.stdout.read(1)
            is_running = process.poll() is None
            process.kill()

        assert is_running

    def test_same_seed_same_text(self, invoke: Callable[..., Result], bundle: Path) -> None:
        def text(seed: int) -> str:
            options = ("--temperature", 1.5, "--top-k", 50, "--top-p", 0.95, "--seed", seed)
            return invoke("generate", bundle, PROMPT, "--max-new-tokens", 12, *options).stdout

        assert text(1) == text(1)
        assert text(1) != text(2)


class TestJson:
    def test_one_object_per_prompt(
        self, invoke: Callable[..., Result], bundle: Path, expected: dict[str, str], tmp_path: Path
    ) -> None:
        (tmp_path / "prompts.txt").write_text("\n".join(MANY))

        result = invoke(
            "generate", bundle, "--file", tmp_path / "prompts.txt", "--max-new-tokens", 12, "--json"
        )

        found = [json.loads(line) for line in result.stdout.splitlines()]
        assert [(o["prompt"], o["text"]) for o in found] == list(expected.items())
        assert found[0].keys() == {
            "prompt",
            "text",
            "prompt_token_ids",
            "token_ids",
            "finish_reason",
            "timings",
        }
        assert found[0]["prompt_token_ids"][0] == 2
        assert len(found[0]["token_ids"]) == 12
        assert found[0]["finish_reason"] == "length"
        assert found[0]["timings"]["new_tokens"] == 12

    def test_of_one_prompt(self, invoke: Callable[..., Result], bundle: Path) -> None:
        result = invoke("generate", bundle, PROMPT, "--max-new-tokens", 2, "--json")

        assert json.loads(result.stdout)["prompt"] == PROMPT


class TestChatTemplate:
    def test_wraps_each_prompt(self, invoke: Callable[..., Result], bundle: Path) -> None:
        result = invoke(
            "generate",
            bundle,
            "Hi",
            "Yo",
            "--chat",
            "--system",
            "S",
            "--max-new-tokens",
            2,
            "--json",
        )

        found = [json.loads(line)["prompt"] for line in result.stdout.splitlines()]
        assert found[0] == (
            "<bos><start_of_turn>user\nS\n\nHi<end_of_turn>\n<start_of_turn>model\n"
        )
        assert "Yo<end_of_turn>" in found[1]

    def test_system_needs_chat(self, invoke: Callable[..., Result], bundle: Path) -> None:
        result = invoke("generate", bundle, "Hi", "--system", "S")

        assert result.exit_code == 2
        assert "give --chat too" in result.stderr


class TestGenerationConfig:
    """What generation_config.json says is done, unless an option says otherwise."""

    @pytest.fixture
    def stated(self, tmp_path: Path, bundle_checkpoint: Path) -> Callable[..., Path]:
        def write(**fields: object) -> Path:
            folder = tmp_path / "checkpoint"
            shutil.copytree(bundle_checkpoint, folder, dirs_exist_ok=True)
            (folder / "generation_config.json").write_text(json.dumps(fields))
            return folder

        return write

    def test_decides_what_no_option_does(
        self, invoke: Callable[..., Result], stated: Callable[..., Path], expected: dict[str, str]
    ) -> None:
        folder = stated(max_new_tokens=12, do_sample=True, top_k=1)

        result = invoke("generate", folder, PROMPT)

        assert result.stdout == expected[PROMPT] + "\n"
        assert (
            "Sampling as the model's generation_config.json says: temperature 1, top-k 1, top-p 1. "
            "--greedy takes the likeliest" in result.stderr
        )

    def test_greedy_is_a_choice(
        self, invoke: Callable[..., Result], stated: Callable[..., Path], expected: dict[str, str]
    ) -> None:
        folder = stated(do_sample=True, temperature=50.0, max_new_tokens=3)

        greedy = invoke("generate", folder, PROMPT, "--greedy", "-n", 12)
        zero = invoke("generate", folder, PROMPT, "--temperature", 0, "-n", 12)
        sampled = invoke("generate", folder, PROMPT, "-n", 12, "--seed", 1)

        assert greedy.stdout == zero.stdout == expected[PROMPT] + "\n"
        assert "Sampling as" not in greedy.stderr + zero.stderr
        assert sampled.stdout != greedy.stdout

    def test_is_a_notice_where_it_is_not_followed(
        self, invoke: Callable[..., Result], stated: Callable[..., Path]
    ) -> None:
        folder = stated(min_p=0.1, suppress_tokens=[5])

        result = invoke("generate", folder, *MANY, "-n", 2)

        assert result.exit_code == 0
        assert result.stderr.count("Warning: ") == 1
        assert "are ignored: min_p=0.1, suppress_tokens=[5]. The text" in result.stderr

    def test_that_cannot_be_is_named(
        self, invoke: Callable[..., Result], stated: Callable[..., Path]
    ) -> None:
        result = invoke("generate", stated(top_k="many"), PROMPT)

        assert result.exit_code == 1
        assert "generation_config.json: top_k is 'many' (str)" in result.stderr


class TestSpecialTokens:
    def test_are_tokens_unless_told_otherwise(
        self, invoke: Callable[..., Result], bundle: Path
    ) -> None:
        def ids(*options: str) -> list[int]:
            result = invoke("generate", bundle, "a<eos>b", "-n", 1, "--json", *options)
            return list(json.loads(result.stdout)["prompt_token_ids"])

        assert 1 in ids()
        assert 1 not in ids("--no-special-tokens")


class TestCheckpoint:
    def test_runs_on_torch(
        self,
        invoke: Callable[..., Result],
        bundle_checkpoint: Path,
        expected: dict[str, str],
    ) -> None:
        result = invoke(
            "generate", bundle_checkpoint, PROMPT, "--backend", "torch", "--max-new-tokens", 12
        )

        assert result.stdout == expected[PROMPT] + "\n"

    def test_is_not_for_onnxruntime(
        self, invoke: Callable[..., Result], bundle_checkpoint: Path
    ) -> None:
        result = invoke("generate", bundle_checkpoint, PROMPT, "--backend", "onnxruntime")

        assert result.exit_code == 2
        assert f"gemma-deploy export {bundle_checkpoint} --output BUNDLE" in result.stderr


class TestBadRequests:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--greedy", "--top-k", "3", "a"], "--greedy takes no --top-k"),
            (["--top-p", "0", "a"], "Invalid value for '--top-p'"),
            (["--temperature", "nan", "a"], "temperature is nan"),
            (["--max-new-tokens", "0", "a"], "Invalid value for '-n' / '--max-new-tokens'"),
            (["--device", "tpu", "a"], "device is 'tpu'; expected auto, cpu, cuda"),
            (["--threads", "1000", "a"], "threads is 1,000; this process may use"),
            (["--file", "f", "a"], "prompts come as arguments or from --file, not both"),
            (["--max-seq-len", "4", "a much longer prompt"], "the KV cache holds 4"),
            (["--max-seq-len", "9000", "a"], "max_seq_len is 9,000; this model is made for"),
        ],
    )
    def test_are_exit_code_2_and_print_nothing(
        self, arguments: list[str], message: str, invoke: Callable[..., Result], bundle: Path
    ) -> None:
        result = invoke("generate", bundle, *arguments)

        assert result.exit_code == 2
        assert result.stdout == ""
        assert message in result.stderr


class TestInterrupt:
    def test_keeps_what_was_generated(
        self, start: Callable[..., "subprocess.Popen[bytes]"], bundle: Path
    ) -> None:
        with start("generate", bundle, PROMPT, "--max-new-tokens", "8000") as process:
            assert process.stdout is not None
            first = process.stdout.read(20)
            process.send_signal(signal.SIGINT)
            rest, stderr = process.communicate()

        assert process.returncode == 130
        assert len(first) == 20
        assert rest.endswith(b"\n")
        assert b"interrupted: " in stderr
        assert b"Traceback" not in stderr

    def test_while_the_prompt_is_read_says_how_long_it_took(
        self, invoke: Callable[..., Result], bundle: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[float] = []

        def is_cancelled() -> bool:
            asked.append(time.perf_counter())
            time.sleep(0.05)
            return len(asked) > 2  # between two chunks of the prompt

        monkeypatch.setattr(
            generate_command, "cancel_on_interrupt", lambda: contextlib.nullcontext(is_cancelled)
        )

        result = invoke("generate", bundle, "word " * 2000)

        assert result.exit_code == 130
        assert result.stdout == "\n"
        said = re.search(
            r"interrupted after (\d+\.\d+) s, before the first token \(\d+ prompt tokens\)",
            result.stderr,
        )
        assert said is not None
        assert float(said[1]) >= 0.1

    def test_json_says_cancelled(
        self, start: Callable[..., "subprocess.Popen[bytes]"], bundle: Path
    ) -> None:
        # The first, short prompt is printed when its batch of one ends; then the long one runs.
        arguments = ("--chat", "--max-new-tokens", "4000", "--json")
        with start("generate", bundle, PROMPT, "b", "c", *arguments) as process:
            assert process.stdout is not None
            first = json.loads(process.stdout.readline())
            process.send_signal(signal.SIGINT)
            others, _ = process.communicate()

        found = [json.loads(line) for line in others.splitlines()]
        assert process.returncode == 130
        assert first["finish_reason"] in {"stop", "length"}
        assert [o["finish_reason"] for o in found] == ["cancelled", "cancelled"]
        assert found[1]["token_ids"] == []


class TestEngines:
    @pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
    @pytest.mark.parametrize("verb", ["generate", "chat"])
    def test_that_no_float32_bundle_has_name_the_export(
        self, verb: str, backend: str, invoke: Callable[..., Result], bundle: Path
    ) -> None:
        prompt = [PROMPT] if verb == "generate" else []

        result = invoke(verb, bundle, *prompt, "--backend", backend)

        assert result.exit_code == 1
        assert result.stdout == ""
        assert "the bundle is in float32 and has no tensorrt graphs" in result.stderr
        assert "--fp16` (or --bf16)" in result.stderr

    def test_do_not_run_on_a_cpu(self, invoke: Callable[..., Result], bundle: Path) -> None:
        result = invoke("generate", bundle, PROMPT, "--backend", "tensorrt-rtx", "--device", "cpu")

        assert result.exit_code == 2
        assert "the tensorrt-rtx backend runs on NVIDIA GPUs; device is cpu" in result.stderr
