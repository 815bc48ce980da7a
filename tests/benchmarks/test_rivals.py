"""The command's own part: its line in the results, and where these go."""

from pathlib import Path

from benchmarks.rivals import repeatable_command, unused


def test_the_command_in_a_result_names_no_path_of_this_machine() -> None:
    words = ["--shape", "g2b", "--folder=/home/x/models", "--prompt-tokens", "256,4096"]
    words += ["--rivals-python", "/home/x/venv/bin/python", "--export-options", "--int4 --auto"]
    assert repeatable_command(words) == (
        "python -m benchmarks.rivals --shape g2b --prompt-tokens 256,4096 "
        "--export-options '--int4 --auto' --rivals-python rivals-venv/bin/python"
    )


def test_results_of_the_same_day_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "2026-11-23-rivals-g2b.md"
    names = []
    for _ in range(3):
        names.append(unused(path).name)
        unused(path).touch()
    assert names == [path.name, "2026-11-23-rivals-g2b-2.md", "2026-11-23-rivals-g2b-3.md"]
