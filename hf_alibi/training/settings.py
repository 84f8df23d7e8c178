"""The settings of a training: the model, its attention, and the text."""

import math
from dataclasses import dataclass, field
from typing import Literal

from ..errors import InputError
from ..evaluation.probe_tasks import TASKS
from ..utils import read_mapping

__all__ = [
    "BUILDERS",
    "BYTES",
    "COMPRESSED",
    "PROBES",
    "PYTHON_DOCS",
    "AblationArguments",
    "DataArguments",
    "FinetuneArguments",
]

PYTHON_DOCS = "python-docs"
PROBES = "probes"
BYTES = "bytes"

# File extension to the builder of `datasets` that reads it.
BUILDERS = {
    ".txt": "text",
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
}
# Extensions that may follow one of these; `datasets` unpacks the file.
COMPRESSED = (".gz", ".bz2", ".xz")


@dataclass
class FinetuneArguments:
    """Which model is trained, with which positions, on blocks of which length."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Checkpoint to start from: a folder or a hub name."}
    )
    model_config: dict | str | None = field(  # type: ignore[type-arg]  # HfArgumentParser takes the bare type
        default=None,
        metadata={"help": "Instead: a fresh model, e.g. {model_type: gpt2, n_layer: 4, n_head: 4, n_embd: 256}."},
    )
    attention: Literal["alibi", "original", "nope"] = field(
        default="alibi",
        metadata={"help": "alibi converts the model, original leaves it alone, nope removes all positions."},
    )
    block_size: int = field(default=512, metadata={"help": "Training length in tokens."})
    budget_tokens: int | None = field(
        default=None, metadata={"help": "Training tokens in all, instead of max_steps or num_train_epochs."}
    )
    mlp_rate_scale: float = field(
        default=1.0,
        metadata={
            "help": "Share of learning_rate for all but self-attention and embeddings: MLPs, norms. 0 freezes them."
        },
    )
    embedding_rate_scale: float = field(
        default=1.0, metadata={"help": "Share of learning_rate for input and output embeddings. 0 freezes them."}
    )
    teacher_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Checkpoint of the same vocabulary whose predictions are learned; see teacher_share. For a "
            "conversion: the model that is converted, once it was fine-tuned on the text."
        },
    )
    teacher_share: float = field(
        default=1.0,
        metadata={"help": "Share of the teacher's predictions in the loss, up to 1; the rest is the text's tokens."},
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "Attention backend, such as eager or sdpa. Default: the library's choice."},
    )
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = field(
        default="float32",
        metadata={"help": "Type of the weights. Keep float32 and set bf16 or fp16 for mixed precision."},
    )

    def __post_init__(self) -> None:
        if self.model_config is not None:
            self.model_config = read_mapping(self.model_config, "model_config", "{model_type: gpt2, n_layer: 4, ...}")
        if (self.model_name_or_path is None) == (self.model_config is None):
            given = "neither" if self.model_config is None else "both"
            raise InputError(f"{given} of model_name_or_path and model_config given; give exactly one of them")
        if self.block_size < 2:
            raise InputError(f"block_size is {self.block_size}; it must be at least 2, one token to predict the next")
        if self.budget_tokens is not None and self.budget_tokens < self.block_size:
            raise InputError(f"budget_tokens is {self.budget_tokens}, less than one block of {self.block_size} tokens")
        if not 0 < self.teacher_share <= 1:
            raise InputError(f"teacher_share is {self.teacher_share}; it must be above 0 and at most 1")
        if self.teacher_share < 1 and self.teacher_name_or_path is None:
            raise InputError(f"teacher_share is {self.teacher_share} without a teacher; give teacher_name_or_path")
        for name in ("mlp_rate_scale", "embedding_rate_scale"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 0, which freezes these weights")


@dataclass
class DataArguments:
    """Which text a run reads, and which tail of it is held out."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": f"Dataset on the Hugging Face hub, or {PYTHON_DOCS}: text that ships with CPython, "
            f"or {PROBES}: prompts that hide a number, with the answer."
        },
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of dataset_name."})
    dataset_split: str = field(default="train", metadata={"help": "Split of dataset_name."})
    text_column: str = field(default="text", metadata={"help": "Column that holds the text."})
    train_file: list[str] | None = field(
        default=None,
        metadata={
            "help": f"Local files instead of dataset_name: {', '.join(BUILDERS)}, compressed or not, or folders or "
            "patterns of them."
        },
    )
    validation_file: list[str] | None = field(
        default=None, metadata={"help": "Held-out files; without them the tail of the tokens is held out."}
    )
    validation_fraction: float = field(
        default=0.1,
        metadata={"help": "Share of the tokens, at the end, that is held out; at least 0, below 1."},
    )
    train_weights: list[float] | None = field(
        default=None,
        metadata={"help": "Share of the training tokens for each name in train_file, such as 0.7 0.3: a mixture."},
    )
    max_tokens: int | None = field(
        default=None, metadata={"help": "Read no more than this many tokens, held-out tail included."}
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Download no more of dataset_name than max_tokens need, for data too large for the disk."},
    )
    num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenise the text. Default: one."})
    tokenizer_name: str | None = field(
        default=None,
        metadata={"help": f"Tokenizer by path or hub name, or {BYTES} (UTF-8 bytes). Default: the model's own."},
    )
    document_bos: bool | None = field(
        default=None,
        metadata={
            "help": "Begin each document with the tokenizer's beginning-of-sequence token, in training and evaluation. "
            "Default: if the tokenizer itself begins texts with it."
        },
    )
    probe_block_size: int | None = field(
        default=None,
        metadata={"help": f"For {PROBES}: tokens that whole prompts fill; give the block_size of the training."},
    )
    probe_blocks: int = field(default=4096, metadata={"help": f"For {PROBES}: how many such blocks."})
    probe_share: float = field(
        default=0.0,
        metadata={"help": "Share of the training blocks that teach probes, hidden in the text of other blocks."},
    )
    probe_tasks: list[str] = field(
        default_factory=lambda: ["passkey"],
        metadata={"help": f"For {PROBES} and probe_share: which tasks, of {' '.join(TASKS)}."},
    )
    probe_seed: int = field(
        default=0, metadata={"help": f"For {PROBES} and probe_share: another one gives other prompts."}
    )

    def __post_init__(self) -> None:
        if not 0 <= self.validation_fraction < 1:
            raise InputError(f"validation_fraction is {self.validation_fraction}; it must be at least 0 and below 1")
        if (self.dataset_name == PROBES) != (self.probe_block_size is not None):
            raise InputError(
                f"dataset_name is {self.dataset_name} and probe_block_size {self.probe_block_size}; give "
                f"probe_block_size, the block_size of the training, with dataset_name {PROBES} and only there"
            )
        if self.dataset_name == PROBES and self.validation_file is not None:
            raise InputError(f"the dataset {PROBES} holds out blocks of its own; leave validation_file out")
        if not self.probe_tasks or not all(task in TASKS for task in self.probe_tasks):
            raise InputError(f"probe_tasks is {self.probe_tasks}; give one or more of {', '.join(TASKS)}")
        if not 0 <= self.probe_share < 1 or (self.probe_share and self.dataset_name == PROBES):
            raise InputError(
                f"probe_share is {self.probe_share}; it must be at least 0 and below 1, beside a text and not beside "
                f"dataset_name {PROBES}"
            )
        self._check_mixture()
        if self.probe_blocks < 1:
            raise InputError(f"probe_blocks is {self.probe_blocks}; it must be at least 1")

    def _check_mixture(self) -> None:
        weights, names = self.train_weights, self.train_file or []
        if weights is not None and (len(weights) != len(names) or not all(0 < weight < math.inf for weight in weights)):
            raise InputError(
                f"train_weights is {weights} and train_file names {len(names)}; give one weight above 0 for each name"
            )
        for name in ("max_tokens", "num_proc"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}; it must be at least 1")
        if self.streaming and (self.max_tokens is None or self.dataset_name in (None, PYTHON_DOCS, PROBES)):
            raise InputError(
                "streaming is true; it needs the dataset_name of a dataset on the hub or in a folder, and max_tokens, "
                "which say how much of it is read"
            )


@dataclass
class AblationArguments:
    """Which rows are trained, and how often."""

    # Only beside None does HfArgumentParser take a mapping as a string, which is then JSON.
    rows: dict[str, dict] | str | None = field(  # type: ignore[type-arg]  # HfArgumentParser takes the bare type
        default=None, metadata={"help": 'Name to the fields that the row changes, e.g. {"none": {"match_tokens": 0}}.'}
    )
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3], metadata={"help": "Seeds of each row."})
    control: str | None = field(
        default=None, metadata={"help": "Row whose perplexity at the same seed the others are divided by."}
    )

    def __post_init__(self) -> None:
        example = "{name: {field: value, ...}, ...}"
        rows = read_mapping(self.rows, "rows", example)
        if not all(isinstance(row, dict) for row in rows.values()):
            raise InputError(f"rows is {rows!r}; it must be a mapping, {example}")
        if self.control is not None and self.control not in rows:
            raise InputError(f"control is {self.control!r}; the rows are {', '.join(rows)}")
        self.rows = rows
