"""`lori recipes`: the shipped ones are listed, shown, checked and copied."""

import pytest

from lori_trl.cli import main


def test_recipes_list_show_copy_validate(tmp_path, capsys):
    assert main(["recipes", "list"]) == 0
    shown = capsys.readouterr().out
    assert "run here: quickstart.yaml: 310 s on 2 CPU cores; held-out loss 3.654 -> 2.197" in shown
    listed = {line.split()[0]: line for line in shown.splitlines() if ".yaml" in line}
    for name, *parts in (
        ("quickstart.yaml", "SmolLM2-135M-Instruct", "LoRI-S", "32"),
        ("math_lori_d_mistral_r64.yaml", "math", "Mistral-7B-v0.1", "LoRI-D", "64", "Table 5"),
        ("continual_safety_nlu_lori_s.yaml", "nlu", "LoRI-S", "kept", "Figure 3"),
        ("loraf_nlu.yaml", "LoRAF", "64", "LoRAF paper, Table 2"),
        ("safety_dora.yaml", "safety", "Meta-Llama-3-8B", "DoRA", "32", "Table 7"),
        ("code_fft.yaml", "code", "full", "Table 6"),
    ):
        assert all(part in listed[name] for part in parts), listed[name]
    assert main(["recipes", "show", "quickstart"]) == 0
    text = capsys.readouterr().out
    assert main(["recipes", "copy", "quickstart", str(tmp_path / "mine.yaml")]) == 0
    assert (tmp_path / "mine.yaml").read_text() == text
    assert main(["recipes", "validate", str(tmp_path / "mine.yaml")]) == 0
    assert "no faults" in capsys.readouterr().out
    (tmp_path / "mine.yaml").write_text("sparsity: high\n")
    for arguments in (["copy", "quickstart", str(tmp_path / "mine.yaml")], ["validate", str(tmp_path / "mine.yaml")]):
        with pytest.raises(SystemExit) as exit:
            main(["recipes", *arguments])
        assert exit.value.code == 2
    assert (tmp_path / "mine.yaml").read_text() == "sparsity: high\n"
