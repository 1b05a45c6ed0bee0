"""The configuration of a run: dataclasses with the meaning of each key under it."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from optim import ORTHOGONALIZERS, Rule


class ConfigError(ValueError):
    """A configuration that cannot be run; the message is one sentence that names the key.

    What cannot be printed is escaped: the sentence may quote a file of somebody else's.
    """

    def __init__(self, sentence: str) -> None:
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in sentence))


def nearest(name: str, known: Sequence[str]) -> str:
    """`; did you mean X?`, or nothing when no known name is near."""
    last = name.rsplit(".", 1)[-1]
    close = difflib.get_close_matches(name, known, 1, 0.6) or [k for k in known if k.rsplit(".", 1)[-1] == last][:1]
    return f"; did you mean {close[0]}?" if close else ""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _require_positive(section: Any, name: str, *keys: str) -> None:
    """Refuse a value of one of the keys that is neither null nor above 0."""
    for key in keys:
        value = getattr(section, key)
        _require(value is None or 0 < value < math.inf, f"{name}.{key} must be positive, got {value}")


@dataclass
class ModelConfig:
    """The model: GPT-2 as published."""

    preset: Literal["nano", "small", "medium", "large", "xl"] = "small"
    """Size: layers, heads and width of the published family (nano is for tests)."""
    layers: int | None = None
    """Number of blocks; null takes the preset's."""
    heads: int | None = None
    """Attention heads; null takes the preset's."""
    width: int | None = None
    """Width of the residual stream; null takes the preset's."""
    context: int = 1024
    """Longest sequence in tokens, and the length of every training sequence."""
    vocab_multiple: int = 128
    """The embedding is padded to a multiple of this for speed; the loss never sees the padding. 1 pads nothing."""

    def __post_init__(self) -> None:
        _require_positive(self, "model", "layers", "heads", "width", "context", "vocab_multiple")


@dataclass
class DataConfig:
    """The text."""

    path: str = "data/tokens/sotu-gpt2-2048"
    """Folder of shards with a manifest.json, made by `python -m data.prepare`."""
    epochs: int = 1
    """How often the training tokens may be seen; a run that needs more is refused before it starts."""
    shuffle: bool = True
    """Visit the sequences of each epoch in a seeded random order instead of the order on disk."""
    val_tokens: int | None = None
    """Validation tokens of every evaluation, the first of the validation split; null takes all."""

    def __post_init__(self) -> None:
        _require_positive(self, "data", "epochs", "val_tokens")


@dataclass
class MatrixConfig:
    """How the hidden matrices are updated."""

    optimizer: Literal[
        "muon", "adamw", "sgd", "shampoo", "soap", "kl_shampoo", "kl_soap", "jorge", "scion", "modular"
    ] = "muon"
    """What updates them; adamw has the betas and eps of optim.adamw, others a section of their own beside this one.
    scion and modular update all of the model, with the keys of this section, and leave nothing to AdamW."""
    lr: float = 0.02
    """Peak learning rate of the hidden matrices."""
    weight_decay: float = 0.0
    """Decoupled decay, p -= lr * weight_decay * p, with the learning rate before any shape scale; sgd adds it to the
    gradient, as it always has."""
    orthogonalizer: str = "polar_express"
    """The map to the polar factor: svd, qdwh, zolo_pd, or a schedule; `python -m scripts.schedules` describes them."""
    steps: int | None = None
    """Polynomial iterations; null takes the number the schedule was published with (exact methods have none)."""
    dtype: Literal["auto", "bf16", "fp16", "fp32", "fp64"] = "auto"
    """Precision of the iteration; auto is bf16 where the device is fast in it and fp32 elsewhere."""
    margin: float | None = None
    """Factor on the norm before iterating; null takes the schedule's own."""
    path: Literal["auto", "plain", "symmetric", "gram"] = "auto"
    """How the polynomials are applied; auto takes the cheapest for each shape."""
    normalizer: Literal["frobenius", "power"] | None = None
    """power lifts what a dominant singular value hides, by one more step; null takes the schedule's own."""
    allow_unsafe: bool = False
    """Accept a schedule that one rounding of bf16 can make flip signs or explode."""
    momentum: float = 0.95
    """Decay of the momentum buffer of muon, sgd, jorge, scion and modular."""
    nesterov: bool = True
    """Look ahead of the momentum (muon, sgd)."""
    momentum_form: Literal["ema", "sum"] = "ema"
    """ema: m <- mu m + (1 - mu) g; sum: m <- mu m + g (the paper's code)."""
    shape_scale: Literal["none", "spectral", "original", "match_rms_adamw"] = "original"
    """Factor on the learning rate by shape (out, in): 1, sqrt(out/in), sqrt(max(1, out/in)), 0.2 sqrt(max(out, in))."""

    def __post_init__(self) -> None:
        name = self.orthogonalizer
        _require(
            name in ORTHOGONALIZERS,
            f"optim.matrix.orthogonalizer={name} is unknown{nearest(name, ORTHOGONALIZERS)}; known are"
            f" {', '.join(ORTHOGONALIZERS)}",
        )


@dataclass
class AdamWConfig:
    """How everything else is updated: embeddings, positions, norms and biases."""

    lr: float | None = None
    """Peak learning rate; null shares optim.matrix.lr, as the paper's code does."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled decay of the parameters whose rule names none."""


@dataclass
class SoapConfig:
    """soap, kl_soap and kl_shampoo: how they follow the eigenbases of the gradient's two Kronecker factors."""

    betas: tuple[float, float] | None = None
    """Decay of momentum and second moment; null is (0.95, 0.95) for soap and (0.9, 0.98) for the KL methods."""
    shampoo_beta: float | None = None
    """Decay of the statistics; null is the second of betas."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    bias_correction: bool | None = None
    """Of the moments, as in Adam; null is true for soap and false for kl_soap."""
    orthogonalize: bool = False
    """Orthogonalize the direction with optim.matrix.orthogonalizer (SOAP-Muon)."""
    storage: Literal["S", "P"] = "S"
    """What is stored of a factor: S, its covariance, or P, the same seen from its eigenbasis."""
    preconditioner_dtype: Literal["fp32", "bf16"] = "fp32"
    """Of statistics and bases; bf16 is made for storage P."""
    precondition_frequency: int = 10
    """Steps between refreshes of the bases."""
    refresh: Literal["qr", "eigh"] = "qr"
    """One step of orthogonal iteration, or all the way to the eigenvectors."""
    subspace_fraction: float = 1.0
    """Part of each basis that a refresh turns; what 0.25 saves is in logs/reference/refresh_speed/."""
    subspace_rule: Literal["partition", "greedy"] = "partition"
    """Which part: random ones in turn, or that with most off-diagonal mass."""
    polish_interval: int = 10
    """How often each vector of a bfloat16 basis is turned before the basis is made orthonormal again; 0 is never."""
    transport: Literal["permute", "squared"] = "permute"
    """How second moments follow a refresh: with their eigenvalues' order, or by the squared rotation."""
    statistics: Literal["after", "before"] = "after"
    """Whether a gradient enters the bases after the step that it makes, or before."""
    first_step: Literal["skip", "take"] = "skip"
    """What to do before there is a basis: no update, as published, or one in the basis of that gradient."""
    eigenvalues: Literal["average", "diagonal"] = "average"
    """Of the KL methods: averaged in every step, or the diagonal of P (storage P only)."""
    max_dim: int = 10000
    """A side longer than this gets no factor."""


@dataclass
class ShampooConfig:
    """shampoo: gradients between inverse roots of their covariances."""

    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of momentum and statistics."""
    power: float = 0.25
    """Of the inverse roots: 0.25, or 0.5 with the trace taken out."""
    statistics: Literal["ema", "sum"] = "ema"
    """Moving averages, or sums as published first."""
    root: Literal["eigh", "newton", "minimax"] = "eigh"
    """How roots are computed."""
    eps: float = 1e-6
    """Added to the covariances, in parts of their size or as it is."""
    damping: Literal["relative", "absolute"] = "relative"
    """Which of the two."""
    grafting: Literal["adam", "sgd", "none"] = "adam"
    """Whose length the directions have."""
    precondition_frequency: int = 10
    """Steps between computations of the roots."""
    block_size: int | None = 1024
    """Longer sides are cut into equal parts; null cuts nothing."""
    max_dim: int = 10000
    """A side longer than this is not cut and has no root."""
    preconditioner_dtype: Literal["fp32", "bf16"] = "fp32"
    """Of statistics and roots."""


@dataclass
class JorgeConfig:
    """jorge: inverse fourth roots by products alone; its momentum is optim.matrix.momentum."""

    precondition_frequency: int = 1
    """Steps between updates of the roots."""
    eps: float | None = None
    """Start of the covariances, 1e-6 as published; null fits it to the first gradient."""
    ridge: float = 1e-2
    """Added to each covariance, as a part of its mean eigenvalue, so that directions without gradient, which GPT-2 has,
    do not stop the roots from following; 0 as published."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Of the state and of all products."""


@dataclass
class ScionConfig:
    """scion: steps of length radius times optim.matrix.lr, in a norm for each kind of parameter; weights stay in the
    ball of that radius with optim.matrix.weight_decay=1 (Scion) and are free with 0 (unconstrained Scion)."""

    norm: Literal["sign", "sign_embedding", "rows", "embedding", "columns", "spectral"] = "spectral"
    """Of the hidden matrices: the largest singular value over sqrt(out/in), or one of those listed for embeddings."""
    radius: float = 50.0
    """Of the hidden matrices; as published for GPT-2 in the spectral norm, like embedding_norm and embedding_radius."""
    embedding_norm: Literal["sign", "sign_embedding", "rows", "embedding", "columns", "spectral"] = "sign"
    """Of embeddings and head: the largest entry, in the unit of a head or of an embedding; the longest row, in that of
    a head (RowNorm) or of an embedding (ColNorm); the longest column; or as for hidden matrices (optim/norms.py)."""
    embedding_radius: float = 3000.0
    """Of embeddings and head."""
    vector_radius: float = 5.0
    """Of gains and biases, by their largest entry. The published models have none; the radius of the hidden matrices is
    far too much for them, see configs/quickstart_scion.yaml."""

    def __post_init__(self) -> None:
        _require_positive(self, "optim.scion", "radius", "embedding_radius", "vector_radius")


@dataclass
class ModularConfig:
    """modular: how the length of a step, which optim.matrix.lr is, is shared in the model: by masses, in proportion."""

    embed_mass: float = 1.0
    """Of the embeddings of tokens and positions."""
    blocks_mass: float = 5.0
    """Of all blocks together."""
    head_mass: float = 1.0
    """Of the last norm and the head; where it is tied to the embedding, the shorter of both steps is made."""

    def __post_init__(self) -> None:
        _require_positive(self, "optim.modular", "embed_mass", "blocks_mass", "head_mass")


def gpt2_rules() -> list[Rule]:
    """Which optimizer each GPT-2 parameter goes to: the fused QKV counts as three square matrices."""
    return [
        Rule(r"^h\.\d+\.attn\.c_attn\.weight$", "matrix", blocks=3),
        Rule(r"^h\.\d+\.(attn|mlp)\.c_\w+\.weight$", "matrix"),
        Rule(r"^w[tp]e\.weight$", "adamw"),
        Rule(r"(\.bias|ln_\w+\.weight)$", "adamw", weight_decay=0.0),
    ]


@dataclass
class OptimConfig:
    """The optimizers and which parameter goes to which."""

    matrix: MatrixConfig = field(default_factory=MatrixConfig)
    """The hidden matrices."""
    soap: SoapConfig = field(default_factory=SoapConfig)
    """What soap, kl_soap and kl_shampoo add."""
    shampoo: ShampooConfig = field(default_factory=ShampooConfig)
    """What shampoo adds."""
    jorge: JorgeConfig = field(default_factory=JorgeConfig)
    """What jorge adds."""
    scion: ScionConfig = field(default_factory=ScionConfig)
    """What scion adds."""
    modular: ModularConfig = field(default_factory=ModularConfig)
    """What modular adds."""
    adamw: AdamWConfig = field(default_factory=AdamWConfig)
    """All other parameters."""
    rules: list[Rule] = field(default_factory=gpt2_rules)
    """Ordered routing rules; the first whose pattern is found in a parameter's name wins."""
    grad_clip: float | None = 1.0
    """Largest global norm of the gradient, applied before any optimizer sees it and never to an update; null is off."""

    def __post_init__(self) -> None:
        _require_positive(self, "optim", "grad_clip")


@dataclass
class ScheduleConfig:
    """Learning rate over the run, as a factor on every peak learning rate."""

    kind: Literal["constant_linear", "trapezoid", "cosine"] = "constant_linear"
    """constant_linear: constant, then on a line to 0 clipped at the floor (the paper); trapezoid: constant, then on a
    line to the floor; cosine: half a cosine to the floor. All start with the warm-up."""
    warmup_steps: int = 0
    """Steps over which the factor climbs on a line to 1."""
    decay_fraction: float = 0.6
    """Last part of the steps, in which constant_linear and trapezoid decay."""
    floor: float = 0.1
    """Smallest factor after the warm-up."""

    def __post_init__(self) -> None:
        _require(self.warmup_steps >= 0, f"schedule.warmup_steps must not be negative, got {self.warmup_steps}")
        for key in ("decay_fraction", "floor"):
            value = getattr(self, key)
            _require(0 <= value <= 1, f"schedule.{key} must lie between 0 and 1, got {value}")


@dataclass
class TrainConfig:
    """The loop."""

    steps: int = 1000
    """Optimizer steps."""
    batch_tokens: int = 524288
    """Tokens in one optimizer step over all ranks and accumulation; a multiple of model.context."""
    micro_batch: int = 16
    """Most sequences in one forward pass on one device; lower it when memory runs out, the result stays the same."""
    eval_every: int = 125
    """Steps between evaluations; the first and last step are always evaluated."""
    log_every: int = 10
    """Steps between printed status lines (metrics.jsonl holds every step)."""
    inspect_every: int = 250
    """Steps between looks into the optimizer: orthogonality error, update sizes, its milliseconds; 0 is never."""
    save_gradients_at: tuple[int, ...] = ()
    """After how many steps the gradients of the hidden matrices, unclipped, are kept in RUN/gradients/ (0: untrained);
    writing them counts as training time."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto is cuda where there is a GPU, else cpu."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Autocast of the forward pass; auto is bf16 where the device is fast in it and fp32 elsewhere."""
    compile: Literal["auto"] | bool = "auto"
    """torch.compile of the model and the orthogonalizer; auto is true for GPUs only: it rarely pays on CPUs."""
    hang_minutes: float = 10.0
    """How long a rank waits for the others before it calls them hung and ends the run; they may compile that long."""

    def __post_init__(self) -> None:
        _require_positive(self, "train", "steps", "batch_tokens", "micro_batch", "eval_every", "log_every")
        _require_positive(self, "train", "hang_minutes")
        _require(self.inspect_every >= 0, f"train.inspect_every must not be negative, got {self.inspect_every}")
        _require(
            all(0 <= step < self.steps for step in self.save_gradients_at),
            f"train.save_gradients_at must name steps from 0 to train.steps - 1 = {self.steps - 1},"
            f" got {list(self.save_gradients_at)}",
        )


@dataclass
class CheckpointConfig:
    """What a run that was stopped, killed or cut off is taken up again from: RUN/checkpoints/, see --resume."""

    every: int = 250
    """Steps between checkpoints; 0 writes one only when the run is asked to stop."""
    keep_last: int = 2
    """How many of the newest are kept while the run goes on (none once it is completed: it has its weights then)."""
    keep_every: int | None = None
    """Keep for good every checkpoint whose step is a multiple of this; null keeps none."""
    keep_best: bool = False
    """Write one after each evaluation with the lowest validation loss so far, the last included, and keep the latest
    such for good: checkpoints/best."""

    def __post_init__(self) -> None:
        _require(self.every >= 0, f"checkpoint.every must not be negative, got {self.every}")
        _require_positive(self, "checkpoint", "keep_last", "keep_every")
        _require(
            not self.keep_every or (self.every and self.keep_every % self.every == 0),
            f"checkpoint.keep_every={self.keep_every} must be a multiple of checkpoint.every={self.every}",
        )


@dataclass
class GuardConfig:
    """Spikes of loss or gradient norm; numbers that are not finite always stop the run."""

    on_spike: Literal["keep", "skip", "stop"] = "keep"
    """What happens to the update of a step whose z-score passes the threshold: made, left out, or the run ends."""
    threshold: float = 6.0
    """Largest z-score of loss and gradient norm, which metrics.jsonl holds for every step: (x - median) over the
    scaled median absolute deviation."""
    window: int = 64
    """Steps that the z-score compares with."""

    def __post_init__(self) -> None:
        _require_positive(self, "guard", "threshold")
        _require(self.window >= 16, f"guard.window must be at least 16, got {self.window}")


@dataclass
class SampleConfig:
    """The text sampled from the trained model at the end of the run."""

    prompt: str = ""
    """What the model continues; empty starts a new document."""
    tokens: int = 200
    """How many tokens to sample; 0 samples nothing."""
    temperature: float = 0.8
    """Sharpness; 0 always takes the likeliest token."""
    top_k: int | None = 50
    """Sample among this many likeliest tokens; null is all."""
    top_p: float | None = None
    """Sample among the likeliest tokens that together hold this probability; null is all."""

    def __post_init__(self) -> None:
        _require(self.tokens >= 0, f"sample.tokens must not be negative, got {self.tokens}")
        _require(0 <= self.temperature < math.inf, f"sample.temperature must not be negative, got {self.temperature}")
        _require_positive(self, "sample", "top_k", "top_p")
        _require(self.top_p is None or self.top_p <= 1, f"sample.top_p must be at most 1, got {self.top_p}")


@dataclass
class WandbConfig:
    """Weights & Biases; a failure of it never stops a run."""

    mode: Literal["disabled", "offline", "online"] = "disabled"
    """offline writes into the run directory for a later `wandb sync`."""
    project: str = "gpt2-matrix-optimizers"
    """Project the run appears in."""
    group: str | None = None
    """Group, such as the name of a sweep; null is the run's name."""
    job_type: str | None = None
    """Job type, such as a method of a sweep; null is the orthogonalizer, or the optimizer where there is none."""
    tags: list[str] = field(default_factory=list)
    """Tags beside those made from the optimizer and the model."""


@dataclass
class Config:
    """One run."""

    name: str = "gpt2"
    """Name of the experiment; runs land in logs/NAME/."""
    seed: int = 0
    """Seed of the initial weights, the order of the data and the sampling."""
    run_dir: str | None = None
    """Where the run is written; null is a new folder logs/NAME/DATE-TIME-seedN."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The model."""
    data: DataConfig = field(default_factory=DataConfig)
    """The text."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimizers."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """The learning rate over the run."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The loop."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """What a run is taken up again from."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """What happens on a spike of the loss."""
    sample: SampleConfig = field(default_factory=SampleConfig)
    """Text sampled at the end."""
    wandb: WandbConfig = field(default_factory=WandbConfig)
    """Weights & Biases."""

    def __post_init__(self) -> None:
        inside = os.path.dirname(os.path.normpath(os.path.join("logs", self.name))) == "logs"
        _require(inside, f"name must be that of a folder in logs/, got {self.name!r}")
        _require(0 <= self.seed < 2**63, f"seed must lie between 0 and 2^63, got {self.seed}")
        tokens, context = self.train.batch_tokens, self.model.context
        _require(
            tokens % context == 0,
            f"train.batch_tokens={tokens} must be a multiple of model.context={context}",
        )

    @property
    def batch_sequences(self) -> int:
        return self.train.batch_tokens // self.model.context


# ---------------------------------------------------------------------------------------------------------------
# The same in plain values


def plain(config: Config) -> dict[str, Any]:
    """A configuration as sections of plain values, which YAML and JSON know."""
    return _plain(dataclasses.asdict(config))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one dictionary with dotted keys."""
    flat = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat
