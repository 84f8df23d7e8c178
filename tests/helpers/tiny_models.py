"""Tiny random causal language models of every type that transformers knows."""

import math
from copy import deepcopy
from dataclasses import MISSING, fields
from zlib import crc32

import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

# Those of transformers itself: importing the package adds its own names to the tables.
CAUSAL_TYPES: tuple[str, ...] = tuple(
    sorted(name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if not name.startswith("alibi_"))
)

# Types that no model is built of, with the reason.
NOT_BUILT: dict[str, str] = {
    "gemma3n": "its vision tower is a model of timm, which is not installed",
    "gemma4_assistant": "drafts from the keys, values and hidden states of another model; does not run from token ids",
    "gemma4_unified_assistant": "as gemma4_assistant; its config also wants earlier layers whose keys to share",
}
if Version(transformers.__version__) < Version("5.20"):
    names = "bamba diffllama falcon_h1 granitemoehybrid lfm2 lfm2_moe moshi nemotron nemotron_h zamba zamba2"
    NOT_BUILT |= dict.fromkeys(names.split(), "transformers before 5.20 has other attention, caches or kernels for it")

VOCABULARY = 99

# Special tokens have smaller ids than this: ids drawn from here up to `VOCABULARY` are plain text to every type.
FIRST_TOKEN = 32

# The largest value of a whole-number field, by its name.
SIZES: dict[str, int] = {
    name: size
    for size, names in {
        VOCABULARY: "vocab_size vocab_size_per_layer_input",
        128: """
            n_inner ffn_dim decoder_ffn_dim encoder_ffn_dim intermediate_size d_inner dff dim_ff ffn_hidden_size
            feed_forward_size dense_intermediate_size intermediate_size_mlp d_ff mlp_dim
        """,
        64: """
            hidden_size d_model n_embd emb_dim embedding_size embedding_dim moe_intermediate_size lru_width
            shared_expert_intermediate_size shared_experts_intermediate_size shared_intermediate_size
            moe_shared_expert_intermediate_size expert_ffn_hidden_size word_embed_proj_dim out_hidden_size
            input_embedding_size output_embedding_size mm_embed_dim audio_embed_dim output_proj_dims
            max_position_embeddings n_positions n_ctx max_seq_len context_length original_max_position_embeddings
            max_source_positions max_target_positions num_position_embeddings position_embedding_size mm_posemb_size
            vision_output_dim projector_input_dim projector_output_dim adapter_in_dim adapter_out_dim
            adapter_input_size hidden_size_global backbone_hidden_size input_size rel_extent
            router_hidden_size prompt_mid_dim image_size dim_model_base ext_pw_out_channel
            depthwise_separable_out_channel nemo_conv_channels encoder_hash_byte_group_vocab bias_max_distance
        """,
        32: """
            q_lora_rank o_lora_rank hidden_size_per_layer_input pronunciation_embed_dim shape_embed_dim
            pronunciation_vocab_size shape_vocab_size num_mel_bins hc_lowrank num_centroids codebook_size
        """,
        16: """
            head_dim swa_head_dim kv_lora_rank qk_nope_head_dim v_head_dim kv_channels linear_head_dim
            linear_key_head_dim linear_value_head_dim mamba_d_state ssm_state_size state_size mamba_head_dim dim_head
            attention_head_size laurel_rank adapter_rank mamba_chunk_size position_bias_num_buckets d_kv
            downsample_hidden_size base_channels num_filters chunk_size d_head index_head_dim gated_norm_rank
            output_channels
        """,
        8: """
            sliding_window sliding_window_size window_size attention_window_size local_attention attention_chunk_size
            keep_window_size qk_rope_head_dim rotary_dim index_topk patch_size d_rel prompt_length
            mamba_n_heads mamba_num_heads num_buckets
        """,
        4: """
            num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads
            encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads linear_num_value_heads
            linear_num_heads swa_num_attention_heads conf_num_attention_heads num_experts n_routed_experts
            num_local_experts moe_num_experts index_n_heads o_groups centroid_intermediate_top_k zero_expert_num
            n_mamba_heads
        """,
        2: """
            num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads num_hidden_layers n_layer
            n_layers num_layers decoder_layers encoder_layers num_decoder_layers num_encoder_layers
            num_experts_per_tok moe_topk moe_k top_k_experts n_groups mamba_ngroups depth num_blocks
            conf_num_hidden_layers num_global_layers
        """,
        1: """
            n_shared_experts num_shared_experts moe_num_shared_experts n_group topk_group first_k_dense_replace
            num_dense_layers moe_layer_start_index num_residual_layers num_res_blocks num_mtp_layers
            num_nextn_predict_layers
        """,
    }.items()
    for name in names.split()
}

# Set although their default is None, which stands for a value derived from the others.
DERIVED = {
    "num_key_value_heads",
    "num_kv_heads",
    "head_dim",
    "n_inner",
    "ffn_hidden_size",
    "embedding_size",
    "num_experts_per_tok",
}

# What the general rule does not know, by the type of the config; a dict under the name of a part is for that part.
OVERRIDES: dict[str, dict] = {
    "bamba": {"attn_layer_indices": [1]},
    "big_bird": {"attention_type": "original_full"},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    # The attention reads a rotary base that the config of its part does not define, and clips without asking whether.
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1},
    "dots3_note_text": {
        "sliding_window": 8,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 32,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 16,
    },
    # The last layers read the keys and values of earlier ones of their kind.
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "inkling_text": {"logits_mup_width_multiplier": 1.0},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "laguna": {"layer_types": ["sliding_attention", "full_attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4_text": {"no_rope_layers": [1, 0]},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 8},
    "mellum": {"layer_types": ["sliding_attention", "full_attention"]},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        "mlp_layer_types": ["dense", "sparse"],
        "index_block_size": 8,
        "index_topk_blocks": 2,
    },
    "ministral": {"layer_types": ["sliding_attention", "full_attention"]},
    # Its cache keeps a window only, which its masks do not know: both agree where the window holds everything.
    "moshi": {"sliding_window": 64},
    # With several codebooks, the batch holds a row for each.
    "musicgen_decoder": {"num_codebooks": 1},
    "musicgen_melody_decoder": {"num_codebooks": 1},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "attention_window_size": 16},
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [32, 32],
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "hash_seed": 0,
    },
    "smollm3": {"no_rope_layers": [1, 0]},
    "xlm": {"causal": True},
    "xlnet": {"attn_type": "uni"},
    "xmod": {"default_language": "en_XX"},
    # The hybrid layers share their weights: with a single one, tying fails.
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"]},
}


def _field_defaults(config_class: type[PreTrainedConfig]) -> dict:
    """The fields of a config and their defaults; those without one have None."""
    return {
        field.name: field.default
        if field.default is not MISSING
        else None
        if field.default_factory is MISSING
        else field.default_factory()
        for field in fields(config_class)
        if field.init
    }


def _layers(config_class: type[PreTrainedConfig], names) -> dict:
    """As few layers as show each kind that the family has by default."""
    default = config_class()
    kinds = {
        name: list(dict.fromkeys(getattr(default, name) or ()))
        for name in ("layer_types", "mlp_layer_types")
        if name in names
    }
    count = max(2, *(len(each) for each in kinds.values()))
    lists = {name: (each * count)[:count] for name, each in kinds.items() if each}
    return {**lists, "num_hidden_layers": count}


def _tiny_fields(config_class: type[PreTrainedConfig]) -> dict:
    """Values of the fields of a config of this class that make it small."""
    defaults = _field_defaults(config_class)
    small = {}
    special = 3
    for name, default in defaults.items():
        whole = isinstance(default, int) and not isinstance(default, bool)
        if name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            small[name] = ("pad_token_id", "bos_token_id", "eos_token_id").index(name)
        elif name.endswith(("_token_id", "_token_index", "_index")) and whole and default > special:
            small[name] = special
            special += 1
        elif name in SIZES and (whole or (name in DERIVED and default is None)):
            small[name] = min(SIZES[name], default) if whole else SIZES[name]
        elif "drop" in name and isinstance(default, float):
            small[name] = 0.0
        elif name == "is_decoder":
            # Encoders such as BERT attend causally only then.
            small[name] = True
    # Heads of latent attention share nothing: each has its own key.
    if "kv_lora_rank" in defaults and "num_key_value_heads" in defaults:
        small["num_key_value_heads"] = 4
    if "layer_types" in defaults or "mlp_layer_types" in defaults:
        small.update(_layers(config_class, defaults))
    elif "sliding_window" in small:
        # Every layer is windowed: two of these still reach the first of 24 tokens.
        small["sliding_window"] = 16
    return small


def _parts(config_class):
    """Field, class and default values of each part of a composite; older versions of transformers say no values."""
    specs = getattr(config_class, "sub_configs_defaults", None)
    if specs is None:
        for key, part in config_class.sub_configs.items():
            yield key, part if issubclass(part, PreTrainedConfig) else CONFIG_MAPPING["llama"], None
        return
    for key, spec in specs.items():
        part = spec.config_class
        yield key, part if issubclass(part, PreTrainedConfig) else CONFIG_MAPPING[spec.model_type], spec.init_kwargs


def tiny_config(config_class: type[PreTrainedConfig], base: dict | None = None, **changes) -> PreTrainedConfig:
    """A small config of this class, with `base` for what is not made small.

    The text part of a composite takes the changes that it has a field for, the whole the others.
    """
    # A copy: configs complete the dicts that they are given in place.
    known = deepcopy(OVERRIDES.get(config_class.model_type, {}))
    parts = {}
    for key, part_class, defaults in _parts(config_class):
        inner = dict(known.get(key, {}))
        if key in ("text_config", "decoder"):
            names = {*_field_defaults(part_class), *part_class.attribute_map}
            inner.update({name: changes.pop(name) for name in list(changes) if name in names})
        parts[key] = tiny_config(part_class, defaults, **inner)
    changes = {config_class.attribute_map.get(name, name): value for name, value in changes.items()}
    return config_class(**{**(base or {}), **_tiny_fields(config_class), **known, **parts, **changes})


# Parameters of recurrent layers: a random draw instead of the family's own makes them forget at once or diverge.
OWN_INIT = ("A_log", "dt_bias", "D", "time_decay", "time_first", "recurrent_param")


@torch.no_grad()
def make_sensitive(model: nn.Module, seed: int) -> None:
    """Draw weights so large that every token matters: with the usual ones attention is next to even."""
    generator = torch.Generator().manual_seed(seed)
    done = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in done or name in OWN_INIT or (isinstance(module, nn.Conv1d) and module.groups > 1):
                continue
            done.add(id(parameter))
            noise = torch.randn(parameter.shape, generator=generator)
            if "sink" in name:
                parameter.copy_(noise)
            elif parameter.ndim < 2:
                parameter.add_(0.1 * noise)
            elif isinstance(module, nn.Embedding):
                parameter.copy_(noise)
                if module.padding_idx is not None:
                    # Zeros, as families have it; some that load a model write them over what was saved.
                    parameter[module.padding_idx] = 0.0
            else:
                fan_in = parameter.shape[-2] if isinstance(module, Conv1D) else parameter[0].numel()
                if parameter.ndim == 3 and not isinstance(module, nn.Conv1d):
                    # Experts, of either orientation.
                    fan_in = max(parameter.shape[1:])
                parameter.copy_(noise * 1.5 / math.sqrt(fan_in))


def stock_tiny(model_type: str, *, attn_implementation: str | None = None, **changes) -> PreTrainedModel:
    """A tiny random model of this type in evaluation mode, the same at every call; `changes` are config fields."""
    if model_type in NOT_BUILT:
        raise ValueError(f"{model_type}: {NOT_BUILT[model_type]}")
    config = tiny_config(CONFIG_MAPPING[model_type], **changes)
    seed = crc32(model_type.encode())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        options = {"dtype": torch.float32, "attn_implementation": attn_implementation}
        if model_type.startswith("musicgen"):
            # The auto class hands over the whole config, which the class for the decoder alone cannot read.
            model = AutoModelForCausalLM._model_mapping[type(config)]._from_config(config.decoder, **options)
        else:
            model = AutoModelForCausalLM.from_config(config, **options)
    make_sensitive(model, seed)
    return model.eval()
