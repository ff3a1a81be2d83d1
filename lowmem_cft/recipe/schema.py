"""The recipe: one YAML file that says all of a run, checked before anything is loaded.

Unknown keys, wrong types and impossible values are refused with the path, what was got and what
is allowed. `extends: NAME` starts from another recipe, assignments override single values, and
the resolved recipe is saved with the run.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from lowmem_cft.units import parse_bytes

TEXT_SLOT = "{text}"

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
_FromList = Field(strict=False)  # YAML has no tuples; their numbers are checked strictly as ever


_TRUTH = {"on": True, "true": True, "yes": True, "off": False, "false": False, "no": False}


def _as_truth(value: object) -> object:
    """A word for true or false as that; any other value as it is."""
    return _TRUTH.get(value.lower(), value) if isinstance(value, str) else value


def _as_switch(value: object) -> object:
    """true and false, in any words, as on and off; any other value as it is."""
    truth = _as_truth(value)
    return ("on" if truth else "off") if isinstance(truth, bool) else value


def _with_a_unit(value: object) -> object:
    """A number without a unit as the text that `parse_bytes` refuses with what to write."""
    return str(value) if isinstance(value, (int, float)) else value


Truth = Annotated[bool, BeforeValidator(_as_truth)]
Switch = Annotated[Literal["auto", "on", "off"], BeforeValidator(_as_switch)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class ModelSection(_Section):
    """The backbone, and how its frozen weights are held."""

    id: str = "smollm2-135m"
    """Hub id, local folder, GGUF file, or `smollm2-135m` for the embedded default."""
    revision: str | None = None
    quantization: Literal["none", "nf4"] = "nf4"
    double_quantization: Truth = True
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Compute dtype; auto takes bf16 where the device is fast in it."""
    attention: Literal["auto", "eager", "sdpa", "flex_attention", "flash_attention_2"] = "auto"
    keep_layers: Count | None = None
    """Keep this many of the lowest layers and drop the rest."""


class LoraSection(_Section):
    """The adapter (LoRA, arXiv 2106.09685): the only weights that are trained."""

    rank: Count = 8
    alpha: Positive = 16.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: Literal["all-linear", "attention", "mlp"] | list[str] = "all-linear"
    rslora: Truth = False
    """Scale by alpha/sqrt(rank) instead of alpha/rank (arXiv 2312.03732)."""
    init: Literal["default", "gaussian", "orthogonal"] = "default"


class TextSection(_Section):
    """How a text becomes tokens."""

    template: str = TEXT_SLOT
    """For anchors and for evaluation; `{text}` stands for the text."""
    document_template: str | None = None
    """For positives and negatives; the same as `template` if not given."""
    tail: Literal["apart", "joined"] = "apart"
    """How what a template has behind `{text}` becomes tokens. apart: by itself, the same for every
    text, also one that is cut. joined: with the text, as the second paper's code does it (`."` may
    be one token); sentence-transformers cannot do that, so it goes with output.export: none."""
    append_eos: Truth = True
    """End every text with the tokens that the tokenizer itself puts there ([SEP], or another than
    its eos_token in Qwen3-Embedding), or with its end-of-sequence token if it puts none. false: with
    neither."""
    max_tokens: Count = 128
    """Tokens of the text itself; the template and special tokens come on top, so truncation
    never cuts a template's tail."""

    @property
    def has_tail(self) -> bool:
        """Whether a template goes on behind `{text}`."""
        templates = (self.template, self.document_template or self.template)
        return not all(template.endswith(TEXT_SLOT) for template in templates)

    @property
    def joins_tail(self) -> bool:
        """Whether a template's tail becomes tokens together with the text."""
        return self.has_tail and self.tail == "joined"

    @model_validator(mode="after")
    def _slots(self) -> TextSection:
        for name in ("template", "document_template"):
            template = getattr(self, name)
            if template is not None and template.count(TEXT_SLOT) != 1:
                raise ValueError(f"{name}: got {template!r}, wanted {TEXT_SLOT} in it exactly once")
        return self


class EmbeddingSection(_Section):
    """How hidden states become one vector."""

    pooling: Literal["last", "eos", "mean", "weighted-mean", "cls"] = "eos"
    """cls: the first token, of models that are not causal."""
    normalize: Truth = True


def _as_name(value: object) -> object:
    """A whole number as it is written; any other value as it is."""
    return str(value) if type(value) is int else value


class DataSource(_Section):
    """One set of training rows."""

    path: str
    """File, folder, saved data set, hub id, `demo` for the embedded triplets."""
    columns: list[Annotated[str, BeforeValidator(_as_name)]] | None = None
    """Of the anchor, the positive and any negatives; numbers from 1 in a file without a header."""
    split: str = "train"
    where: dict[str, str | bool | int | float] | None = None
    """Keep the rows whose column equals this text, number or truth value."""
    limit: Count | None = None
    """Draw this many rows at random by `seed`."""
    seed: int = 0
    weight: Positive = 1.0
    """How often an epoch goes through the rows: 0.5 takes half of them, 2 takes them twice."""


class DataSection(_Section):
    sources: Annotated[list[DataSource], Field(min_length=1)]
    on_bad_row: Literal["error", "skip"] = "error"


class LossSection(_Section):
    """InfoNCE over the logical batch."""

    temperature: Positive = 0.05
    """The first one, where it is learned."""
    learn_temperature: Truth = False
    """Train it with the adapter, without weight decay, always between `temperature_bounds`."""
    temperature_bounds: Annotated[tuple[Positive, Positive], _FromList] = (0.005, 1.0)
    softmaxes: Literal["one_way", "symmetric", "gte", "qwen3"] = "one_way"
    """one_way: each anchor picks its positive among the documents. symmetric: the mean of that and
    of each positive picking its anchor. qwen3: one_way with the other anchors, and the documents
    against the positive, in the same denominator (arXiv 2506.05176); gte: and with the positive
    picking its anchor (arXiv 2308.03281)."""
    hard_negatives: Literal["batch", "own", "none"] = "batch"
    """batch: every anchor sees every row's hard negatives; own: only its row's."""
    mask_duplicates: Truth = True
    """A document with the text of a positive of the anchor, in whichever of its rows, or with the
    anchor's own, is no negative of it; nor are positives of one anchor each other's."""
    false_negative_margin: Finite | None = None
    """Hide negatives more similar than the positive's similarity less this margin, as probably
    positives themselves (arXiv 2407.15831); below 0 spares those a little more similar."""
    false_negative_relative: Truth = False
    """The margin is a share of the positive's similarity."""
    on_no_negatives: Literal["stop", "warn"] = "stop"
    """What happens after three steps in a row in which masks hid every negative: nothing is
    learned then. A step where they hide 95 % is warned of in any case."""
    hardness: NonNegative = 0.0
    """Weight similar negatives up: this times its similarity is added to a negative's logit, as a
    constant (arXiv 2503.04812). 0 is off."""
    hardness_on: Literal["hard", "in-batch", "all"] = "all"
    """Which negatives: the row's own hard ones, all others, or both."""

    @model_validator(mode="after")
    def _bounds(self) -> LossSection:
        low, high = self.temperature_bounds
        if self.learn_temperature and not low < self.temperature < high:
            raise ValueError(
                f"temperature: got {self.temperature} with learn_temperature, wanted it between "
                f"temperature_bounds, {low} and {high}, and neither of them"
            )
        return self

    @model_validator(mode="after")
    def _something_to_act_on(self) -> LossSection:
        if self.false_negative_relative and self.false_negative_margin is None:
            raise ValueError(
                "false_negative_relative: got true, which needs a false_negative_margin"
            )
        if self.hardness and self.hardness_on == "hard" and self.hard_negatives == "none":
            raise ValueError("hardness_on: got hard, but hard_negatives is none")
        return self


class TrainSection(_Section):
    logical_batch: Annotated[int, Field(ge=2)] = 256
    """Rows whose texts are each other's negatives: it defines the loss. Chunks do not change it."""
    epochs: Positive | None = None
    steps: Count | None = None
    learning_rate: Positive = 2e-4
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"] = "adamw"
    betas: Annotated[tuple[float, float], _FromList] = (0.9, 0.999)
    epsilon: Positive = 1e-8
    weight_decay: NonNegative = 0.0
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    max_grad_norm: Positive | None = 1.0
    seed: int = 42
    duplicates: Literal["auto", "once", "each"] = "auto"
    """Encode a text that occurs several times in a step once, or each time. Without dropout the
    result is the same; with it, copies encoded once share a mask. auto: once where the same."""
    save_every: Count | None = None
    """Steps between checkpoints; one is always written at the end and on Ctrl-C."""
    save_minutes: Positive | None = 10.0
    """Minutes between checkpoints, whatever `save_every` is."""

    @model_validator(mode="after")
    def _length(self) -> TrainSection:
        if self.epochs is not None and self.steps is not None:
            raise ValueError(
                f"got epochs: {self.epochs} and steps: {self.steps}, wanted one of them "
                "(set the other to null)"
            )
        return self

    def num_steps(self, rows_per_epoch: int) -> int:
        """Optimizer steps of the run; one epoch where the recipe gives neither length."""
        if self.steps is not None:
            return self.steps
        return max(1, round((self.epochs or 1.0) * rows_per_epoch / self.logical_batch))


class MemorySection(_Section):
    """How much memory to use, and how. None of it changes the result beyond rounding."""

    limit: Annotated[str, BeforeValidator(_with_a_unit)] = "auto"
    """For all of it, weights and libraries included: 12GiB, 11.5GB, 800MiB; auto takes what is
    free on the device."""
    token_budget: Literal["auto"] | Count = "auto"
    """Padded tokens in a chunk that is back-propagated."""
    keep_graphs: Switch = "auto"
    """Keep the first phase's graphs: of all chunks, of none, or of as many as fit."""
    checkpointing: Switch | Count = "auto"
    """Compute again in the backward what is in all layers, in none, or in every k-th layer."""
    embedding_dtype: Literal["auto", "fp32", "split-bf16", "bf16", "fp16"] = "auto"
    """How the batch's embeddings wait for the loss and are multiplied in it; 16 bits round them.
    split-bf16: in float32, multiplied on tensor cores as halves in bfloat16. auto: fp32 on a CPU; on
    a GPU fp16 for normalised embeddings, else split-bf16."""
    offload_embeddings: Switch = "auto"
    """Hold them and their gradient in host memory while chunks are computed."""

    @model_validator(mode="after")
    def _limit(self) -> MemorySection:
        if self.limit != "auto":
            try:
                parse_bytes(self.limit)
            except ValueError as error:
                raise ValueError(f"limit: {error}") from None
        return self


class EvalSection(_Section):
    sets: list[str] = ["STSBenchmark-dev"]
    """Names of sets, saved data sets, or files, whose columns may be named behind them:
    pairs.csv::first,second,rating, or pairs.tsv::1,2,3 where there is no header."""
    every: Count | None = None
    """Evaluate the first set every so many steps; before and after are always evaluated."""
    keep_best: Truth = False
    """Export the adapter that scored best on the first set instead of the last one."""
    limit: Count | None = None
    """Pairs per set, drawn once at random, always the same; all if absent."""
    token_budget: Count = 16384

    @model_validator(mode="after")
    def _best(self) -> EvalSection:
        if self.keep_best and (self.every is None or not self.sets):
            raise ValueError("keep_best: got true, but it needs `every` and at least one of `sets`")
        return self


class OutputSection(_Section):
    folder: str = "runs"
    name: str | None = None
    """The run is written to folder/name; the recipe's file name if not given."""
    export: Literal["adapter", "merged", "none"] = "adapter"


class Recipe(_Section):
    """A whole run."""

    model: ModelSection = ModelSection()
    lora: LoraSection = LoraSection()
    text: TextSection = TextSection()
    embedding: EmbeddingSection = EmbeddingSection()
    data: DataSection
    loss: LossSection = LossSection()
    train: TrainSection = TrainSection()
    memory: MemorySection = MemorySection()
    eval: EvalSection = EvalSection()
    output: OutputSection = OutputSection()

    def with_values(self, section: str, **values: Any) -> Recipe:
        """The recipe with other values in one of its sections, which are not checked again."""
        changed = getattr(self, section).model_copy(update=values)
        return self.model_copy(update={section: changed})

    @model_validator(mode="after")
    def _eos(self) -> Recipe:
        if self.embedding.pooling == "eos" and not self.text.append_eos:
            raise ValueError("embedding.pooling: got eos, which needs text.append_eos: true")
        return self
