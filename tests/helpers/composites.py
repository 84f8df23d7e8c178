"""Small models with a text decoder and other parts."""

import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    CLIPVisionConfig,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Speech2TextConfig,
    Speech2TextForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 99,
    "max_position_embeddings": 16,
    "initializer_range": 0.2,
    **SPECIAL,
}

VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}

BERT = {**TEXT, "num_hidden_layers": 1}

ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}

# Class, config, the Auto class that holds it, and where the decoder's layers are.
SEQ2SEQ = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": 99,
    "init_std": 0.2,
    "decoder_start_token_id": 1,
    **SPECIAL,
}
BERT_2_BERT = EncoderDecoderConfig.from_encoder_decoder_configs(
    BertConfig(**BERT), BertConfig(**BERT, is_decoder=True, add_cross_attention=True)
)
MODELS = {
    "bart": (
        BartForConditionalGeneration,
        BartConfig(**SEQ2SEQ, max_position_embeddings=16),
        AutoModelForSeq2SeqLM,
        "model.decoder.",
    ),
    "whisper": (
        WhisperForConditionalGeneration,
        WhisperConfig(**SEQ2SEQ, max_source_positions=20, max_target_positions=16, num_mel_bins=8),
        AutoModelForSpeechSeq2Seq,
        "model.decoder.",
    ),
    "speech2text": (
        Speech2TextForConditionalGeneration,
        Speech2TextConfig(**SEQ2SEQ, input_feat_per_channel=8, conv_channels=16, max_target_positions=16),
        AutoModelForSpeechSeq2Seq,
        "model.decoder.",
    ),
    "bert2bert": (EncoderDecoderModel, BERT_2_BERT, AutoModelForSeq2SeqLM, "decoder."),
    "llava": (
        LlavaForConditionalGeneration,
        LlavaConfig(vision_config=CLIPVisionConfig(**VISION), text_config=LlamaConfig(**TEXT), image_token_index=98),
        AutoModelForImageTextToText,
        "model.language_model.",
    ),
    "qwen2_vl": (
        Qwen2VLForConditionalGeneration,
        Qwen2VLConfig(
            text_config={**TEXT, "rope_parameters": ROPE},
            vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4},
        ),
        AutoModelForImageTextToText,
        "model.language_model.",
    ),
    "idefics3": (
        Idefics3ForConditionalGeneration,
        Idefics3Config(vision_config=VISION, text_config={**TEXT, "model_type": "llama"}),
        AutoModelForImageTextToText,
        "model.text_model.",
    ),
}


def built(model_class, config):
    torch.manual_seed(0)
    return model_class(config).eval()
