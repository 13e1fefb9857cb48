"""Plain LoRA: an adapter whose A and B are all there is."""

from ..method.lora_fields import NOT_PLAIN
from .folder import AdapterFolder

_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")  # the others change the base model


def check_plain(adapter: AdapterFolder, use: str) -> None:
    """
    Refuse an adapter of which A and B are not all there is.

    Args:
        adapter ([`AdapterFolder`]): the adapter, LoRI or plain LoRA.
        use (`str`): what it cannot be then, for the message, e.g. `"merged"`.

    Raises:
        `ValueError`: it is no plain LoRA, or its ranks are not those of its config.
    """
    config = adapter.config
    faults = [f"{key}={config[key]!r} ({why})" for key, why in NOT_PLAIN.items() if config.get(key)]
    if config.get("bias", "none") != "none":
        faults.append(f"bias={config['bias']!r} (biases were trained)")
    if config.get("init_lora_weights") not in _PLAIN_STARTS:
        faults.append(f"init_lora_weights={config['init_lora_weights']!r} (it belongs to a changed base model)")
    if faults:
        raise ValueError(
            f"`{adapter.name}` has {', '.join(faults)}. Plain LoRA and LoRI adapters can be {use}: their A and B are "
            "all there is. Train it as one of these, or convert it with PEFT first."
        )
    odd = [*adapter.others, *adapter.unpaired, *sorted(adapter.dtypes - {"F32", "BF16", "F16"})]
    if odd or not adapter.shapes:
        raise ValueError(
            f"`{adapter.name}` holds {len(odd) or 'no'} tensors that cannot be {use}"
            f"{': ' if odd else ''}{', '.join(odd[:3])}{', ...' if len(odd) > 3 else ''}. Needed is "
            "a pair lora_A `(rank, in_features)`, lora_B `(out_features, rank)` for each of its linear layers, in "
            "float32, bfloat16 or float16, and nothing else (no DoRA, embeddings, biases or modules_to_save). "
            "Train it as plain LoRA or LoRI."
        )
    for path, (_, rank, _) in adapter.shapes.items():
        if rank != (expected := adapter.setting(path, "r", "rank_pattern")):
            raise ValueError(
                f"`{adapter.name}`: {path} has rank {rank}, adapter_config.json says {expected}. They must agree, "
                "for alpha / rank depends on it. Fetch or save the adapter again."
            )
