"""Long documents are tokenised in parts, and give the tokens of the whole."""

import random

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hf_alibi.training import encoding
from hf_alibi.training.data import load_tokenizer
from hf_alibi.training.encoding import encode_documents

WORDS = ["the", "house", "don't", "123", "x=1;", "\u00e9t\u00e9", "\n", "\n\n", "\t", "  ", "...", "a\nb", "\U0001f600"]


def text(words, seed=0):
    drawn = random.Random(seed)
    return " ".join(drawn.choice(WORDS) for _ in range(words))


def trained(pre_tokenizer, normalizer=None):
    """A BPE tokenizer with these rules for where words begin and end."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator([text(2000)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {
    "bytes": lambda: load_tokenizer("bytes"),
    "GPT-2": lambda: trained(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "with a space before": lambda: trained(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "words": lambda: trained(pre_tokenizers.Whitespace()),
    "across words": lambda: trained(pre_tokenizers.Split(Regex("\n\n"), "isolated")),
    "Unigram's spaces": lambda: trained(pre_tokenizers.Metaspace()),
    "one prefix": lambda: trained(pre_tokenizers.ByteLevel(False), normalizers.Prepend("_")),
}


@pytest.fixture
def calls(monkeypatch):
    """Characters of the texts that tokenizers were given at once, but for the tries of cuts."""
    monkeypatch.setattr(encoding, "_PART", 400)
    monkeypatch.setattr(encoding, "_AT_ONCE", 1000)
    monkeypatch.setattr(encoding, "_NEAR", 60)
    sizes = []
    groups = encoding._groups

    def recorded(parts):
        for group in groups(parts):
            sizes.append([len(part) for _, part in group])
            yield group

    monkeypatch.setattr(encoding, "_groups", recorded)
    return sizes


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("bos", [None, 0])
def test_the_tokens_are_those_of_the_whole_document(kind, bos, calls):
    tokenizer = TOKENIZERS[kind]()
    documents = [text(3000), "short", text(500, seed=1), "x" * 5000, " " * 3000, text(100, seed=2)]
    given = encode_documents({"text": documents}, tokenizer=tokenizer, bos=bos)["input_ids"]
    first = [] if bos is None else [bos]
    for ids, document in zip(given, documents, strict=True):
        assert ids.tolist() == [*first, *tokenizer.encode(document, add_special_tokens=False), tokenizer.eos_token_id]


@pytest.mark.parametrize("kind", ["bytes", "GPT-2", "words"])
def test_long_documents_are_parted(kind, calls):
    encode_documents({"text": [text(3000)]}, tokenizer=TOKENIZERS[kind](), bos=None)
    assert max(map(max, calls)) < 500
    assert max(map(sum, calls)) < 1500


def test_what_tokenizers_do_to_the_beginning_of_a_text_is_done_once(calls):
    encode_documents({"text": [text(3000)]}, tokenizer=TOKENIZERS["one prefix"](), bos=None)
    assert max(map(max, calls)) > 10_000
