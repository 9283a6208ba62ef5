"""Every causal language model of the installed `transformers`, in a size that trains in a moment."""

from typing import Any

# By the names that configurations have for it; each is given where the architecture's own has such a field.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_size", "word_embed_proj_dim", "dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("decoder_layers", "encoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "dim_ff", "dff"), 48),
    **dict.fromkeys(("ffn_hidden_size", "d_inner", "intermediate_size_mlp", "feed_forward_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("shared_intermediate_size", "moe_shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "n_shared_experts", "num_shared_experts"), 1),
    **dict.fromkeys(("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "kv_channels"), 8),
    **dict.fromkeys(("dim_head", "attention_head_size", "d_head", "attention_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank", "index_head_dim"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions"), 64),
    "max_source_positions": 64,
    "index_n_heads": 2,
    "index_topk": 4,
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 16),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 8),
    "is_decoder": True,
    "rotary_dim": 4,
    "sliding_window": 8,
}
_EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8},
    "deepseek_v2": {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "reformer": {"axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}


def causal_architectures() -> list[str]:
    """Their names."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_model(architecture: str) -> dict[str, Any]:
    """The section ``model`` of a run, with tiny sizes wherever the configuration has them."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[architecture]
    try:
        defaults = config_class()
    except StrictDataclassError:
        # It has none that it accepts.
        return {"architecture": architecture}
    return {"architecture": architecture, "config": _tiny(defaults) | _EXCEPTIONS.get(architecture, {})}


def _tiny(defaults: Any) -> dict[str, Any]:
    fields = vars(defaults)
    values = {name: size for name, size in _SIZES.items() if fields.get(name) is not None}
    if "kv_lora_rank" in values and "num_key_value_heads" in values:
        # Latent attention expands to one key for each head.
        values["num_key_value_heads"] = values["num_attention_heads"]
    for name in defaults.sub_configs:
        if getattr(defaults, name, None) is not None:
            values[name] = _tiny(getattr(defaults, name))
    return values
