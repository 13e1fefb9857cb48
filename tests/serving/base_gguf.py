"""A base model as a float32 GGUF file, written by hand: what an adapter's file is put onto."""

from pathlib import Path

import gguf
from transformers import PreTrainedModel

from lori_trl.adapter.gguf_export import ARCHITECTURES, interleave_halves

# What `GGUFReader` finds in every file, and what is said of the weights, which are others here.
_NOT_COPIED = ("GGUF.", "general.", "llama.")


def write_base(model: PreTrainedModel, file: Path, vocabulary_of: Path | None = None) -> Path:
    """
    Write a model with tied embeddings or not, with the vocabulary of another GGUF file or with none.

    Only token ids can be given to a model without a vocabulary.
    """
    config = model.config
    architecture = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(file, architecture, use_temp_file=True)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if vocabulary_of is None:
        writer.add_tokenizer_model("no_vocab")
    else:
        _copy_vocabulary(gguf.GGUFReader(vocabulary_of), writer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], config.num_hidden_layers)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        module = name.split(".")[-2]
        if architecture == "llama" and module in heads:
            tensor = interleave_halves(tensor, heads[module])
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _copy_vocabulary(reader: gguf.GGUFReader, writer: gguf.GGUFWriter) -> None:
    for name, field in reader.fields.items():
        if not name.startswith(_NOT_COPIED):
            kinds = field.types
            writer.add_key_value(name, field.contents(), kinds[0], kinds[-1] if len(kinds) > 1 else None)
