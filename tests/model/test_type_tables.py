"""Tables by model type, in transformers and PEFT: a converted model has the row of what it was converted from."""

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutomaticSpeechRecognitionPipeline,
    AutoTokenizer,
    ByT5Tokenizer,
    WhisperFeatureExtractor,
)
from transformers.models.auto import (
    feature_extraction_auto,
    image_processing_auto,
    processing_auto,
    tokenization_auto,
    video_processing_auto,
)

import hf_alibi
from helpers.composites import MODELS, built

NAMES = {
    "tokenizer": tokenization_auto.TOKENIZER_MAPPING_NAMES,
    "processor": processing_auto.PROCESSOR_MAPPING_NAMES,
    "feature extractor": feature_extraction_auto.FEATURE_EXTRACTOR_MAPPING_NAMES,
    "image processor": image_processing_auto.IMAGE_PROCESSOR_MAPPING_NAMES,
    "video processor": video_processing_auto.VIDEO_PROCESSOR_MAPPING_NAMES,
}
TABLES = {
    "tokenizer": tokenization_auto.TOKENIZER_MAPPING,
    "processor": processing_auto.PROCESSOR_MAPPING,
    "feature extractor": feature_extraction_auto.FEATURE_EXTRACTOR_MAPPING,
    "image processor": image_processing_auto.IMAGE_PROCESSOR_MAPPING,
    "video processor": video_processing_auto.VIDEO_PROCESSOR_MAPPING,
}
FAMILIES = sorted(hf_alibi.supported_families())
# What tokenizer_config.json of a folder on the hub may say.
WRITTEN = {
    "nothing": None,
    "a fast class": {"tokenizer_class": "PreTrainedTokenizerFast"},
    "another family's": {"tokenizer_class": "LlamaTokenizerFast", "eos_token": "b"},
}


@pytest.mark.parametrize("what", NAMES)
def test_every_row_is_there(what):
    rows = {kind: row for kind, row in NAMES[what].items() if not kind.startswith("alibi_") and kind in CONFIG_MAPPING}
    assert rows
    assert all(NAMES[what][f"alibi_{kind}"] == row for kind, row in rows.items())


@pytest.mark.parametrize("what", TABLES)
def test_classes_are_found_by_config(what):
    found = 0
    for kind in FAMILIES:
        if kind in NAMES[what]:
            try:
                stock = TABLES[what][CONFIG_MAPPING[kind]]
            except (ImportError, AttributeError, ValueError):
                continue  # its package is not installed
            assert TABLES[what][CONFIG_MAPPING[f"alibi_{kind}"]] == stock
            found += 1
    assert found or what in ("image processor", "video processor")


def test_the_set_of_wrong_tokenizers_has_them():
    wrong = tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS
    assert {f"alibi_{kind}" for kind in wrong if not kind.startswith("alibi_")} <= wrong


def folder_of(path, model_type, written):
    """A folder as on the hub: a byte-level tokenizer, and a config that names the model type."""
    path.mkdir()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, "he", "ll"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("h", "e"), ("l", "l")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path / "tokenizer.json"))
    if written is not None:
        (path / "tokenizer_config.json").write_text(json.dumps(written))
    (path / "config.json").write_text(json.dumps({"model_type": model_type}))
    return path


def outcome(path):
    """Class, ids and special tokens of the tokenizer, or the error."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        ids = tokenizer("hello  World, 123456")["input_ids"]
        return type(tokenizer), ids, tokenizer.special_tokens_map, tokenizer.padding_side, tokenizer.model_max_length
    except Exception as error:
        return type(error), str(error).replace(str(path), "").replace("alibi_", "")


@pytest.mark.parametrize("written", WRITTEN.values(), ids=WRITTEN)
@pytest.mark.parametrize("family", [kind for kind in FAMILIES if kind in NAMES["tokenizer"]])
def test_a_tokenizer_of_the_hub_is_what_it_is_beside_the_plain_model(family, written, tmp_path):
    AutoConfig.for_model(f"alibi_{family}")
    plain = outcome(folder_of(tmp_path / "plain", family, written))
    assert outcome(folder_of(tmp_path / "alibi", f"alibi_{family}", written)) == plain


def test_classes_that_are_missing_are_missed_as_before():
    assert tokenization_auto.tokenizer_class_from_name("NoSuchTokenizer") is None
    assert image_processing_auto.get_image_processor_class_from_name("NoSuchImageProcessor") is None
    with pytest.raises(ModuleNotFoundError, match="alibi_nothing"):
        __import__("transformers.models.alibi_nothing")


def test_awq_scales_the_same_activations():
    awq = pytest.importorskip("transformers.integrations.awq")
    assert awq.AWQ_SCALES_MAPPINGS["alibi_falcon"] == awq.AWQ_SCALES_MAPPINGS["falcon"]


@pytest.mark.parametrize("kind", ["whisper", "musicgen", "vision-encoder-decoder"])
def test_types_that_transformers_compares_are_equal_to_the_plain_one_and_written_as_our_own(kind):
    config = CONFIG_MAPPING[f"alibi_{kind}"]
    assert config.model_type == kind
    assert kind == config.model_type
    assert config.model_type in (kind, "other")
    assert config.model_type == f"alibi_{kind}"
    assert (config.model_type != kind) is False
    assert config.model_type != "llama"
    assert json.dumps(config.model_type) == f'"alibi_{kind}"'
    assert {f"alibi_{kind}": 1}[config.model_type] == 1
    assert CONFIG_MAPPING["alibi_llama"].model_type != "llama"


def test_whisper_keeps_the_prompt_as_it_is_given():
    plain, model = built(*MODELS["whisper"][:2]), hf_alibi.apply_alibi(built(*MODELS["whisper"][:2]))
    prompt = torch.tensor([[7, 8, 9]])
    start = {"batch_size": 1, "model_input_name": "input_features", "decoder_start_token_id": torch.tensor([1])}
    for each in (plain, model):
        ids, _ = each._prepare_decoder_input_ids_for_generation(
            model_kwargs={"decoder_input_ids": prompt}, device="cpu", **start
        )
        assert ids.tolist() == prompt.tolist()


def test_the_pipeline_for_speech_knows_whisper():
    model = hf_alibi.apply_alibi(built(*MODELS["whisper"][:2]))
    pipe = AutomaticSpeechRecognitionPipeline(
        model=model, tokenizer=ByT5Tokenizer(), feature_extractor=WhisperFeatureExtractor(feature_size=8)
    )
    assert pipe.type == "seq2seq_whisper"
