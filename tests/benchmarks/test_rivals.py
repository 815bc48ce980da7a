"""The command's own part: its line in the results."""

from benchmarks.rivals import repeatable_command


def test_the_command_in_a_result_names_no_path_of_this_machine() -> None:
    words = ["--shape", "g2b", "--folder=/home/x/models", "--prompt-tokens", "256,4096"]
    words += ["--rivals-python", "/home/x/venv/bin/python", "--export-options", "--int4 --auto"]
    assert repeatable_command(words) == (
        "python -m benchmarks.rivals --shape g2b --prompt-tokens 256,4096 "
        "--export-options '--int4 --auto' --rivals-python rivals-venv/bin/python"
    )
