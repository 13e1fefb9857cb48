"""What is quick to start: what needs no model imports no PyTorch, what reads adapters' files nothing but PyTorch."""

import subprocess
import sys

import pytest

from lori_trl.cli.training_options import FILE_OF_HELP, help_made_for

HEAVY = ("accelerate", "datasets", "peft", "torch", "torch.distributed.tensor", "transformers", "trl")
# All commands run in one process: what one of them imports is there at the end.
CODE = """
import contextlib, io, sys
import lori_trl
from lori_trl.cli import main, sft
for program, *arguments in {calls!r}:
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.suppress(SystemExit):
        assert not {{"lori": main, "lori-sft": sft}}[program](arguments), arguments
    assert output.getvalue() or "copy" in arguments, arguments
print(*(name for name in {heavy!r} if name in sys.modules))
"""


def imported_by(calls: list[list[str]]) -> set[str]:
    code = CODE.format(calls=calls, heavy=HEAVY)
    return set(subprocess.check_output([sys.executable, "-c", code], text=True).split())


def test_what_needs_no_model_imports_no_torch(tmp_path):
    calls = [
        "lori --help",
        "lori --version",
        "lori --print-completion bash",
        "lori recipes --help",
        "lori recipes list",
        "lori recipes show quickstart",
        f"lori recipes copy quickstart {tmp_path / 'mine.yaml'}",
        "lori recipes validate table8_lori_s_concat",
        "lori tasks --help",
        "lori merge --help",
        "lori-sft --version",
        "lori-sft --print-completion bash",
        *(["lori-sft --help"] if FILE_OF_HELP.read_text().startswith(f"{help_made_for()}\n") else []),
    ]
    assert imported_by([call.split() for call in calls]) == set()
    assert (tmp_path / "mine.yaml").is_file()


def test_what_reads_adapters_imports_torch_alone(adapter_folder, tmp_path):
    folder, compact = str(adapter_folder), str(tmp_path / "compact.safetensors")
    calls = [
        ["lori", "tasks", folder],
        ["lori", "push", folder, "me/code", "--dry-run"],
        ["lori", "export", "--compact", folder, compact],
        ["lori", "expand", compact, str(tmp_path / "expanded")],
        ["lori", "inspect", folder],
    ]
    assert imported_by(calls) == {"torch"}


@pytest.mark.parametrize("shell", ["bash", "zsh"])
@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("lori", ["merge", "inspect", "tasks", "validate", "--allow_modified"]),
        ("lori-sft", ["--calibration_method", "gradient", "--per_device_train_batch_size", "--recipe"]),
    ],
)
def test_completion_knows_verbs_and_options(program, words, shell, capsys):
    from lori_trl.cli import main, sft

    with pytest.raises(SystemExit) as end:
        {"lori": main, "lori-sft": sft}[program](["--print-completion", shell])
    script = capsys.readouterr().out
    assert end.value.code in (None, 0) and all(word in script for word in words)
    assert {"bash": "_shtab_compgen_files", "zsh": "_files"}[shell] in script
