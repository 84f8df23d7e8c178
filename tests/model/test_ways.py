"""Ways of wrapping, loading, saving, copying and moving a converted model, each against the float64 reference."""

import copy
import io
import multiprocessing
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accelerate import (
    Accelerator,
    cpu_offload,
    dispatch_model,
    init_empty_weights,
    load_checkpoint_and_dispatch,
    load_checkpoint_in_model,
)
from accelerate.hooks import remove_hook_from_submodules
from safetensors.torch import load_file, load_model, save_model
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.utils import parametrize, prune
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    StaticCache,
    Trainer,
    TrainingArguments,
)

import hf_alibi
from helpers import reference
from helpers.models import FAMILIES, stock_model, tokens

SLOPES = [0.5, 0.3, 0.2, 0.1]
LENGTH = 40  # beyond the 32 that the plain models were made for
WAYS = {}


def way(function):
    """A way: takes a converted model and an empty folder, gives what computes the same logits."""
    WAYS[function.__name__.replace("_", " ")] = function
    return function


def reloaded(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options)


@way
def as_it_is(model, folder):
    return model


@way
def deepcopy(model, folder):
    return copy.deepcopy(model)


@way
def shallow_copy(model, folder):
    return copy.copy(model)


@way
def pickled(model, folder):
    return pickle.loads(pickle.dumps(model))


@way
def torch_save_whole(model, folder):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@way
def state_dict_into_a_new_one(model, folder):
    other = AutoModelForCausalLM.from_config(model.config)
    other.load_state_dict(model.state_dict())
    return other


@way
def state_dict_assigned_on_meta(model, folder):
    with init_empty_weights():  # without buffers, which are in no checkpoint
        other = AutoModelForCausalLM.from_config(model.config)
    other.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    other.tie_weights()
    return other


@way
def init_empty_weights_then_load(model, folder):
    model.save_pretrained(folder)
    with init_empty_weights():
        other = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    other.tie_weights()
    return load_checkpoint_and_dispatch(other, folder, device_map={"": "cpu"})


@way
def to_empty_then_load(model, folder):
    with torch.device("meta"):
        other = AutoModelForCausalLM.from_config(model.config)
    other = other.to_empty(device="cpu")
    other.load_state_dict(model.state_dict())
    return other


@way
def save_pretrained(model, folder):
    model.save_pretrained(folder)
    return reloaded(folder)


@way
def save_pretrained_in_shards(model, folder):
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return reloaded(folder)


@way
def saved_twice(model, folder):
    model.save_pretrained(folder / "a")
    reloaded(folder / "a").save_pretrained(folder / "b")
    return reloaded(folder / "b")


@way
def safetensors_by_hand(model, folder):
    save_model(model, str(folder / "m.safetensors"))
    other = AutoModelForCausalLM.from_config(model.config)
    load_model(other, str(folder / "m.safetensors"))
    return other


@way
def from_pretrained_with_a_state_dict(model, folder):
    model.save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    return type(model).from_pretrained(None, config=model.config, state_dict=state)


@way
def its_own_class(model, folder):
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder)


@way
def base_model_with_the_head_put_on(model, folder):
    model.save_pretrained(folder)
    other = reloaded(folder)
    setattr(other, other.base_model_prefix, AutoModel.from_pretrained(folder))
    other.tie_weights()
    return other


@way
def remote_code(model, folder):
    model.save_pretrained(folder, export_remote_code=True)
    return reloaded(folder)


@way
def device_map_auto(model, folder):
    model.save_pretrained(folder)
    return reloaded(folder, device_map="auto")


@way
def low_memory_dtype_auto(model, folder):
    model.save_pretrained(folder)
    return reloaded(folder, dtype="auto")


@way
def default_dtype_changed_while_loading(model, folder):
    model.save_pretrained(folder)
    torch.set_default_dtype(torch.float64)
    try:
        return reloaded(folder, dtype=torch.float32)
    finally:
        torch.set_default_dtype(torch.float32)


@way
def loaded_in_inference_mode(model, folder):
    model.save_pretrained(folder)
    with torch.inference_mode():
        return reloaded(folder)


@way
def loaded_in_a_thread(model, folder):
    model.save_pretrained(folder)
    # One alone: transformers itself does not load in two threads at once.
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(reloaded, folder).result()


@way
def through_double_and_back(model, folder):
    return model.double().float()


@way
def dispatched(model, folder):
    return dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)


@way
def offloaded(model, folder):
    return cpu_offload(model, "cpu")


@way
def dispatched_and_freed(model, folder):
    model = dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
    remove_hook_from_submodules(model)
    return model


@way
def accelerator_prepared(model, folder):
    return Accelerator(cpu=True).prepare(model)


@way
def accelerator_saved(model, folder):
    accelerator = Accelerator(cpu=True)
    accelerator.save_model(model, folder)
    other = AutoModelForCausalLM.from_config(model.config)
    load_checkpoint_in_model(other, folder)
    other.tie_weights()
    return other


@way
def trainer_saved(model, folder):
    Trainer(model, TrainingArguments(str(folder), report_to=[], use_cpu=True)).save_model()
    return reloaded(folder)


@way
def data_parallel_wrapper(model, folder):
    return torch.nn.DataParallel(model)


@way
def compiled_in_eager(model, folder):
    return torch.compile(model, backend="eager")


@way
def module_compile(model, folder):
    model.compile(backend="eager")
    return model


@way
def exported(model, folder):
    program = torch.export.export(model, (tokens(2, LENGTH),), {"use_cache": False, "return_dict": True}, strict=False)
    return lambda ids: program.module()(ids, use_cache=False, return_dict=True)


@way
def traced(model, folder):
    model.requires_grad_(False)
    return torch.jit.trace(lambda ids: model(ids, use_cache=False).logits, tokens(2, LENGTH), check_trace=False)


@way
def functional_calls(model, folder):
    return lambda ids: functional_call(model, dict(model.named_parameters()), (ids,), {"use_cache": False})


@way
def an_ensemble_under_vmap(model, folder):
    parameters, buffers = stack_module_state([model, copy.deepcopy(model)])

    def one(parameters, buffers, ids):
        return functional_call(model, (parameters, buffers), (ids,), {"use_cache": False}).logits

    return lambda ids: vmap(one, (0, 0, None))(parameters, buffers, ids)[1]


@way
def each_sequence_under_vmap(model, folder):
    mask = torch.ones(1, LENGTH, dtype=torch.long)  # without one, transformers reads the tokens
    return lambda ids: vmap(lambda one: model(one[None], attention_mask=mask, use_cache=False).logits[0])(ids)


@way
def under_grad(model, folder):
    def both(parameters, ids):
        logits = functional_call(model, parameters, (ids,), {"use_cache": False}).logits
        return logits.sum(), logits

    return lambda ids: torch.func.grad(both, has_aux=True)(dict(model.named_parameters()), ids)[1]


@way
def parametrized_weight(model, folder):
    linear = model.get_output_embeddings()
    parametrize.register_parametrization(linear, "weight", torch.nn.Identity())
    return model


@way
def pruned_by_nothing(model, folder):
    prune.identity(model.get_output_embeddings(), "weight")
    return model


@way
def embeddings_resized_and_back(model, folder):
    model.resize_token_embeddings(80)
    model.resize_token_embeddings(64)
    return model


@way
def switched_to_eager_and_back(model, folder):
    model.set_attn_implementation("eager")
    model.set_attn_implementation("sdpa")
    return model


@way
def eager(model, folder):
    model.set_attn_implementation("eager")
    return model


@way
def gradient_checkpointing(model, folder):
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


@way
def peft_merged(model, folder):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2))
    return adapted.merge_and_unload()


@way
def peft_adapter_off(model, folder):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False))

    def off(ids):
        with adapted.disable_adapter():
            return adapted(ids)

    return off


@way
def adapters_added_and_deleted(model, folder):
    peft = pytest.importorskip("peft")
    model.add_adapter(peft.LoraConfig(r=2, init_lora_weights=False), "one")
    model.delete_adapter("one")
    return model


@way
def shared_memory(model, folder):
    return model.share_memory()


@way
def position_ids_given(model, folder):
    return lambda ids: model(ids, position_ids=torch.arange(ids.shape[1]).flip(0)[None].expand_as(ids))


@way
def inputs_embeds(model, folder):
    return lambda ids: model(inputs_embeds=model.get_input_embeddings()(ids))


@way
def a_4d_mask(model, folder):
    return lambda ids: model(ids, attention_mask=torch.ones(len(ids), 1, LENGTH, LENGTH, dtype=torch.bool).tril())


@way
def a_float_mask(model, folder):
    mask = torch.full((2, 1, LENGTH, LENGTH), torch.finfo(torch.float32).min).triu(1)
    return lambda ids: model(ids, attention_mask=mask)


def in_steps(model, cache, sizes=(7, 1, 16, 16)):
    def steps(ids):
        parts = ids.split(sizes, dim=1)
        return torch.cat([model(part, past_key_values=cache, use_cache=True).logits for part in parts], dim=1)

    return torch.no_grad()(steps)


@way
def in_steps_with_a_dynamic_cache(model, folder):
    return in_steps(model, DynamicCache(config=model.config))


@way
def in_steps_with_a_static_cache(model, folder):
    return in_steps(model, StaticCache(config=model.config, max_cache_len=64))


@way
def in_steps_with_a_legacy_free_cache(model, folder):
    return in_steps(model, DynamicCache())


@way
def in_steps_with_alibi_cache(model, folder):
    return in_steps(model, hf_alibi.AlibiCache())


@way
def scores_of_generate(model, folder):
    model.generation_config.eos_token_id = None

    def scores(ids):
        columns = []
        for length in (1, 20, LENGTH):
            given = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
            columns.append((length, model.generate(ids[:, :length], **given).logits[0]))
        return columns

    return scores


def _compute(model, ids, queue):
    queue.put(model(ids).logits.detach().numpy())


@way
def in_another_process(model, folder):
    def compute(ids):
        context = multiprocessing.get_context("spawn")
        queue = context.Queue()
        process = context.Process(target=_compute, args=(model, ids, queue))
        process.start()
        logits = torch.from_numpy(queue.get(timeout=120))
        process.join()
        return logits

    return compute


@pytest.fixture(scope="module", params=FAMILIES)
def truth(request):
    """A family, tokens and their logits in float64."""
    model = converted(request.param)
    ids = tokens(2, LENGTH)
    slopes = torch.tensor(SLOPES, dtype=torch.float64)
    return request.param, ids, reference.LOGITS[request.param](model, ids, torch.ones_like(ids), head_slopes=slopes)


def converted(family):
    no_dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0} if family == "gpt2" else {}
    return hf_alibi.apply_alibi(stock_model(family, initializer_range=0.1, **no_dropout), slopes=SLOPES).eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WAYS)
def test_logits_are_those_of_the_reference(name, truth, tmp_path):
    family, ids, expected = truth
    found = WAYS[name](converted(family), tmp_path)(ids)
    if isinstance(found, list):
        assert all(torch.allclose(logits.double(), expected[:, length - 1], atol=2e-5) for length, logits in found)
    else:
        logits = found if isinstance(found, torch.Tensor) else found.logits
        assert torch.allclose(logits.double(), expected, atol=2e-5)


def test_there_are_fifty():
    assert len(WAYS) >= 50
