"""python benchmarks/decode.py [--quick] [--generator DIR] [--threads 1] [--into README.md]

Tokens per second of the generator's decoder beside transformers' nearest architecture with equal weights and
shapes (Qwen3ForCausalLM), the linear layers alone, and the limit that memory bandwidth sets; then the time of
whole images with guidance, and how many tokens reduced precision flips. Writes a Markdown table.

All contestants take turns in every round and each keeps its best round, so that a busy machine slows all
alike. Greedy, no guidance, text prefix of full length; the timed steps lie around the middle of the image,
where the cache has its mean length. transformers runs in a bare loop over its forward, which is faster than
its `generate`.
"""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from tavq.base.arguments import parse, run_main
from tavq.data.text_encoder import TextEncoder, TokenStates
from tavq.eval.table import with_block, write_block
from tavq.generator.decoding import Decoder
from tavq.generator.linear import Precision
from tavq.generator.model import PRESETS, GeneratorConfig, GeneratorModel
from tavq.generator.noise import gumbel_rows
from tavq.generator.sampling import sample
from tavq.generator.settings import SamplingConfig

PRECISIONS: tuple[Precision, ...] = ("float32", "int8", "bfloat16")
WAYS = ((1, 1, 1), (1, 8, 1), (8, 1, 4), (8, 4, 4))
"""Images at a time, tokens of a draft, images of a micro-batch."""
GRIDS = {"flickr8k": (8, 8), "base": (16, 16)}
PROMPTS = (
    "a brown dog runs through the grass",
    "two children play football on a beach",
    "a man in a red jacket climbs a snowy mountain",
    "a woman rides a bicycle down a city street",
)


@dataclasses.dataclass(frozen=True)
class DecodeBenchmark:
    """Speed of decoding, in one run."""

    presets: tuple[str, ...] = ("flickr8k", "base")
    batches: tuple[int, ...] = (1, 8)
    steps: int = 64
    """Timed steps a round."""
    rounds: int = 5
    threads: int = 0
    """Of torch; 0 leaves its own choice."""
    generator: Path | None = None
    """A trained generator for whole images and flipped tokens; without it, random weights and no flips."""
    quick: bool = False
    """flickr8k alone, two rounds of 16 steps."""
    into: Path | None = None
    """Markdown file whose block between the marker lines of `decode` the table replaces."""

    def __post_init__(self) -> None:
        if self.into is not None:
            with_block(self.into, "decode", "")  # refused now, not after the work


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table of tokens per second."""

    preset: str
    batch: int
    tokens_per_s: dict[str, float]


def random_model(preset: str) -> GeneratorModel:
    """A generator none of whose weights is zero, as after training."""
    torch.manual_seed(0)
    generator = GeneratorModel(GeneratorConfig.of(PRESETS[preset], grid_size=GRIDS[preset])).eval()
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return generator


def full_texts(generator: GeneratorModel, count: int) -> TokenStates:
    config = generator.config
    states = torch.randn(count, config.max_text_tokens, config.text_dim)
    return TokenStates(states, torch.ones(count, config.max_text_tokens, dtype=torch.bool))


def as_qwen3(generator: GeneratorModel) -> torch.nn.Module:
    """The same matrices in transformers' Qwen3; its norm weights are 1, its positions one-dimensional."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config, width = generator.config, generator.config.width
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=config.num_codes,
            hidden_size=width,
            intermediate_size=config.hidden_width,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_heads,
            head_dim=width // config.num_heads,
            max_position_embeddings=config.length,
            tie_word_embeddings=False,
        )
    ).eval()
    weights = {"model.embed_tokens.weight": generator.tokens.weight, "lm_head.weight": generator.head.weight}
    for number, block in enumerate(generator.blocks):
        name = f"model.layers.{number}."
        parts = dict(zip("qkv", block.qkv.weight.chunk(3), strict=True))
        weights |= {f"{name}self_attn.{key}_proj.weight": part for key, part in parts.items()}
        gate, up = block.gate_up.weight.chunk(2)
        weights |= {f"{name}mlp.gate_proj.weight": gate, f"{name}mlp.up_proj.weight": up}
        weights |= {
            f"{name}self_attn.o_proj.weight": block.out.weight,
            f"{name}mlp.down_proj.weight": block.down.weight,
        }
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and all("norm" in key for key in missing), (missing, unexpected)
    return model


def our_steps(generator: GeneratorModel, batch: int, steps: int, precision: Precision) -> Callable[[], float]:
    decoder = Decoder(generator, batch, precision)
    decoder.read(full_texts(generator, batch))
    first = (generator.config.num_tokens - steps) // 2

    def run() -> float:
        ids = torch.zeros(batch, dtype=torch.int64)
        began = time.perf_counter()
        for position in range(first, first + steps):
            ids = decoder.step(ids, position).argmax(-1)
        return time.perf_counter() - began

    return run


def qwen3_steps(
    model: torch.nn.Module, generator: GeneratorModel, batch: int, steps: int, static: bool
) -> Callable[[], float]:
    from transformers import DynamicCache, StaticCache

    config = generator.config
    before = config.max_text_tokens + (config.num_tokens - steps) // 2

    def run() -> float:
        cache = StaticCache(model.config, max_cache_len=config.length) if static else DynamicCache()
        prompt = torch.zeros(batch, before, dtype=torch.int64)
        model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
        ids = torch.zeros(batch, 1, dtype=torch.int64)
        began = time.perf_counter()
        for at in range(before, before + steps):
            logits = model(
                ids, past_key_values=cache, use_cache=True, position_ids=torch.tensor([[at]])
            ).logits
            ids = logits[:, -1].argmax(-1, keepdim=True)
        return time.perf_counter() - began

    return run


def linears_alone(
    generator: GeneratorModel, batch: int, steps: int, precision: Precision
) -> Callable[[], float]:
    """The matrices of a step, laid out as the decoder lays them out, on inputs that are there already."""
    decoder, config = Decoder(generator, batch, precision), generator.config
    x, hidden = torch.randn(batch, config.width), torch.randn(batch, config.hidden_width)
    x, hidden = x.to(decoder.dtype), hidden.to(decoder.dtype)

    def run() -> float:
        began = time.perf_counter()
        for _ in range(steps):
            for layer in decoder.layers:
                layer.qkv(x), layer.out(x), layer.gate_up(x), layer.down(hidden)
            decoder.head(x)
        return time.perf_counter() - began

    return run


def reading(generator: GeneratorModel, batch: int, steps: int) -> Callable[[], float]:
    """Read as many bytes as a step must: the weights, and the cache at its mean length."""
    config = generator.config
    weights = (
        sum(m.weight.numel() for m in generator.modules() if isinstance(m, torch.nn.Linear))
        - generator.text.weight.numel()
    )
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
    """Tokens per second of all contestants, the best of `rounds` rounds each."""
    generator = random_model(preset)
    qwen3 = as_qwen3(generator)
    runs = {f"ours {p}": our_steps(generator, batch, steps, p) for p in PRECISIONS}
    runs |= {
        "Qwen3 dynamic": qwen3_steps(qwen3, generator, batch, steps, static=False),
        "Qwen3 static": qwen3_steps(qwen3, generator, batch, steps, static=True),
        "linears float32": linears_alone(generator, batch, steps, "float32"),
        "linears int8": linears_alone(generator, batch, steps, "int8"),
        "bandwidth limit": reading(generator, batch, steps),
    }
    best = {name: min(times) for name, times in zip(runs, _rounds(list(runs.values()), rounds), strict=True)}
    return Row(preset, batch, {name: batch * steps / seconds for name, seconds in best.items()})


def _rounds(runs: Sequence[Callable[[], float]], rounds: int) -> list[list[float]]:
    """Seconds of every run in every round, by run; an untimed round goes first."""
    for run in runs:
        run()
    return [list(times) for times in zip(*[[run() for run in runs] for _ in range(rounds)], strict=True)]


def speed_table(rows: Sequence[Row]) -> str:
    names = list(rows[0].tokens_per_s)
    lines = ["| tokens/s | " + " | ".join(f"{row.preset}, batch {row.batch}" for row in rows) + " |"]
    lines.append("| --- |" + " ---: |" * len(rows))
    for name in names:
        lines.append(f"| {name} | " + " | ".join(f"{row.tokens_per_s[name]:.0f}" for row in rows) + " |")
    for title, ratio in RATIOS.items():
        lines.append(
            f"| {title} | " + " | ".join(f"**{ratio(row.tokens_per_s):.2f}**" for row in rows) + " |"
        )
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


def whole_images(generator: GeneratorModel, texts: TokenStates, rounds: int) -> str:
    """Seconds an image with guidance, plainly and with drafts, for 1 and 8 images at a time."""
    heads = []
    for count, draft_tokens, _ in WAYS:
        how = "plainly" if draft_tokens == 1 else f"drafts of {draft_tokens}"
        heads.append(f"{count} at a time, {how}")
    first = f"| s/image, guidance {SamplingConfig().guidance:g} | "
    lines = [first + " | ".join(heads) + " |", "| --- |" + " ---: |" * len(WAYS)]
    for precision in PRECISIONS:
        cells = []
        for count, draft_tokens, micro_batch in WAYS:
            settings = SamplingConfig(precision=precision, draft_tokens=draft_tokens, micro_batch=micro_batch)
            cells.append(f"{seconds_an_image(generator, texts, count, settings, rounds):.3f}")
        lines.append(f"| {precision} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def seconds_an_image(
    generator: GeneratorModel, texts: TokenStates, count: int, settings: SamplingConfig, rounds: int
) -> float:
    """The best of `rounds` rounds, in each of which one image at a time draws every text once."""
    groups = [[row] for row in range(len(texts.mask))] if count == 1 else [[*range(len(texts.mask))] * 2]
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        for rows in groups:
            sample(generator, TokenStates(texts.states[rows], texts.mask[rows]), range(len(rows)), settings)
        times.append(time.perf_counter() - began)
    return min(times) / sum(map(len, groups))


@torch.inference_mode()
def flips(generator: GeneratorModel, texts: TokenStates, precision: Precision) -> float:
    """Share of tokens that `precision` draws differently after the same beginning, without guidance."""
    seeds, positions = list(range(len(texts.mask))), range(generator.config.num_tokens)
    ids = sample(
        generator, texts, seeds, SamplingConfig(guidance=1.0, micro_batch=len(seeds), draft_tokens=1)
    )
    decoder = Decoder(generator, len(seeds), precision)
    decoder.read(texts)
    noise, different = gumbel_rows(seeds, positions, generator.config.num_codes), 0
    for position in positions:
        logits = decoder.step(ids[:, position - 1] if position else None, position)
        different += int(((logits + noise[:, position]).argmax(-1) != ids[:, position]).sum())
    return different / ids.numel()


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    settings = parse(DecodeBenchmark, argv, prog="python benchmarks/decode.py")
    if settings.quick:
        settings = dataclasses.replace(settings, presets=("flickr8k",), steps=16, rounds=2)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    rows = [
        compare(p, b, settings.steps, settings.rounds) for p in settings.presets for b in settings.batches
    ]
    generator = (
        GeneratorModel.from_pretrained(settings.generator) if settings.generator else random_model("flickr8k")
    )
    texts = TextEncoder(generator.config.text_encoder).token_states(
        PROMPTS, generator.config.max_text_tokens, batch_size=1
    )
    parts = [_machine(), speed_table(rows), whole_images(generator, texts, settings.rounds)]
    if settings.generator:
        shares = ", ".join(
            f"{p} {100 * flips(generator, texts, p):.1f} %" for p in PRECISIONS if p != "float32"
        )
        parts.append(f"Tokens drawn differently from float32 after the same beginning: {shares}.")
    table = "\n\n".join(parts)
    print(table)
    if settings.into is not None:
        write_block(settings.into, "decode", table)


def _machine() -> str:
    kind = platform.processor() or platform.machine()
    return f"{kind}, {torch.get_num_threads()} thread(s), torch {torch.__version__}"


if __name__ == "__main__":
    main()
