"""The shapes of the recipes' base models, so that nothing is downloaded to count parameters or to check an export."""

from transformers import LlamaConfig, MistralConfig

# Both are behind a network, and Llama-3 behind an agreement.
_SHAPES = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_key_value_heads": 8}
KNOWN_CONFIGS = {
    "meta-llama/Meta-Llama-3-8B": LlamaConfig(vocab_size=128256, num_attention_heads=32, **_SHAPES),
    "mistralai/Mistral-7B-v0.1": MistralConfig(vocab_size=32000, num_attention_heads=32, **_SHAPES),
}
