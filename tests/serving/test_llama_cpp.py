"""llama.cpp with a base and an adapter says what PEFT says. `make test-serving` compiles it and runs this."""

from pathlib import Path

import numpy as np
import pytest
import torch
from base_gguf import write_base
from peft import get_peft_model
from tiny import SIZES, lora_config
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lori_trl.adapter.gguf_export import ARCHITECTURES, export_gguf

pytestmark = pytest.mark.serving

# So large that attention is far from even, and a wrong order of rows shows.
CONFIG = SIZES | {"initializer_range": 0.3}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**CONFIG)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**CONFIG)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**CONFIG)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**CONFIG, head_dim=16)),
}


def of_llama_cpp(base: Path, adapter: Path | None, tokens: list[int]) -> np.ndarray:
    """Return the log-probabilities of what follows each token `(tokens, vocabulary)`, computed in float32."""
    from llama_cpp import GGML_TYPE_F32, Llama

    cache = {"type_k": GGML_TYPE_F32, "type_v": GGML_TYPE_F32}
    lora_path = None if adapter is None else str(adapter)
    llama = Llama(str(base), lora_path=lora_path, n_ctx=256, n_threads=1, logits_all=True, verbose=False, **cache)
    llama.eval(tokens)
    return np.asarray(Llama.logits_to_logprobs(llama.scores[: len(tokens)]))


@torch.inference_mode()
def of_peft(model: PreTrainedModel, tokens: list[int]) -> np.ndarray:
    return model.eval()(torch.tensor([tokens])).logits[0].log_softmax(-1).numpy()


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_architecture(model_type, tmp_path):
    torch.manual_seed(2)
    model = MODELS[model_type]()
    model.save_pretrained(tmp_path / "base")
    base = write_base(model, tmp_path / "base.gguf")
    tokens = torch.randint(100, (24,)).tolist()
    before = of_peft(model, tokens)
    np.testing.assert_allclose(of_llama_cpp(base, None, tokens), before, atol=1e-4)

    patterns = {"rank_pattern": {"q_proj": 2, "up_proj": 7}, "alpha_pattern": {"k_proj": 3}}
    adapted = get_peft_model(model, lora_config(init_lora_weights=False, **patterns))
    adapted.save_pretrained(tmp_path / "adapter")
    after = of_peft(adapted, tokens)
    adapter = export_gguf(tmp_path / "adapter", tmp_path / "adapter.gguf", base_model=str(tmp_path / "base"))
    assert abs(after - before).max() > 0.5
    np.testing.assert_allclose(of_llama_cpp(base, adapter, tokens), after, atol=1e-4)
