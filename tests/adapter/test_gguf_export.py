"""llama.cpp's LoRA file: its tensors and facts by arithmetic, and what it has no place for."""

import json
import shutil
from pathlib import Path

import gguf
import pytest
import torch
from files_by_hand import read_tensors
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from tiny import lora_config, trained_adapter
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from lori_trl.adapter.gguf_export import export_gguf, interleave_halves
from lori_trl.cli import main
from lori_trl.method.layers import lora_layers

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@pytest.fixture
def base(model_folder):
    return AutoModelForCausalLM.from_pretrained(model_folder)


def save_plain(base, folder: Path, **changes) -> PeftModel:
    """Save a plain LoRA adapter with random A and B."""
    torch.manual_seed(1)
    model = get_peft_model(base, lora_config(init_lora_weights=False, **changes))
    model.save_pretrained(folder, save_embedding_layers=False)
    return model


def rows_of_llama_cpp(heads: int, head_dim: int = 8) -> list[int]:
    """Where the rows of q or k come from: a head's first, its first of the second half, its second, and so on."""
    half = head_dim // 2
    return [head * head_dim + entry // 2 + entry % 2 * half for head in range(heads) for entry in range(head_dim)]


ROWS = {"attn_q": rows_of_llama_cpp(heads=4), "attn_k": rows_of_llama_cpp(heads=2)}


def deltas(file: Path) -> dict[str, torch.Tensor]:
    """Name -> alpha / rank B A, as llama.cpp adds it to that weight."""
    reader = gguf.GGUFReader(file)
    alpha = reader.get_field("adapter.lora.alpha").contents()
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    names = {name.rpartition(".")[0] for name in tensors}
    assert len(tensors) == 2 * len(names)
    factors = {name: (tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]) for name in names}
    return {name: alpha / len(A) * B @ A for name, (A, B) in factors.items()}


def assert_same_deltas(file: Path, model: PeftModel) -> None:
    """Compare a file with what PEFT adds to each weight."""
    exported = deltas(file)
    for path, layer in lora_layers(model, "default").items():
        _, _, number, module = path.split(".", 3)
        name, expected = NAMES[module], layer.get_delta_weight("default")
        expected = expected[ROWS[name]] if name in ROWS else expected
        torch.testing.assert_close(exported.pop(f"blk.{number}.{name}.weight"), expected)
    assert not exported


def test_a_trained_adapter(base, tmp_path, capsys):
    file = tmp_path / "code.gguf"
    assert main(["export", "--gguf", str(trained_adapter()), str(file)]) == 0
    assert "code.gguf: " in capsys.readouterr().out
    fields = {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}
    assert {name: value for name, value in fields.items() if not name.startswith("GGUF.")} == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "general.name": "code-lori-s",
        "general.base_model.count": 1,
        "general.base_model.0.name": "tiny-llama",
        "adapter.type": "lora",
        "adapter.lora.task_name": "code",
        "adapter.lora.alpha": 8.0,
    }
    assert_same_deltas(file, PeftModel.from_pretrained(base, trained_adapter()))
    assert (tmp_path / "code.gguf.Modelfile").read_text() == (
        "# ollama create NAME -f code.gguf.Modelfile\n"
        "# FROM: the base model as GGUF, in float32, float16 or quantized.\n"
        "FROM ./tiny-llama.gguf\n"
        "ADAPTER ./code.gguf\n"
    )


@pytest.mark.parametrize(
    ("changes", "alpha"),
    [
        ({"use_rslora": True}, 16.0),  # 8 / sqrt(4) = 16 / 4
        ({"rank_pattern": {"q_proj": 2}}, 8.0),
        ({"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"k_proj": 5, "layers.1.mlp.up_proj": 1}}, 8.0),
        (
            {
                "rank_pattern": {"down_proj": 2},
                "use_rslora": True,
                "target_modules": ["q_proj", "k_proj", "down_proj"],
            },
            16.0,
        ),
    ],
)
def test_every_scaling_becomes_one_alpha(changes, alpha, base, tmp_path):
    model = save_plain(base, tmp_path / "plain", **changes)
    file = export_gguf(tmp_path / "plain", tmp_path / "plain.gguf")
    assert gguf.GGUFReader(file).get_field("adapter.lora.alpha").contents() == alpha
    assert_same_deltas(file, model)


def test_the_rows_are_in_llama_cpps_rotary_order():
    """Attention scores of q and k are the same, whether halves are rotated together or neighbours."""
    heads, head_dim, length = 3, 16, 5
    q, k = torch.randn(2, length, heads * head_dim)
    config = LlamaConfig(hidden_size=heads * head_dim, num_attention_heads=heads)
    cos, sin = LlamaRotaryEmbedding(config)(q, torch.arange(length)[None])
    split = [rows.view(1, length, heads, head_dim).transpose(1, 2) for rows in (q, k)]
    rotated_q, rotated_k = apply_rotary_pos_emb(*split, cos, sin)
    scores = rotated_q @ rotated_k.transpose(2, 3)

    def rotate_neighbours(rows):
        pairs = interleave_halves(rows.T, heads).T.reshape(length, heads, head_dim // 2, 2)
        angles = torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
        turned = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles), angles)[:, None]
        return torch.view_as_real(turned).flatten(2).transpose(0, 1)

    torch.testing.assert_close(rotate_neighbours(q) @ rotate_neighbours(k).transpose(1, 2), scores[0])


def test_qwen_rotates_as_transformers_does(base, tmp_path):
    model = save_plain(base, tmp_path / "plain")
    write_config(tmp_path / "qwen", model_type="qwen2", num_hidden_layers=2)
    file = export_gguf(tmp_path / "plain", tmp_path / "plain.gguf", base_model=str(tmp_path / "qwen"))
    assert gguf.GGUFReader(file).get_field("general.architecture").contents() == "qwen2"
    q = model.base_model.model.model.layers[0].self_attn.q_proj.get_delta_weight("default")
    torch.testing.assert_close(deltas(file)["blk.0.attn_q.weight"], q)


def write_config(folder: Path, **config) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"use_dora": True}, "use_dora=True.*can be exported to GGUF"),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save=.*can be exported to GGUF"),
        ({"target_modules": ["q_proj", "lm_head"]}, "adapts lm_head, and llama.cpp's llama of 2 layers"),
    ],
)
def test_what_llama_cpp_has_no_place_for(changes, says, base, model_folder, tmp_path):
    save_plain(base, tmp_path / "plain", **changes)
    shutil.copytree(model_folder, tmp_path / "tied")
    config = tmp_path / "tied" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": True}))
    refuse(says, tmp_path, base_model=str(tmp_path / "tied"))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2'.*Compared are llama, mistral"),
        ({"model_type": "nothing"}, "config of the base model .* cannot be read"),
        ({"model_type": "llama", "num_hidden_layers": 1}, r"adapts model.layers.1.\S+, .*, \.\.\., and llama.cpp's"),
        (
            {"model_type": "llama", "num_attention_heads": 8, "num_hidden_layers": 2},
            "k_proj has 16 outputs, and 8 heads",
        ),
    ],
)
def test_another_base(config, says, base, tmp_path):
    save_plain(base, tmp_path / "plain")
    refuse(says, tmp_path, base_model=str(write_config(tmp_path / "base", **config)))


def refuse(says: str, folder: Path, **options) -> None:
    """Assert that the adapter `plain` of a folder is refused, and nothing written."""
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        export_gguf(folder / "plain", folder / "out.gguf", **options)
    assert not [*folder.glob("out*"), *folder.glob(".out*")]


def test_a_scaling_of_zero(base, tmp_path):
    save_plain(base, tmp_path / "plain", alpha_pattern={"q_proj": 0})
    refuse("scaling of 0, which llama.cpp takes for 1", tmp_path)


def test_a_base_that_nobody_names(base, model_folder, tmp_path, caplog):
    save_plain(base, tmp_path / "plain")
    config = tmp_path / "plain" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": None}))
    refuse("`base_model` is missing", tmp_path)
    export_gguf(tmp_path / "plain", tmp_path / "out.gguf", base_model=str(model_folder))
    assert "FROM ./tiny-llama.gguf" in (tmp_path / "out.gguf.Modelfile").read_text()
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "me/other\nFROM evil"}))
    export_gguf(tmp_path / "plain", tmp_path / "out.gguf", base_model=str(model_folder), overwrite=True)
    assert "is exported for" in caplog.text
    assert [line.split()[0] for line in (tmp_path / "out.gguf.Modelfile").read_text().splitlines()] == [
        *"##",
        "FROM",
        "ADAPTER",
    ]


def test_files_of_half_precision_are_written_in_float32(base, tmp_path):
    save_plain(base, tmp_path / "plain")
    weights = tmp_path / "plain" / "adapter_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in read_tensors(weights).items()}, weights)
    file = export_gguf(tmp_path / "plain", tmp_path / "out.gguf")
    assert {tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors} == {"F32"}


def test_nothing_is_replaced_unasked(tmp_path):
    (tmp_path / "code.gguf.Modelfile").write_text("FROM scratch")
    with pytest.raises(FileExistsError, match="code.gguf.Modelfile` exists.*--overwrite"):
        export_gguf(trained_adapter(), tmp_path / "code.gguf")
    assert [*tmp_path.iterdir()] == [tmp_path / "code.gguf.Modelfile"]
    export_gguf(trained_adapter(), tmp_path / "code.gguf", overwrite=True)
    with pytest.raises(ValueError, match="lies in"):
        export_gguf(trained_adapter(), trained_adapter() / "code.gguf", overwrite=True)


def test_without_the_package(monkeypatch, tmp_path):
    monkeypatch.setattr("lori_trl.adapter.gguf_export.is_gguf_available", lambda: False)
    with pytest.raises(ImportError, match="Run `pip install gguf`"):
        export_gguf(trained_adapter(), tmp_path / "code.gguf")
