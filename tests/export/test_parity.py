"""The comparison itself, with engines that are transformers: right ones pass, and each kind of wrong one fails."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_alibi
from helpers.exports import TEXT, converted
from helpers.runs import refused
from hf_alibi.errors import VerificationError
from hf_alibi.export import parity
from hf_alibi.export.engines.engine import COMPARED, Continuation
from hf_alibi.export.gguf import export_gguf

LENGTHS = (4, 40)


class Transformers:
    """An engine that computes with a model of transformers, and may be wrong."""

    version = "an engine 1.0"

    def __init__(self, model, folder, error=0.0, other_text=False, other_tokens=False):
        self.model, self.folder, self.error = model, folder, error
        self.other_text, self.other_tokens, self.batches, self.closed = other_text, other_tokens, [], False

    @torch.no_grad()
    def continued(self, prompts, tokens):
        self.batches.append([len(prompt) for prompt in prompts])
        return [self._continued(list(prompt), tokens) for prompt in prompts]

    def _continued(self, prompt, tokens):
        rows, ids = [], []
        for _ in range(tokens):
            rows.append(self.model(torch.tensor([[*prompt, *ids]])).logits[0, -1] + self.error)
            order = rows[-1].argsort(descending=True)
            ids.append(int(order[1 if self.other_text else 0]))
        return Continuation(ids, torch.stack(rows)[:COMPARED].numpy())

    @torch.no_grad()
    def prompt_logits(self, prompt):
        noise = torch.randn(len(prompt), 320, generator=torch.Generator().manual_seed(0))
        return (self.model(torch.tensor([prompt])).logits[0] + self.error * noise).numpy()

    def tokenized(self, text):
        ids = AutoTokenizer.from_pretrained(self.folder)(text).input_ids
        return ids[1:] if self.other_tokens else ids

    def close(self):
        self.closed = True


@pytest.fixture
def compare(tmp_path, monkeypatch):
    """Compare a small model in a GGUF file, which is not opened, with an engine that is made of its folder."""
    folder, file = tmp_path / "model", tmp_path / "model.gguf"
    converted(folder, initializer_range=0.2)
    monkeypatch.setattr(parity, "import_module", lambda _: SimpleNamespace(open_engine=lambda *_: compare.engine))

    def compare(type="f32", model=None, lengths=LENGTHS, new_tokens=5, text_file=None, **wrong):
        if not file.exists():
            export_gguf(folder, file, type=type)
        of_engine = model or AutoModelForCausalLM.from_pretrained(folder)
        compare.engine = Transformers(of_engine, folder, **wrong)
        return parity.verify_export("gguf", folder, file, lengths=lengths, new_tokens=new_tokens, text_file=text_file)

    compare.folder = folder
    return compare


def test_an_engine_that_agrees_passes(compare):
    result = compare()
    assert [row["tokens"] for row in result["rows"]] == list(LENGTHS)
    assert all(row["same_text"] and row["difference"] < 1e-5 for row in result["rows"])
    assert (result["engine"], result["bound"]) == ("an engine 1.0", 2e-4)
    assert all(row["control"] > 1e-2 for row in result["rows"])
    assert json.loads(json.dumps(result)) == result
    assert compare.engine.closed
    assert compare.engine.batches == [list(LENGTHS)]


def test_the_reference_is_that_of_the_folder(compare):
    """What stands in the report is what somebody else computes."""
    result = compare(error=1e-4)
    assert all(0.9e-4 < row["difference"] < 1.1e-4 for row in result["rows"])


def wrong_model(folder, slopes):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.config.alibi_slopes = slopes
    return model


@pytest.mark.parametrize("slopes", [[0.0] * 6, [slope / 2 for slope in hf_alibi.alibi_slopes(6).tolist()]])
def test_controls_without_the_bias_and_with_other_slopes_fail(slopes, compare):
    with pytest.raises(
        VerificationError, match=r"differs from transformers by .* after 4 tokens; rounding explains 2e"
    ):
        compare(model=wrong_model(compare.folder, slopes))
    assert compare.engine.closed


def test_the_text_is_compared_beyond_the_logits(compare, monkeypatch):
    assert compare(new_tokens=COMPARED + 5)["rows"][0]["same_text"]
    right = Transformers._continued

    def wrong_at_the_end(self, prompt, tokens):
        found = right(self, prompt, tokens)
        return Continuation([*found.ids[:-1], (found.ids[-1] + 1) % 320], found.logits)

    monkeypatch.setattr(Transformers, "_continued", wrong_at_the_end)
    with pytest.raises(VerificationError, match="writes another text"):
        compare(new_tokens=COMPARED + 5)


def test_a_difference_above_the_bound_fails(compare):
    with pytest.raises(VerificationError, match=r"differs from transformers by 3\.0e-04"):
        compare(error=3e-4)


def test_tokens_that_magnify_rounding_are_compared_with_float64(compare, monkeypatch):
    expected, dtypes = parity._expected, []

    def magnified(model, prompt, found):
        dtypes.append(model.dtype)
        return expected(model, prompt, found) + (1e-3 if model.dtype == torch.float64 else 0.0)

    monkeypatch.setattr(parity, "_expected", magnified)
    rows = compare(error=3e-4)["rows"]
    assert dtypes.count(torch.float64) == 2
    assert all(0.6e-3 < row["difference"] < 0.8e-3 and 0.9e-3 < row["rounding"] < 1.1e-3 for row in rows)
    with pytest.raises(VerificationError, match=r"by 6.0e-03 after 4 tokens, where float32 itself is off by 1.0e-03"):
        compare(error=7e-3)


def test_logits_that_are_not_numbers_fail(compare):
    with pytest.raises(VerificationError, match="differs from transformers by nan"):
        compare(error=float("nan"))


def test_another_text_fails_and_a_tie_does_not(compare, monkeypatch):
    with pytest.raises(VerificationError, match="writes another text"):
        compare(other_text=True)
    monkeypatch.setattr(parity._Kind, "bound", lambda *_: 100.0)
    monkeypatch.setattr(parity, "_CONTROL", 0.0)
    assert not any(row["same_text"] for row in compare(other_text=True)["rows"])


def test_prompts_that_cannot_tell_are_refused(compare, monkeypatch):
    def blind(*_):
        return 1e-4

    monkeypatch.setattr(parity, "_without_bias", blind)
    with pytest.raises(VerificationError, match="cannot tell whether the bias"):
        compare()


def test_long_prompts_come_alone(compare, monkeypatch):
    monkeypatch.setattr(parity, "_TOGETHER", 10)
    compare(lengths=(40, 4, 8))
    assert compare.engine.batches == [[4, 8], [40]]


def test_a_text_is_cut_into_the_same_tokens(compare, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 3)
    assert compare(text_file=text)["rows"]
    with pytest.raises(VerificationError, match=r"makes .* tokens of the first .* characters"):
        compare(text_file=text, other_tokens=True)
    with refused("tokens, and 4000 are compared; give more text"):
        compare(text_file=text, lengths=[4000])
    with refused("cannot read"):
        compare(text_file=tmp_path / "none.txt")


def test_rounded_weights_are_compared_by_perplexity(compare, tmp_path, monkeypatch):
    monkeypatch.setattr(parity, "_PERPLEXITY_TOKENS", 64)
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 3)
    result = compare(type="f16", text_file=text)
    assert result["perplexity"]["engine"] == pytest.approx(result["perplexity"]["transformers"])
    ids = torch.tensor([AutoTokenizer.from_pretrained(compare.folder)(TEXT * 3).input_ids[:64]])
    loss = AutoModelForCausalLM.from_pretrained(compare.folder)(ids, labels=ids).loss
    assert result["perplexity"]["transformers"] == pytest.approx(loss.exp().item(), rel=1e-5)
    with pytest.raises(VerificationError, match="more than 2% above"):
        compare(text_file=text, error=1.0)
    with refused("which are compared by perplexity: give text_file"):
        compare()


def test_a_broken_file_is_one_line(compare, tmp_path, monkeypatch):
    compare()
    file = tmp_path / "model.gguf"
    whole = file.read_bytes()
    file.write_bytes(b"no GGUF" * 100)
    with refused("gguf cannot load .*model.gguf"):
        compare()
    file.write_bytes(whole)
    failing = SimpleNamespace(open_engine=lambda *_: (_ for _ in ()).throw(RuntimeError("out of\nmemory")))
    monkeypatch.setattr(parity, "import_module", lambda _: failing)
    with refused("llama-cpp-python cannot load .*model.gguf: out of memory"):
        parity.verify_export("gguf", compare.folder, file)


def test_bad_requests_are_one_line(tmp_path):
    converted(tmp_path / "model")
    for given, message in [
        (("tgi", tmp_path / "model"), "target is 'tgi'; it must be one of vllm, gguf, onnx"),
        (("gguf", tmp_path / "model"), "gguf compares an exported file: give it after the folder"),
        (("vllm", tmp_path / "model", "x"), "vLLM serves the folder itself: leave x out"),
        (("gguf", tmp_path / "model", tmp_path / "x"), "there is no such file; write it by `hf-alibi export gguf`"),
    ]:
        with refused(message):
            parity.verify_export(*given)
    with refused("must be at least 1, got 0"):
        parity.verify_export("vllm", tmp_path / "model", new_tokens=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, "vllm", None)
        with refused("vllm cannot be imported.*pip install vllm"):
            parity.verify_export("vllm", tmp_path / "model")
