"""`flash_attention_2` against the float64 reference, on a stand-in for flash-attn where there is no GPU.

The stand-in has the signatures that flash-attn documents, and computes what its docstrings say, densely in float64.
"""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, DataCollatorWithFlattening, PreTrainedModel, StaticCache, modeling_utils

import hf_alibi
from helpers import reference
from helpers.attention import expected, largest, layer, qkv
from helpers.models import stock_config, stock_model, tokens
from hf_alibi.attention import flash
from hf_alibi.attention.flash import flash_alibi_attention

NAME = "flash_attention_2"
# Slopes are float32 for the kernels; all else is float64 here. Dropping the bias costs 0.1 and more.
EXACT = 1e-6


def dense(q, k, v, scale, window_size, slopes):
    """One sequence, (tokens, heads, dim): bottom-right causal, bias -slope × |i + keys - queries - j|."""
    at = torch.arange(len(q))[:, None] + len(k) - len(q)
    j = torch.arange(len(k))[None, :]
    seen = j <= at
    if window_size[0] >= 0:
        seen &= j >= at - window_size[0]
    outputs = []
    for head in range(q.shape[1]):
        of_key = head // (q.shape[1] // k.shape[1])
        logits = q[:, head].double() @ k[:, of_key].double().mT * scale - slopes[head].double() * (at - j).abs()
        weights = logits.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
        outputs.append(weights @ v[:, of_key].double())
    return torch.stack(outputs, dim=1).to(q.dtype)


def check_arguments(q, k, softmax_scale, causal, window_size, softcap, slopes):
    assert softmax_scale is not None
    assert causal
    assert window_size[1] == (-1 if window_size[0] < 0 else 0)
    assert softcap == 0.0
    assert slopes.dtype == torch.float32
    assert slopes.shape == q.shape[-2:-1]
    assert q.stride(-1) == k.stride(-1) == 1


@pytest.fixture
def calls(monkeypatch):
    """The stand-in is `flash_attn` and takes any tensor; yields each call's options, "varlen" among them."""
    recorded = []

    def flash_attn_func(
        q,
        k,
        v,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
    ):
        check_arguments(q, k, softmax_scale, causal, window_size, softcap, alibi_slopes)
        recorded.append({"varlen": False, "dropout": dropout_p, "scale": softmax_scale, "deterministic": deterministic})
        rows = zip(q, k, v, strict=True)
        return torch.stack([dense(*row, softmax_scale, window_size, alibi_slopes) for row in rows])

    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
        block_table=None,
    ):
        check_arguments(q, k, softmax_scale, causal, window_size, softcap, alibi_slopes)
        assert len(v) == len(k)
        parts = []
        for x, borders, longest in ((q, cu_seqlens_q, max_seqlen_q), (k, cu_seqlens_k, max_seqlen_k)):
            assert borders.dtype == torch.int32
            assert (borders[0], borders[-1]) == (0, len(x))
            assert type(longest) is int
            assert longest == borders.diff().max()
            parts.append(borders.diff().tolist())
        recorded.append({"varlen": True, "dropout": dropout_p, "scale": softmax_scale, "deterministic": deterministic})
        rows = zip(q.split(parts[0]), k.split(parts[1]), v.split(parts[1]), strict=True)
        return torch.cat([dense(*row, softmax_scale, window_size, alibi_slopes) for row in rows])

    module = ModuleType("flash_attn")
    module.__version__ = "2.8.3"
    module.flash_attn_func, module.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(flash, "_check_kernel_takes", lambda query: None)
    return recorded


@pytest.fixture
def missing(monkeypatch):
    """No flash-attn, wherever the tests run."""
    monkeypatch.setitem(sys.modules, "flash_attn", None)


def run(query, key, value, mask=None, module=None, **kwargs):
    module = layer(query.shape[1]) if module is None else module
    return flash_alibi_attention(module, query, key, value, mask, **kwargs)[0].transpose(1, 2)


def draw(*sizes):
    return qkv(*sizes, dtype=torch.float64)


@pytest.mark.parametrize("heads", [1, 4, 6, 12])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (17, 17), (5, 17), (1, 17)])
def test_causal_whole_chunked_and_one_token(calls, heads, grouped, queries, keys):
    query, key, value = draw(2, heads, {4: 2, 6: 3, 12: 3}.get(heads, 1) if grouped else heads, queries, keys)
    position_ids = torch.arange(keys - queries, keys)[None]
    truth = expected(query, key, value)
    assert largest(run(query, key, value), truth) < EXACT
    assert largest(run(query, key, value, position_ids=position_ids), truth) < EXACT
    assert [call["varlen"] for call in calls] == [False, False]


def padding(length):
    """Left padding, right padding, holes, none."""
    mask = torch.ones(4, length, dtype=torch.bool)
    mask[0, :7] = False
    mask[1, -3:] = False
    mask[2, 5:9] = False
    mask[2, -2] = False
    return mask


@pytest.mark.parametrize("queries", [20, 6, 1])
@pytest.mark.parametrize("dtype", [torch.bool, torch.long])
@pytest.mark.parametrize("empty", [0, 12])
def test_padding_with_and_without_earlier_keys(calls, queries, dtype, empty):
    """`empty` keys of a static cache stand behind those of the mask."""
    query, key, value = draw(4, 6, 2, queries, 20 + empty)
    mask = padding(20)
    seen = reference.visible(mask)[:, -queries:]
    truth = expected(query, key[:, :, :20], value[:, :, :20], seen, reference.token_positions(mask))
    real = mask[:, None, -queries:, None]
    position_ids = torch.randint(9, (4, queries))
    output = run(query, key, value, mask.to(dtype), position_ids=position_ids)
    assert largest(output, truth * real) < EXACT
    assert calls[0]["varlen"]


def test_gradients_past_padding(calls):
    mask = padding(20)
    truths = [x.requires_grad_() for x in draw(4, 6, 2, 20, 20)]
    inputs = [x.detach().clone().requires_grad_() for x in truths]
    upstream = torch.randn(4, 6, 20, 16, dtype=torch.float64) * mask[:, None, :, None]
    run(*inputs, mask).backward(upstream)
    expected(*truths, reference.visible(mask), reference.token_positions(mask)).backward(upstream)
    assert all(largest(ours.grad, truth.grad) < EXACT for ours, truth in zip(inputs, truths, strict=True))


def packed_truth(query, key, value, segments):
    return expected(query, key, value, reference.visible(torch.ones_like(segments), segments))


@pytest.mark.parametrize(
    "rows",
    [
        [[0, 1, 2, 0, 1, 0, 1, 2, 3]],
        [[0, 1, 2, 0, 1, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 7, 8]],
        [[2, 3, 4, 2, 3, 2, 3, 4, 5]],
        [[5, 6, 7, 0, 1, 0, 0, 1, 2], [0, 1, 0, 1, 0, 1, 0, 1, 0]],
    ],
)
def test_sequences_packed_by_position_ids(calls, rows):
    position_ids = torch.tensor(rows)
    query, key, value = draw(len(rows), 4, 2, 9, 9)
    segments = torch.nn.functional.pad(position_ids.diff() != 1, (1, 0)).cumsum(-1)
    output = run(query, key, value, position_ids=position_ids)
    assert largest(output, packed_truth(query, key, value, segments)) < EXACT
    assert calls[0]["varlen"]


def test_position_ids_of_one_row_hold_for_all(calls):
    query, key, value = draw(3, 4, 2, 5, 5)
    segments = torch.tensor([[0, 0, 0, 1, 1]]).expand(3, -1)
    output = run(query, key, value, position_ids=torch.tensor([[0, 1, 2, 0, 1]]))
    assert largest(output, packed_truth(query, key, value, segments)) < EXACT


def test_position_ids_beside_earlier_keys_mean_nothing(calls):
    """As with the other backends: transformers knows no packing with a cache."""
    query, key, value = draw(1, 4, 2, 5, 9)
    output = run(query, key, value, position_ids=torch.tensor([[0, 1, 2, 0, 1]]))
    assert largest(output, expected(query, key, value)) < EXACT


@pytest.mark.parametrize("ids", [[4, 3, 2, 1, 0], [0, 1, 2, 5, 6], [0, 1, 5, 6, 0]])
def test_refuses_position_ids_that_are_no_packing(calls, ids):
    with pytest.raises(ValueError, match="only count up, and restart"):
        run(*draw(1, 4, 4, 5, 5), position_ids=torch.tensor([ids]))


def collated(*lengths):
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_position_ids=True)
    return collator([{"input_ids": [3] * length} for length in lengths])


def test_sequences_packed_by_transformers_collator(calls):
    batch = collated(3, 2, 4)
    arguments = {name: batch[name] for name in batch if name.startswith(("cu_", "max_", "position"))}
    assert len(arguments) == 5
    query, key, value = draw(1, 4, 2, 9, 9)
    segments = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2]])
    assert largest(run(query, key, value, **arguments), packed_truth(query, key, value, segments)) < EXACT
    with pytest.raises(ValueError, match="without a mask"):
        run(query, key, value, torch.ones(1, 9, dtype=torch.bool), **arguments)
    del arguments["max_length_k"]
    with pytest.raises(ValueError, match="all of cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k"):
        run(query, key, value, **arguments)


@pytest.mark.parametrize("queries", [20, 6])
@pytest.mark.parametrize("padded", [False, True])
def test_sliding_window(calls, queries, padded):
    query, key, value = draw(4, 4, 2, queries, 20)
    mask = padding(20)
    mask[1:] = True
    mask = mask if padded else torch.ones_like(mask)
    position = torch.arange(20)
    seen = reference.visible(mask) & (position[:, None] - position < 5)
    truth = expected(query, key, value, seen[:, -queries:], reference.token_positions(mask))
    output = run(query, key, value, mask if padded else None, sliding_window=5)
    assert largest(output, truth * mask[:, None, -queries:, None]) < EXACT


def test_slopes_of_the_config(calls):
    query, key, value = draw(1, 4, 2, 12, 12)
    slopes = [0.7, 0.01, 0.0, 0.3]
    output = run(query, key, value, module=layer(4, slopes))
    assert largest(output, expected(query, key, value, head_slopes=torch.tensor(slopes))) < EXACT
    output = run(query, key, value, module=layer(4, scaling={"type": "linear", "factor": 4.0}))
    assert largest(output, expected(query, key, value, head_slopes=reference.slopes(4) / 4)) < EXACT


@pytest.mark.parametrize("masked", [False, True])
def test_scaling_dropout_and_determinism_are_passed_on(calls, monkeypatch, masked):
    query, key, value = draw(1, 4, 2, 7, 7)
    mask = torch.ones(1, 7, dtype=torch.bool) if masked else None
    output = run(query, key, value, mask, scaling=0.5, dropout=0.1)
    assert largest(output, expected(query * 2, key, value)) < EXACT
    assert calls[-1] == {"varlen": masked, "dropout": 0.1, "scale": 0.5, "deterministic": False}
    run(query, key, value, mask, deterministic=True)
    assert calls[-1] == {"varlen": masked, "dropout": 0.0, "scale": 0.25, "deterministic": True}
    monkeypatch.setenv("FLASH_ATTENTION_DETERMINISTIC", "1")
    run(query, key, value, mask)
    assert calls[-1]["deterministic"]


def test_autocast_gives_the_kernel_its_half_type(calls):
    query, key, value = qkv(1, 4, 2, 7, 7)
    with torch.autocast("cpu", torch.bfloat16):
        assert run(query, key, value).dtype == torch.bfloat16


@pytest.mark.parametrize("argument", ["softcap", "s_aux", "position_bias", "cache"])
def test_refuses_what_it_would_ignore(calls, argument):
    with pytest.raises(ValueError, match=argument):
        run(*draw(1, 4, 4, 3, 3), **{argument: torch.ones(1)})


def test_refuses_what_has_no_kernel(calls):
    with pytest.raises(ValueError, match="is_causal=False"):
        run(*draw(1, 4, 4, 3, 3), is_causal=False)
    with pytest.raises(ValueError, match=r"'dynamic'.* make it 'linear' or 'ntk', or use attn_implementation='sdpa'"):
        run(*draw(1, 4, 4, 3, 3), module=layer(4, scaling={"type": "dynamic"}, train_length=8))
    with pytest.raises(ValueError, match="5 queries needs as many keys, got 3"):
        run(*draw(1, 4, 4, 5, 3))
    with pytest.raises(ValueError, match="2 heads got 4 ALiBi slopes"):
        run(*draw(1, 2, 2, 3, 3), module=layer(4, slopes=[0.5, 0.25, 0.1, 0.0]))


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(2, 1, 3, 5, dtype=torch.bool),
        torch.zeros(2, 5),
        torch.ones(1, 5, dtype=torch.bool),
        torch.ones(2, 2, dtype=torch.bool),
        torch.ones(2, 6, dtype=torch.bool),
    ],
)
def test_refuses_masks_that_are_no_padding_mask(calls, mask):
    with pytest.raises(ValueError, match=r"padding mask \(2, 3 to 5\), got torch.*; give the model a 2D mask, or use"):
        run(*draw(2, 4, 4, 3, 5), mask)


def test_refuses_other_types_and_devices():
    for dtype in (torch.float16, torch.bfloat16):
        flash._check_kernel_takes(SimpleNamespace(dtype=dtype, is_cuda=True, device="cuda:0"))
        with pytest.raises(ValueError, match=f"on a CUDA device, got {dtype} on cpu; load the model"):
            flash._check_kernel_takes(torch.zeros(1, dtype=dtype))
    for dtype in (torch.float32, torch.float64):
        with pytest.raises(ValueError, match=f"got {dtype} on cuda:0; load the model with dtype=torch.bfloat16"):
            flash._check_kernel_takes(SimpleNamespace(dtype=dtype, is_cuda=True, device="cuda:0"))


def test_every_call_checks_type_and_device(calls, monkeypatch):
    monkeypatch.undo()
    module = ModuleType("flash_attn")
    module.__version__ = "2.8.3"
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    with pytest.raises(ValueError, match=r"got torch.bfloat16 on cpu"):
        run(*qkv(1, 4, 4, 3, 3, dtype=torch.bfloat16))


# From here on through whole models.

REMEDY = (
    "needs the package flash-attn >= 2.4.2 and a CUDA GPU, found .*pip install flash-attn .*attn_implementation='sdpa'"
)


def converted(family, **changes):
    """Computes by the stand-in, in float64."""
    model = hf_alibi.apply_alibi(stock_model(family, **changes)).double()
    model.config._attn_implementation = NAME
    return model


def truth_of(model, family, input_ids, mask=None, segments=None):
    mask = torch.ones_like(input_ids) if mask is None else mask
    return reference.LOGITS[family](model, input_ids, mask, segments)


def test_models_equal_the_reference(calls, family):
    model = converted(family)
    input_ids, mask = tokens(4, 20), padding(20)
    with torch.no_grad():
        assert largest(model(input_ids).logits, truth_of(model, family, input_ids)) < 1e-5
        padded = model(input_ids, attention_mask=mask.long()).logits
        assert largest(padded[mask], truth_of(model, family, input_ids, mask)[mask]) < 1e-5
    assert [call["varlen"] for call in calls] == [False] * 2 + [True] * 2


def test_models_on_packed_sequences(calls, family):
    model, input_ids = converted(family), tokens(1, 9)
    truth = truth_of(model, family, input_ids, segments=torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2]]))
    batch = collated(3, 2, 4)
    del batch["input_ids"], batch["labels"]
    with torch.no_grad():
        assert largest(model(input_ids, **batch).logits, truth) < 1e-5
        assert largest(model(input_ids, position_ids=batch["position_ids"]).logits, truth) < 1e-5
    assert all(call["varlen"] for call in calls)


@pytest.mark.parametrize("padded", [False, True])
def test_generate_with_dynamic_and_static_caches(calls, family, padded):
    model, prompt = converted(family, tie_word_embeddings=False), tokens(2, 12)
    mask = torch.ones_like(prompt)
    if padded:
        prompt[0, :5], mask[0, :5] = 0, 0
    arguments = {"attention_mask": mask, "max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": None}
    arguments |= {"do_sample": False, "disable_compile": True}
    output = model.generate(prompt, **arguments)
    cache = StaticCache(config=model.config, max_cache_len=40)
    assert torch.equal(model.generate(prompt, past_key_values=cache, **arguments), output)
    assert calls
    model.set_attn_implementation("sdpa")
    assert torch.equal(model.generate(prompt, **arguments), output)


def test_a_static_cache_without_a_mask_is_refused(calls, family):
    """Its empty end would be read as tokens: nothing says how far it is filled."""
    model = converted(family)
    cache = StaticCache(config=model.config, max_cache_len=40)
    for part in (model, model.base_model):
        with pytest.raises(ValueError, match="needs the keyword attention_mask beside a StaticCache"):
            part(tokens(1, 5), past_key_values=cache)
    input_ids = tokens(1, 5)
    with torch.no_grad():
        output = model(input_ids, past_key_values=cache, attention_mask=torch.ones(1, 5)).logits
        assert largest(output, truth_of(model, family, input_ids)) < 1e-5
        model.set_attn_implementation("sdpa")
        model(input_ids, past_key_values=StaticCache(config=model.config, max_cache_len=40))


def test_masks_of_the_users_own_are_refused(calls, family):
    with pytest.raises(ValueError, match=r"got torch.bool \(1, 1, 5, 5\)"):
        converted(family)(tokens(1, 5), attention_mask=torch.ones(1, 1, 5, 5, dtype=torch.bool))


@pytest.fixture
def dispatch(monkeypatch):
    """Transformers finds a GPU with flash-attn, and loads nothing itself."""

    def can_dispatch(self, flash_attn_version, is_init_check=False):
        assert self._supports_flash_attn
        assert flash_attn_version == 2

    monkeypatch.setattr(PreTrainedModel, "_flash_attn_can_dispatch", can_dispatch)
    monkeypatch.setattr(modeling_utils, "is_kernels_available", lambda: False)
    monkeypatch.setattr(modeling_utils, "lazy_import_flash_attention", lambda name: None)


def test_choosing_it(calls, dispatch, family, tmp_path):
    model = hf_alibi.apply_alibi(stock_model(family))
    model.save_pretrained(tmp_path)
    model.set_attn_implementation(NAME)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=NAME)
    stock = stock_model(family)
    stock.config._attn_implementation = NAME
    for each in (model, loaded, hf_alibi.apply_alibi(stock)):
        assert each.config._attn_implementation == NAME
        del calls[:]
        with torch.no_grad():
            assert largest(each(tokens(1, 20)).logits, truth_of(each, family, tokens(1, 20))) < 1e-3
        assert len(calls) == 2


def test_kernels_from_the_hub_do_not_take_its_place(calls, dispatch, monkeypatch, family):
    model = hf_alibi.apply_alibi(stock_model(family))
    monkeypatch.setattr(modeling_utils, "is_kernels_available", lambda: True)
    monkeypatch.setattr(modeling_utils, "lazy_import_flash_attention", None)
    model.set_attn_implementation(NAME)
    assert model.config._attn_implementation == NAME


def test_without_the_package_choosing_it_raises(missing, family, tmp_path):
    stock = stock_model(family)
    stock.config._attn_implementation = NAME
    with pytest.raises(ImportError, match=REMEDY):
        hf_alibi.apply_alibi(stock)
    assert type(stock).__name__[:5] != "Alibi"
    model = hf_alibi.apply_alibi(stock_model(family))
    with pytest.raises(ImportError, match=REMEDY):
        model.set_attn_implementation(NAME)
    hf_alibi.verify_alibi(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ImportError, match=REMEDY):
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=NAME)
    with pytest.raises(ImportError, match=REMEDY):
        AutoModelForCausalLM.from_config(model.config, attn_implementation=NAME)
    model.config._attn_implementation = NAME
    with pytest.raises(ImportError, match=REMEDY):
        model(tokens(1, 5))


@pytest.mark.parametrize(("version", "found"), [("2.3.6", "2.3.6"), (None, "0")])
def test_an_older_package_or_another_of_that_name_raises(monkeypatch, version, found):
    module = ModuleType("flash_attn")
    if version:
        module.__version__ = version
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    with pytest.raises(ImportError, match=f"flash-attn >= 2.4.2 and a CUDA GPU, found '{found}'"):
        flash.load_flash_attn()
    module.__version__ = "2.8.0.post2+cu12torch2.13"
    assert flash.load_flash_attn() is module


@pytest.mark.parametrize(
    "name", ["flash_attention_3", "flash_attention_4", "kernels-community/flash-attn2", f"paged|{NAME}"]
)
def test_other_forms_of_flash_attention_are_refused_by_name(calls, dispatch, family, name):
    model = hf_alibi.apply_alibi(stock_model(family))
    with pytest.raises(ValueError, match=r"is not supported with ALiBi; supported: .*flash_attention_2"):
        model.set_attn_implementation(name)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ["causal", "padded", "chunk", "one", "packed", "window"])
def test_on_a_gpu(dtype, form):
    """The kernels themselves, forward and backward."""
    pytest.importorskip("flash_attn", reason="needs the package flash-attn")
    queries = {"chunk": 100, "one": 1}.get(form, 300)
    inputs = [x.cuda().requires_grad_() for x in qkv(4, 12, 4, queries, 300, width=64, dtype=dtype)]
    truths = [x.detach().cpu().double().requires_grad_() for x in inputs]
    mask = padding(300) if form in ("padded", "chunk", "one") else torch.ones(4, 300, dtype=torch.bool)
    segments = (torch.arange(300) // 110).expand(4, -1) if form == "packed" else None
    seen = reference.visible(mask, segments)
    kwargs = {}
    if form == "packed":
        kwargs["position_ids"] = (torch.arange(300) % 110)[None].cuda()
    if form == "window":
        kwargs["sliding_window"] = 50
        seen &= torch.arange(300)[:, None] - torch.arange(300) < 50
    real = mask[:, None, -queries:, None]
    upstream = torch.randn(truths[0].shape, dtype=torch.float64) * real
    truth = expected(*truths, seen[:, -queries:], reference.token_positions(mask))
    truth.backward(upstream)
    output = run(*inputs, None if mask.all() else mask.cuda(), **kwargs)
    output.backward(upstream.to("cuda", dtype))
    tolerance = {torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    assert largest(output.cpu(), truth * real) < tolerance
    for ours, exact in zip(inputs, truths, strict=True):
        assert largest(ours.grad.cpu(), exact.grad) < tolerance * max(1.0, exact.grad.abs().max().item())


@pytest.mark.gpu
def test_generates_on_a_gpu_as_sdpa_does(family):
    pytest.importorskip("flash_attn", reason="needs the package flash-attn")
    model = hf_alibi.apply_alibi(AutoModelForCausalLM.from_config(stock_config(family), dtype=torch.bfloat16)).cuda()
    input_ids, mask = tokens(4, 20).cuda(), padding(20).cuda()
    with torch.no_grad():
        expected_logits = model.eval()(input_ids, attention_mask=mask).logits[mask]
        model.set_attn_implementation(NAME)
        assert largest(model(input_ids, attention_mask=mask).logits[mask], expected_logits) < 0.1
        model.generate(input_ids, attention_mask=mask, max_new_tokens=4, pad_token_id=0)
