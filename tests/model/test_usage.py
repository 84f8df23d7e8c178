"""What people do with models, done with converted ones: serving, compiling, exporting, offloading, quantising."""

from importlib.util import find_spec

import pytest
import torch
import transformers
from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    DataCollatorWithFlattening,
    GenerationConfig,
    PreTrainedTokenizerFast,
    pipeline,
)

import hf_alibi
from helpers.caches import SMALL
from helpers.tiny_models import CAUSAL_TYPES, FIRST_TOKEN, NOT_BUILT, VOCABULARY, stock_tiny

# Tables of positions; grouped heads; norms of queries and keys; layers of two kinds; windows; sinks.
FAMILIES = ("gpt2", "llama", "qwen3", "gemma3_text", "mistral", "gpt_oss")
families = pytest.mark.parametrize("model_type", FAMILIES)
EXACT = 1e-4


def converted(model_type, **changes):
    """With an output layer of its own: one tied to large embeddings says next to nothing but the last token."""
    model = hf_alibi.apply_alibi(stock_tiny(model_type, **{"tie_word_embeddings": False, **changes}))
    model.generation_config.eos_token_id = None
    return model


def tokens(*shape, seed=0):
    return torch.randint(FIRST_TOKEN, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def left_padding(input_ids, count):
    """A mask of which the first sequence's first tokens are out."""
    mask = torch.ones_like(input_ids)
    mask[0, :count] = 0
    return mask


@torch.no_grad()
def logits(model, input_ids, **kwargs):
    return model(input_ids, **kwargs).logits


def largest(a, b):
    return (a - b).abs().max().item()


def agree(a, b, mask=None):
    """Whether logits are equal but for rounding, where the mask lets any be compared."""
    if mask is not None:
        a, b = a[mask.bool()], b[mask.bool()]
    return largest(a, b) < EXACT * b.abs().max().item()


@families
def test_these_logits_depend_on_the_bias(model_type):
    """The comparisons below can fail: without the bias logits are others."""
    with_bias, without = converted(model_type), converted(model_type)
    without.config.alibi_slopes = [0.0] * 4
    input_ids = tokens(2, 24)
    expected = logits(with_bias, input_ids)
    assert (logits(without, input_ids) - expected).norm() > 0.03 * expected.norm()
    # And tokens are.
    assert not torch.equal(generate(without, input_ids), generate(with_bias, input_ids))


# --- generation ---

GREEDY = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}


def generate(model, input_ids, **kwargs):
    return model.generate(input_ids, **GREEDY, **kwargs)


def generate_batch(model, prompts, **kwargs):
    results = model.generate_batch(
        [prompt.tolist() for prompt in prompts],
        generation_config=GenerationConfig(**GREEDY, eos_token_id=-1),
        continuous_batching_config=ContinuousBatchingConfig(**{**SMALL, **kwargs}),
    )
    by_number = sorted(results.items(), key=lambda item: int(item[0].removeprefix("req_")))
    assert [result.error for _, result in by_number] == [None] * len(prompts)
    return [result.generated_tokens for _, result in by_number]


@pytest.mark.parametrize(
    ("model_type", "backend"),
    # Sinks are refused with sdpa.
    [(name, backend) for name in FAMILIES for backend in ("sdpa", "eager") if (name, backend) != ("gpt_oss", "sdpa")],
)
def test_continuous_batching_gives_what_generate_gives(model_type, backend):
    """Prompts longer than a page, than a batch and than a window, with requests that come and go."""
    model = converted(model_type)
    model.set_attn_implementation(backend)
    prompts = [tokens(length, seed=length) for length in (5, 23, 40, 11, 3, 17)]
    found = generate_batch(model, prompts)
    assert found == [generate(model, prompt[None])[0, len(prompt) :].tolist() for prompt in prompts]
    assert len({tuple(new) for new in found}) == len(prompts)
    assert model.config._attn_implementation == backend
    hf_alibi.verify_alibi(model)


def test_continuous_batching_shares_what_prompts_have_in_common():
    model = converted("llama")
    common = tokens(24)
    prompts = [torch.cat([common, tokens(5, seed=seed)]) for seed in range(1, 4)]
    found = generate_batch(model, prompts, allow_block_sharing=True)
    assert found == [generate(model, prompt[None])[0, len(prompt) :].tolist() for prompt in prompts]


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_continuous_batching_is_refused_before_it_begins(model_type):
    model = converted(model_type)
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match=r"'sdpa' and 'eager', this model has 'flex_attention'; call model\.set_attn"):
        generate_batch(model, [tokens(5)])


@pytest.mark.parametrize("model_type", ["gptj", "falcon", "bart", "diffllama"])
def test_continuous_batching_is_refused_where_layers_do_not_use_the_cache(model_type):
    """The unconverted models of these families fail, or give something else than generate."""
    with pytest.raises(ValueError, match=r"has no continuous batching: .* use generate"):
        generate_batch(converted(model_type), [tokens(5)])


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_continuous_batching_stays_with_sdpa_where_flash_attention_is_there(model_type, monkeypatch):
    """transformers would switch to it, and to kernels from the hub, which have no ALiBi form."""
    from transformers.generation.continuous_batching import continuous_api

    for version in (2, 3):
        monkeypatch.setattr(continuous_api, f"is_flash_attn_{version}_available", lambda **kwargs: True)
    model = converted(model_type)
    prompt = tokens(9)
    settings = ContinuousBatchingConfig(**SMALL)
    results = model.generate_batch(
        [prompt.tolist()],
        generation_config=GenerationConfig(**GREEDY, eos_token_id=-1),
        continuous_batching_config=settings,
    )
    assert [result.generated_tokens for result in results.values()] == [generate(model, prompt[None])[0, 9:].tolist()]
    assert settings.auto_switch_to_flash


def test_the_paged_form_is_refused_outside_continuous_batching():
    """transformers makes no mask for it there: a query would see what comes after it."""
    model = converted("llama")
    model.set_attn_implementation("paged|eager")
    with pytest.raises(ValueError, match=r"without the paged cache .* use attn_implementation='eager'"):
        logits(model, tokens(1, 9))


@families
def test_drafted_tokens_change_nothing(model_type):
    model = converted(model_type)
    draft = converted(model_type, num_hidden_layers=1) if model_type == "llama" else converted("llama")
    prompt = tokens(1, 30)
    expected = generate(model, prompt)
    assert torch.equal(generate(model, prompt, assistant_model=draft), expected)
    # A drafter that is always right has all its tokens taken, a prompt that repeats itself finds some to draft.
    assert torch.equal(generate(model, prompt, assistant_model=converted(model_type)), expected)
    repeated = tokens(1, 6).repeat(1, 5)
    expected = generate(model, repeated)
    assert torch.equal(generate(model, repeated, prompt_lookup_num_tokens=3), expected)


# --- compiling and exporting ---


@pytest.mark.parametrize("model_type", FAMILIES[2:])  # for the others see test_models
def test_compiles_to_one_graph(model_type):
    torch.compiler.reset()  # or the limit of compilations counts those of other tests
    model, input_ids = converted(model_type), tokens(2, 24)
    mask = left_padding(input_ids, 5)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert agree(logits(compiled, input_ids, use_cache=False), logits(model, input_ids))
    masked = logits(compiled, input_ids, attention_mask=mask, use_cache=False)
    assert agree(masked, logits(model, input_ids, attention_mask=mask), mask)


@families
@pytest.mark.parametrize("padded", [pytest.param(False, marks=pytest.mark.slow), True])
def test_exports_with_dynamic_shapes(model_type, padded):
    model = converted(model_type)
    batch, length = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("length", min=2, max=512)
    arguments = {"input_ids": tokens(3, 20), "use_cache": False}
    shapes = {"input_ids": {0: batch, 1: length}, "use_cache": None}
    if padded:
        arguments["attention_mask"] = left_padding(arguments["input_ids"], 4)
        shapes["attention_mask"] = {0: batch, 1: length}
    program = torch.export.export(model, (), arguments, dynamic_shapes=shapes).module()
    for shape in ((2, 7), (4, 70)):
        given = {"input_ids": tokens(*shape, seed=1), "use_cache": False}
        mask = left_padding(given["input_ids"], 3) if padded else None
        if padded:
            given["attention_mask"] = mask
        with torch.no_grad():
            assert agree(program(**given).logits, model(**given).logits, mask)


# --- loading ---


@pytest.fixture
def saved(tmp_path):
    """Saves a converted model; gives it and where it is."""

    def save(model_type):
        model = hf_alibi.apply_alibi(stock_tiny(model_type))
        model.save_pretrained(tmp_path / "model", max_shard_size="50KB")
        return model, tmp_path / "model"

    return save


@families
def test_loads_anywhere(model_type, saved, tmp_path):
    model, path = saved(model_type)
    input_ids = tokens(2, 24)
    expected = logits(model, input_ids)
    for where in ("auto", "cpu"):
        loaded = AutoModelForCausalLM.from_pretrained(path, device_map=where)
        assert torch.equal(logits(loaded, input_ids), expected)
        hf_alibi.verify_alibi(loaded)
    layers = "transformer.h" if model_type == "gpt2" else "model.layers"
    parts = {name.rpartition(".")[0] for name, _ in model.named_parameters() if not name.startswith(layers)}
    on_disk = {**dict.fromkeys(parts, "cpu"), f"{layers}.0": "cpu", f"{layers}.1": "disk"}
    on_disk.update({f"{layers}.{index}": "disk" for index in range(2, model.config.num_hidden_layers)})
    # Parts without parameters have a place, too, and so has an output layer that is tied to the embeddings.
    without = ["transformer.wpe", "transformer.drop"] if model_type == "gpt2" else ["model.rotary_emb"]
    on_disk.update(dict.fromkeys([*without, "lm_head"], "cpu"))
    offloaded = AutoModelForCausalLM.from_pretrained(path, device_map=on_disk, offload_folder=tmp_path / "offload")
    assert any(parameter.is_meta for parameter in offloaded.parameters())
    assert torch.equal(logits(offloaded, input_ids), expected)


@families
def test_fills_a_model_built_without_memory(model_type, saved):
    model, path = saved(model_type)
    input_ids = tokens(2, 24)
    config = AutoConfig.from_pretrained(path)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    assert all(parameter.is_meta for parameter in empty.parameters())
    with init_empty_weights():
        empty = AutoModelForCausalLM.from_config(config)
    empty.tie_weights()
    filled = load_checkpoint_and_dispatch(empty, path, device_map={"": "cpu"}).eval()
    assert torch.equal(logits(filled, input_ids), logits(model, input_ids))


@pytest.mark.parametrize(
    "model_type", [name for name in CAUSAL_TYPES if name in hf_alibi.supported_families() and name not in NOT_BUILT]
)
def test_weights_are_renamed_and_merged_as_in_plain_checkpoints(model_type, tmp_path):
    """Experts stand one by one in the files; what is not recognised would be left as it was initialised."""
    stock = stock_tiny(model_type)
    stock.save_pretrained(tmp_path / "plain")
    model_class = getattr(hf_alibi, f"Alibi{type(stock).__name__}")
    loaded, report = model_class.from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert not any(report.values())
    input_ids = tokens(2, 24)
    expected = logits(hf_alibi.apply_alibi(stock), input_ids)
    assert agree(logits(loaded, input_ids), expected)
    loaded.save_pretrained(tmp_path / "converted")
    assert agree(logits(model_class.from_pretrained(tmp_path / "converted"), input_ids), expected)


@pytest.mark.skipif(find_spec("torchao") is None, reason="needs the package torchao")
@pytest.mark.filterwarnings("ignore")
@families
def test_loads_quantised(model_type, saved):
    from torchao.quantization import Int8WeightOnlyConfig

    model, path = saved(model_type)
    quantised = AutoModelForCausalLM.from_pretrained(
        path, quantization_config=transformers.TorchAoConfig(Int8WeightOnlyConfig())
    )
    kinds = {type(parameter.data).__name__ for parameter in quantised.parameters()}
    if model_type != "gpt2":  # whose projections are no nn.Linear
        assert any("Int8" in kind or "Affine" in kind for kind in kinds), kinds
    input_ids = tokens(2, 24)
    expected = logits(model, input_ids)
    difference = (logits(quantised, input_ids) - expected).norm() / expected.norm()
    assert difference < 0.05
    hf_alibi.verify_alibi(quantised)


# --- text ---


@pytest.fixture(scope="module")
def tokenizer():
    """A word for each token; begins with nothing, so that a chat template says it all."""
    words = {f"w{number}": number for number in range(VOCABULARY)}
    inner = Tokenizer(models.WordLevel(words, unk_token="w3"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="w0", padding_side="left")
    tokenizer.chat_template = (
        "{% for message in messages %}{{ 'w4 ' if message.role == 'user' else 'w5 ' }}{{ message.content }} w6 "
        "{% endfor %}{% if add_generation_prompt %}w5{% endif %}"
    )
    return tokenizer


@families
def test_pipeline(model_type, tokenizer):
    model = converted(model_type)
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    texts = [" ".join(f"w{token}" for token in tokens(length, seed=length)) for length in (4, 30, 11)]
    options = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    alone = [write(text, **options)[0]["generated_text"] for text in texts]
    by_hand = model.generate(tokenizer(texts[1], return_tensors="pt").input_ids, **{**GREEDY, "max_new_tokens": 8})
    assert alone[1] == tokenizer.decode(by_hand[0, 30:])
    batched = write(texts, batch_size=3, **options)
    assert [result[0]["generated_text"] for result in batched] == alone


@families
def test_chat(model_type, tokenizer):
    model = converted(model_type)
    chat = [{"role": "user", "content": "w40 w41 w42"}, {"role": "assistant", "content": "w50"}]
    chat.append({"role": "user", "content": "w60 w61"})
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    answer = write(chat, max_new_tokens=8, do_sample=False)[0]["generated_text"][-1]
    prompt = torch.tensor([[4, 40, 41, 42, 6, 5, 50, 6, 4, 60, 61, 6, 5]])
    expected = model.generate(prompt, **{**GREEDY, "max_new_tokens": 8})[0, prompt.shape[1] :]
    assert answer == {"role": "assistant", "content": tokenizer.decode(expected)}


# --- training ---


def packed_and_alone(model, lengths=(13, 1, 30, 20)):
    """Losses of sequences in one row, as `DataCollatorWithFlattening` puts them, and of each alone."""
    sequences = [tokens(length, seed=length) for length in lengths]
    batch = DataCollatorWithFlattening()([{"input_ids": sequence.tolist()} for sequence in sequences])
    with torch.no_grad():
        packed = model(**batch, use_cache=False).loss.item()
        whole = [sequence[None] for sequence in sequences if len(sequence) > 1]
        parts = [model(sequence, labels=sequence).loss.item() for sequence in whole]
    counts = [sequence.shape[1] - 1 for sequence in whole]
    return packed, sum(loss * count for loss, count in zip(parts, counts, strict=True)) / sum(counts)


# Families whose model makes its masks without looking at position ids, so that packed sequences see each other.
NOT_ISOLATED = {"gpt_oss": "its forward gives position_ids to no mask; it leaves packing to flash attention's kernels"}


@families
def test_packed_sequences_train_as_if_alone(model_type):
    """Where they do not, they do not in the unconverted model either."""
    packed, alone = packed_and_alone(converted(model_type))
    if model_type in NOT_ISOLATED:
        stock_packed, stock_alone = packed_and_alone(stock_tiny(model_type))
        assert stock_packed != pytest.approx(stock_alone, rel=1e-3)
        assert packed != pytest.approx(alone, rel=1e-3)
    else:
        assert packed == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("model_type", NOT_ISOLATED)
def test_a_mask_isolates_packed_sequences_in_every_family(model_type):
    """What to do for the others: masks by kind of layer, given by hand."""
    model = converted(model_type)
    first, second = tokens(9), tokens(12, seed=1)
    segment = torch.cat([torch.zeros(9), torch.ones(12)])
    seen = torch.ones(21, 21, dtype=torch.bool).tril() & (segment[:, None] == segment)
    near = torch.ones(21, 21, dtype=torch.bool).triu(1 - model.config.sliding_window)
    masks = {
        kind: torch.zeros(1, 1, 21, 21).masked_fill(~allowed, torch.finfo(torch.float32).min)
        for kind, allowed in {"full_attention": seen, "sliding_attention": seen & near}.items()
    }
    packed = logits(model, torch.cat([first, second])[None], attention_mask=masks)
    assert agree(packed, torch.cat([logits(model, first[None]), logits(model, second[None])], dim=1))


@families
def test_gradient_checkpointing_changes_no_gradient(model_type):
    gradients = []
    input_ids = tokens(2, 24)
    for reentrant in (None, False, True):
        model = converted(model_type).train()
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(3)
        loss = model(input_ids, attention_mask=left_padding(input_ids, 5), labels=input_ids, use_cache=False).loss
        loss.backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    without, *others = gradients
    assert without.norm() > 0
    for other in others:
        assert largest(other, without) < 1e-5 * without.abs().max().item()
