"""The model card: facts in, one template, a README.md out."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from .recipes import shipped_folder


def render_model_card(lori_config: Mapping[str, Any], base_model: str | None) -> str:
    """
    Render the card of an adapter.

    Args:
        lori_config (`Mapping[str, Any]`): the contents of `lori_config.json`.
        base_model (`str`, *optional*): the base model's Hub name or path.

    Returns:
        `str`: the card, with metadata that the Hub accepts. A base model in a local folder is not named.
    """
    if base_model and (Path(base_model).exists() or base_model.count("/") > 1):
        base_model = None
    card_data = ModelCardData(
        base_model=base_model or None,
        base_model_relation="adapter" if base_model else None,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["lori", "trl", "peft", "lora"],
    )
    card = ModelCard.from_template(
        card_data,
        template_path=shipped_folder("model_cards") / "lori_adapter.md.jinja",
        base_model=base_model,
        **lori_config,
    )
    return str(card)
