"""python benchmarks/decode.py [--quick] [--generator DIR] [--threads 1] [--into docs/speed.md]

Speed of the generator's engine. Writes a Markdown table of tokens per second beside transformers' nearest
architecture with equal weights and shapes (Qwen3ForCausalLM), beside the engine's linear layers alone and
beside the limit that memory bandwidth sets; then of the time for whole images with guidance, and of how many
tokens change with the precision.

All contestants run once in every round, and the best round of each counts: a busy machine then slows all
alike. Decoding is greedy, without guidance, after a text of full length. The timed steps lie around the
middle of the image, where the KV cache has its mean length. transformers runs in a bare loop over its
forward, which is faster than its `generate`.
"""

from __future__ import annotations

import dataclasses
import datetime
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from tavq.base.arguments import parse, run_main
from tavq.data.text_encoder import TextEncoder, TokenStates
from tavq.eval.table import with_block, write_block
from tavq.generator.config import PRESETS, Precision, SamplingConfig
from tavq.generator.engine import Engine
from tavq.generator.model import GeneratorConfig, GeneratorModel
from tavq.generator.sampling import batch_gumbel_noise, sample

PRECISIONS: tuple[Precision, ...] = ("float32", "int8", "bfloat16")
IMAGE_COLUMNS = ((1, 1, 1), (1, 8, 1), (8, 1, 4), (8, 4, 4))
"""Images at a time, draft tokens and micro-batch of each column in the table of whole images."""
GRIDS = {"flickr8k": (12, 12), "base": (16, 16)}
"""Preset -> its token grid; that of `flickr8k` is the one of the weights that ship."""
PROMPTS = (
    "a brown dog runs through the grass",
    "two children play football on a beach",
    "a man in a red jacket climbs a snowy mountain",
    "a woman rides a bicycle down a city street",
)


@dataclasses.dataclass(frozen=True)
class DecodeBenchmark:
    """Measure the speed of decoding."""

    presets: tuple[str, ...] = ("flickr8k", "base")
    batches: tuple[int, ...] = (1, 8)
    steps: int = 64
    """Timed steps per round."""
    rounds: int = 5
    threads: int = 0
    """Threads of torch. 0 leaves its default."""
    generator: Path | None = None
    """A trained generator for whole images and changed tokens. Without it, weights are random, and changed
    tokens are not counted."""
    quick: bool = False
    """Measure flickr8k alone, in two rounds of 16 steps."""
    into: Path | None = None
    """Markdown file in which the table replaces the block between the marker lines of `decode`."""

    def __post_init__(self) -> None:
        if self.into is not None:
            with_block(self.into, "decode", "")  # refused now, not after the work


@dataclasses.dataclass(frozen=True)
class Row:
    """Tokens per second of all contestants, for one preset and batch size."""

    preset: str
    batch: int
    tokens_per_s: dict[str, float]


def random_generator(preset: str) -> GeneratorModel:
    """Return a generator none of whose weights is zero, as after training."""
    torch.manual_seed(0)
    config = GeneratorConfig.of(PRESETS[preset], grid_size=GRIDS[preset])
    generator = GeneratorModel(config).eval()
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return generator


def full_texts(config: GeneratorConfig, count: int) -> TokenStates:
    """Return random texts that fill all slots."""
    states = torch.randn(count, config.max_text_tokens, config.text_dim)
    return TokenStates(states, torch.ones(count, config.max_text_tokens, dtype=torch.bool))


def as_qwen3(generator: GeneratorModel) -> torch.nn.Module:
    """Return a Qwen3 with the same matrices. Its norm weights are 1, its rope has one dimension."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = generator.config
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=config.num_codes,
            hidden_size=config.width,
            intermediate_size=config.hidden_width,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_heads,
            head_dim=config.width // config.num_heads,
            max_position_embeddings=config.sequence_length,
            tie_word_embeddings=False,
        )
    ).eval()

    weights = {
        "model.embed_tokens.weight": generator.token_embedding.weight,
        "lm_head.weight": generator.head.weight,
    }
    for number, block in enumerate(generator.blocks):
        q, k, v = block.qkv_proj.weight.chunk(3)
        gate, up = block.gate_up_proj.weight.chunk(2)
        layer = {
            "self_attn.q_proj": q,
            "self_attn.k_proj": k,
            "self_attn.v_proj": v,
            "self_attn.o_proj": block.o_proj.weight,
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": block.down_proj.weight,
        }
        weights |= {f"model.layers.{number}.{name}.weight": weight for name, weight in layer.items()}

    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and all("norm" in key for key in missing), (missing, unexpected)
    return model


def engine_steps(
    generator: GeneratorModel, batch: int, steps: int, precision: Precision
) -> Callable[[], float]:
    engine = Engine(generator, batch, precision)
    engine.prefill(full_texts(generator.config, batch))
    first = (generator.config.num_tokens - steps) // 2

    def run() -> float:
        ids = torch.zeros(batch, dtype=torch.int64)
        began = time.perf_counter()
        for position in range(first, first + steps):
            ids = engine.decode_one_token(ids, position).argmax(-1)
        return time.perf_counter() - began

    return run


def qwen3_steps(
    model: torch.nn.Module, config: GeneratorConfig, batch: int, steps: int, static: bool
) -> Callable[[], float]:
    from transformers import DynamicCache, StaticCache

    first = config.max_text_tokens + (config.num_tokens - steps) // 2

    def run() -> float:
        cache = StaticCache(model.config, max_cache_len=config.sequence_length) if static else DynamicCache()
        prompt = torch.zeros(batch, first, dtype=torch.int64)
        model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)

        ids = torch.zeros(batch, 1, dtype=torch.int64)
        began = time.perf_counter()
        for slot in range(first, first + steps):
            output = model(ids, past_key_values=cache, use_cache=True, position_ids=torch.tensor([[slot]]))
            ids = output.logits[:, -1].argmax(-1, keepdim=True)
        return time.perf_counter() - began

    return run


def linear_steps(
    generator: GeneratorModel, batch: int, steps: int, precision: Precision
) -> Callable[[], float]:
    """Run the linear layers of a step alone, laid out as the engine lays them out."""
    engine, config = Engine(generator, batch, precision), generator.config
    x = torch.randn(batch, config.width).to(engine.dtype)
    hidden = torch.randn(batch, config.hidden_width).to(engine.dtype)

    def run() -> float:
        began = time.perf_counter()
        for _ in range(steps):
            for block in engine.blocks:
                block.qkv_proj(x)
                block.o_proj(x)
                block.gate_up_proj(x)
                block.down_proj(hidden)
            engine.head(x)
        return time.perf_counter() - began

    return run


def bandwidth_steps(generator: GeneratorModel, batch: int, steps: int) -> Callable[[], float]:
    """Read as many bytes as a step must: the weights, and the KV cache at its mean length."""
    config = generator.config
    linears = [module for module in generator.modules() if isinstance(module, torch.nn.Linear)]
    weights = sum(linear.weight.numel() for linear in linears) - generator.text_proj.weight.numel()
    mean_length = config.max_text_tokens + config.num_tokens // 2
    cache = batch * config.num_layers * 2 * mean_length * config.width
    numbers = torch.ones(weights + cache)

    def run() -> float:
        began = time.perf_counter()
        for _ in range(steps):
            numbers.sum()
        return time.perf_counter() - began

    return run


@torch.inference_mode()
def compare(preset: str, batch: int, steps: int, rounds: int) -> Row:
    """Measure tokens per second of all contestants, the best of `rounds` rounds each."""
    generator = random_generator(preset)
    config, qwen3 = generator.config, as_qwen3(generator)
    runs = {f"ours {precision}": engine_steps(generator, batch, steps, precision) for precision in PRECISIONS}
    runs |= {
        "Qwen3 dynamic": qwen3_steps(qwen3, config, batch, steps, static=False),
        "Qwen3 static": qwen3_steps(qwen3, config, batch, steps, static=True),
        "linears float32": linear_steps(generator, batch, steps, "float32"),
        "linears int8": linear_steps(generator, batch, steps, "int8"),
        "bandwidth limit": bandwidth_steps(generator, batch, steps),
    }
    seconds = best_seconds(list(runs.values()), rounds)
    speeds = {name: batch * steps / best for name, best in zip(runs, seconds, strict=True)}
    return Row(preset, batch, speeds)


def best_seconds(runs: Sequence[Callable[[], float]], rounds: int) -> list[float]:
    """Return the seconds of every run in its best round, after one round that does not count."""
    for run in runs:
        run()
    seconds = [[run() for run in runs] for _ in range(rounds)]
    return [min(of_run) for of_run in zip(*seconds, strict=True)]


def speed_table(rows: Sequence[Row]) -> str:
    lines = ["| tokens/s | " + " | ".join(f"{row.preset}, batch {row.batch}" for row in rows) + " |"]
    lines.append("| --- |" + " ---: |" * len(rows))
    for name in rows[0].tokens_per_s:
        lines.append(f"| {name} | " + " | ".join(f"{row.tokens_per_s[name]:.0f}" for row in rows) + " |")
    for title, ratio in RATIOS.items():
        cells = (f"**{ratio(row.tokens_per_s):.2f}**" for row in rows)
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _best_qwen3(speed: dict[str, float]) -> float:
    return max(speed["Qwen3 dynamic"], speed["Qwen3 static"])


RATIOS: dict[str, Callable[[dict[str, float]], float]] = {
    "float32 over the better Qwen3 (goal 1.3)": lambda s: s["ours float32"] / _best_qwen3(s),
    "best reduced precision over it (goal 2)": lambda s: (
        max(s["ours int8"], s["ours bfloat16"]) / _best_qwen3(s)
    ),
    "float32 of its linears alone (goal 0.8)": lambda s: s["ours float32"] / s["linears float32"],
    "float32 of the bandwidth limit": lambda s: s["ours float32"] / s["bandwidth limit"],
}


def image_table(generator: GeneratorModel, texts: TokenStates, rounds: int) -> str:
    """Tabulate seconds per image with guidance, without and with drafts, for 1 and 8 images at a time."""
    titles = []
    for count, draft_tokens, _ in IMAGE_COLUMNS:
        drafts = "no drafts" if draft_tokens == 1 else f"drafts of {draft_tokens}"
        titles.append(f"{count} at a time, {drafts}")
    settings = f"{generator.config.num_tokens} tokens, guidance {SamplingConfig().guidance_scale:g}"
    lines = [f"| s/image, {settings} | " + " | ".join(titles) + " |"]
    lines.append("| --- |" + " ---: |" * len(IMAGE_COLUMNS))

    for precision in PRECISIONS:
        cells = []
        for count, draft_tokens, micro_batch in IMAGE_COLUMNS:
            config = SamplingConfig(precision=precision, draft_tokens=draft_tokens, micro_batch=micro_batch)
            cells.append(f"{seconds_per_image(generator, texts, count, config, rounds):.3f}")
        lines.append(f"| {precision} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def seconds_per_image(
    generator: GeneratorModel, texts: TokenStates, count: int, config: SamplingConfig, rounds: int
) -> float:
    """Measure the best of `rounds` rounds: every text once, one at a time, or all of them twice at once."""
    num_texts = len(texts.mask)
    groups = [[text] for text in range(num_texts)] if count == 1 else [[*range(num_texts)] * 2]
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        for group in groups:
            some = TokenStates(texts.states[group], texts.mask[group])
            sample(generator, some, range(len(group)), config)
        seconds.append(time.perf_counter() - began)
    return min(seconds) / sum(map(len, groups))


@torch.inference_mode()
def changed_tokens(generator: GeneratorModel, texts: TokenStates, precision: Precision) -> float:
    """Return the fraction of tokens that `precision` samples differently from float32 after the same tokens,
    without guidance."""
    batch, num_tokens = len(texts.mask), generator.config.num_tokens
    seeds = list(range(batch))
    ids = sample(
        generator, texts, seeds, SamplingConfig(guidance_scale=1.0, micro_batch=batch, draft_tokens=1)
    )

    engine = Engine(generator, batch, precision)
    engine.prefill(texts)
    noise = batch_gumbel_noise(seeds, range(num_tokens), generator.config.num_codes)
    changed = 0
    for position in range(num_tokens):
        logits = engine.decode_one_token(ids[:, position - 1] if position else None, position)
        sampled = (logits + noise[:, position]).argmax(-1)
        changed += int((sampled != ids[:, position]).sum())
    return changed / ids.numel()


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    run = parse(DecodeBenchmark, argv, prog="python benchmarks/decode.py")
    if run.quick:
        run = dataclasses.replace(run, presets=("flickr8k",), steps=16, rounds=2)
    if run.threads:
        torch.set_num_threads(run.threads)

    rows = [compare(preset, batch, run.steps, run.rounds) for preset in run.presets for batch in run.batches]

    generator = random_generator("flickr8k")
    if run.generator is not None:
        generator = GeneratorModel.from_pretrained(run.generator)
    config = generator.config
    texts = TextEncoder(config.text_encoder).token_states(PROMPTS, config.max_text_tokens, batch_size=1)
    grids = ", ".join(f"{preset} {' x '.join(map(str, GRIDS[preset]))}" for preset in run.presets)
    heading = f"{_machine()}; grids: {grids}; {datetime.date.today()}"
    parts = [heading, speed_table(rows), image_table(generator, texts, run.rounds)]

    if run.generator is not None:
        reduced = [precision for precision in PRECISIONS if precision != "float32"]
        shares = ", ".join(f"{p} {100 * changed_tokens(generator, texts, p):.1f} %" for p in reduced)
        parts.append(f"Tokens sampled differently from float32 after the same tokens: {shares}.")
    table = "\n\n".join(parts)
    print(table)
    if run.into is not None:
        write_block(run.into, "decode", table)


def _machine() -> str:
    kind = platform.processor() or platform.machine()
    return f"{kind}, {torch.get_num_threads()} thread(s), torch {torch.__version__}"


if __name__ == "__main__":
    main()
