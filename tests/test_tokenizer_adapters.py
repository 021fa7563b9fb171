"""Adapters: what they hear is what the base does, and the base stays as its own library knows it.

taming-transformers and LlamaGen cannot be installed beside this project, so models with their structure and
key names stand in for them; diffusers and vector_quantize_pytorch are the real ones.
"""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from vector_quantize_pytorch import VectorQuantize

from tavq.alignment.adapters import Adapter, DiffusersAdapter, adapt
from tavq.alignment.aligner import TextAligner
from tavq.alignment.config import AlignmentConfig
from tavq.alignment.unit_index import SampledTexts, TextUnits
from tavq.commands import align, tokenize, train_captioner, train_generator
from tavq.data.images import to_tensor
from tavq.data.layouts import open_dataset
from tavq.eval import run_caption, run_tokenizer
from tavq.pipeline import Pipeline
from tavq.tokenizer import train_adapter
from tavq.tokenizer.adapter import TAVQAdapter
from tavq.tokenizer.config import PRESETS
from tavq.tokenizer.foreign import ForeignTokenizer, open_tokenizer
from tavq.tokenizer.model import TAVQTokenizer
from tavq.training.run_folder import read_log

from .conftest import save_network

SIZE = 32


class Block(nn.Module):
    """A residual block or an attention block, as far as an adapter can tell."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return x + self.conv(F.silu(x))


class NearestCode(nn.Module):
    """The quantiser of taming-transformers and, with `l2_norm` set, of LlamaGen."""

    def __init__(self, n_e: int = 32, e_dim: int = 4, l2_norm: bool | None = None):
        super().__init__()
        self.n_e, self.e_dim, self.beta = n_e, e_dim, 0.25
        self.embedding = nn.Embedding(n_e, e_dim)
        if l2_norm is not None:
            self.l2_norm = l2_norm

    def forward(self, z):
        rows, codes = z.movedim(1, -1), self.embedding.weight
        if getattr(self, "l2_norm", False):
            rows, codes = F.normalize(rows, dim=-1), F.normalize(codes, dim=-1)
        ids = torch.cdist(rows.flatten(0, 2), codes).argmin(dim=1)
        found = codes[ids].view(rows.shape)
        losses = (found - rows.detach()).square().mean(), self.beta * (rows - found.detach()).square().mean()
        if hasattr(self, "l2_norm"):
            loss = (*losses, torch.zeros(()), 0.5) if self.training else (None, None, None, None)
        else:
            loss = sum(losses)
        return (rows + (found - rows).detach()).movedim(-1, 1), loss, (None, None, ids)


class Encoder(nn.Module):
    def __init__(self, mid_as_list: bool):
        super().__init__()
        self.conv_in = nn.Conv2d(3, 8, 4, stride=4)
        if mid_as_list:
            self.mid = nn.ModuleList([Block(8), Block(8), Block(8)])
        else:
            self.mid = nn.Module()
            self.mid.block_1, self.mid.attn_1, self.mid.block_2 = Block(8), Block(8), Block(8)
        self.conv_out = nn.Conv2d(8, 6, 1)

    def forward(self, x):
        h = self.conv_in(x)
        for block in self.mid.children():
            h = block(h)
        return self.conv_out(h)


class ForeignVQModel(nn.Module):
    """VQModel of taming-transformers (`l2_norm` None) or of LlamaGen."""

    def __init__(self, l2_norm: bool | None = None):
        super().__init__()
        self.encoder = Encoder(mid_as_list=l2_norm is not None)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(6, 4, 1), nn.Conv2d(4, 6, 1)
        self.quantize = NearestCode(l2_norm=l2_norm)
        self.decoder = nn.ConvTranspose2d(6, 3, 4, stride=4)

    def encode(self, x):
        return self.quantize(self.quant_conv(self.encoder(x)))

    def decode(self, quant):
        return self.decoder(self.post_quant_conv(quant))

    def forward(self, x):
        quant, diff, _ = self.encode(x)
        return self.decode(quant), diff


class Around(nn.Module):
    """A user's own model around VectorQuantize, on maps or on sequences."""

    def __init__(self, image_fmap: bool = True, **settings):
        super().__init__()
        self.enter, self.leave = nn.Conv2d(3, 8, 4, stride=4), nn.ConvTranspose2d(8, 3, 4, stride=4)
        self.vq = VectorQuantize(8, 32, codebook_dim=4, accept_image_fmap=image_fmap, **settings)
        self.image_fmap = image_fmap

    def forward(self, x):
        z = self.enter(x)
        if not self.image_fmap:
            q, ids, loss = self.vq(z.flatten(2).transpose(1, 2))
            return self.leave(q.transpose(1, 2).view_as(z)), ids, loss
        q, ids, loss = self.vq(z)
        return self.leave(q), ids, loss


def vq_model_class() -> type[nn.Module]:
    from diffusers import VQModel

    return VQModel


def diffusers_model(**settings) -> nn.Module:
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (16, 16),
    }
    return vq_model_class()(
        **blocks, latent_channels=4, num_vq_embeddings=32, norm_num_groups=4, vq_embed_dim=6, **settings
    )


LEARNED = {"learnable_codebook": True, "ema_update": False}
BASES = {
    "diffusers": diffusers_model,
    "diffusers without attention": lambda: diffusers_model(mid_block_add_attention=False),
    "taming": ForeignVQModel,
    "llamagen": lambda: ForeignVQModel(l2_norm=True),
    "llamagen without l2_norm": lambda: ForeignVQModel(l2_norm=False),
    "vector_quantize_pytorch": lambda: Around(**LEARNED),
    "vector_quantize_pytorch on sequences": lambda: Around(False, **LEARNED, rotation_trick=False),
    "tavq": lambda: TAVQTokenizer(PRESETS["tiny"]),
}


@pytest.fixture(params=BASES)
def base(request) -> nn.Module:
    torch.manual_seed(0)
    return BASES[request.param]()


def codebook_of(base: nn.Module) -> nn.Parameter:
    """The parameter that holds the codes, by its key in the base's own state dict."""
    keys = ("quantize.embedding.weight", "vq._codebook.embed", "quantizer.weight")
    return next(p for name, p in base.named_parameters() if name in keys)


@pytest.fixture(scope="module")
def few_shapes(tmp_path_factory):
    """A folder of 60 pictures with their captions; some 48 of them are for training."""
    folder = tmp_path_factory.mktemp("few_shapes")
    dataset = open_dataset("shapes", "train").take(60)
    for index, example in enumerate(dataset.examples):
        dataset.load_image(index).save(folder / f"{example.id}.png")
        (folder / f"{example.id}.txt").write_text("\n".join(example.captions[:2]))
    return folder


def images(count: int = 4) -> torch.Tensor:
    return torch.rand(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)) * 2 - 1


def adapted(base: nn.Module) -> Adapter:
    return TAVQAdapter(base, SIZE) if isinstance(base, TAVQTokenizer) else adapt(base, SIZE)


def made_up_texts(batch: int = 4):
    mask = torch.ones(batch, 3, dtype=torch.bool)
    return SampledTexts(
        tuple(TextUnits(F.normalize(torch.randn(batch, 3, 12), dim=-1), mask) for _ in range(3))
    )


@pytest.mark.slow
def test_what_is_heard_is_what_the_look_up_sees_and_the_base_stays_as_it_was(base):
    base.eval()
    keys = list(base.state_dict())
    adapter = adapted(base)
    rebuilt, captured = adapter.reconstruct(images())
    assert torch.equal(rebuilt, adapter.decoded_images(base(images())))
    latents = captured.features[-1]
    assert {level.shape for level in captured.features} == {latents.shape}
    rows, codebook = latents.movedim(1, -1).flatten(0, 2), adapter.codebook
    assert torch.equal(torch.cdist(rows, codebook).argmin(dim=1), captured.ids.flatten())
    assert captured.ids.shape == (4, *latents.shape[-2:])
    assert list(base.state_dict()) == keys
    assert not any(module._forward_hooks for module in base.modules())


def test_the_alignment_moves_codebook_and_encoder_and_the_loss_is_the_bases_own(base):
    torch.manual_seed(0)
    adapter = adapted(base.train())
    codebook = adapter.codebook
    rebuilt, captured = adapter.reconstruct(images())
    aligner = TextAligner(*codebook.shape, 12, AlignmentConfig(samples=8, bank_size=0))
    on = torch.autograd.grad(rebuilt.sum(), captured.shared_activations, retain_graph=True, allow_unused=True)
    assert on[-1].norm() > 0, "the reconstruction's gradient passes where the two are balanced"
    aligner(captured.features, adapter.codebook, made_up_texts()).loss.backward()
    first = next(p for p in base.parameters() if p.ndim == 4)
    assert first.grad.norm() > 0
    assert codebook_of(base).grad.norm() > 0
    size = adapter.decode_size_px
    assert rebuilt.shape == (4, 3, size, size) and captured.quantizer_loss > 0


@pytest.mark.parametrize("l2_norm", [True, False])
def test_where_llamagen_compares_unit_vectors_the_aligner_is_given_unit_vectors(l2_norm):
    adapter = adapt(ForeignVQModel(l2_norm=l2_norm).eval(), SIZE)
    _, captured = adapter.reconstruct(images())
    for vectors in (adapter.codebook, *captured.features):
        norms = vectors.norm(dim=1)
        assert torch.allclose(norms, torch.ones_like(norms), atol=1e-5) == l2_norm


def test_a_copy_for_averaging_hears_its_own_base():
    adapter = adapt(ForeignVQModel().eval(), SIZE)
    twin = copy.deepcopy(adapter)
    nn.init.zeros_(twin.base.quant_conv.weight)
    nn.init.zeros_(twin.base.quant_conv.bias)
    assert not twin.reconstruct(images())[1].features[-1].any()
    assert adapter.reconstruct(images())[1].features[-1].any()


def test_named_stages_are_averaged_to_the_grid_and_a_wrong_name_is_refused():
    adapter = adapt(diffusers_model(), SIZE, ("encoder.down_blocks.0", "encoder.mid_block"))
    _, captured = adapter.reconstruct(images())
    assert {level.shape for level in captured.features} == {(4, 6, 16, 16)}
    with pytest.raises(ValueError, match=r"encoder\.middle.*named_modules"):
        adapt(diffusers_model(), SIZE, ("encoder.middle", "encoder.mid_block"))
    with pytest.raises(ValueError, match=r"did not call decoder\.unused"):
        unused = ForeignVQModel()
        unused.decoder.unused = Block(3)
        adapt(unused, SIZE, ("encoder.mid.attn_1", "decoder.unused"))


def test_a_codebook_that_no_gradient_reaches_is_refused_with_the_setting_to_change():
    with pytest.raises(ValueError, match="learnable_codebook=True, ema_update=False"):
        adapt(Around(), SIZE)
    moved_by_averages = ForeignVQModel()
    moved_by_averages.quantize.embedding.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="takes no gradient"):
        adapt(moved_by_averages, SIZE)
    with pytest.raises(TypeError, match="subclass of"):
        adapt(nn.Conv2d(3, 3, 1), SIZE)


@pytest.mark.parametrize(
    ("name", "file", "key"),
    [
        ("taming", "model.ckpt", "state_dict"),
        ("llamagen", "model.pt", "model"),
        ("vector_quantize_pytorch", "model.pt", None),
    ],
)
def test_the_saved_file_is_the_one_that_the_base_library_reads(name, file, key, tmp_path):
    base, fresh = BASES[name]().eval(), BASES[name]().eval()
    adapt(base, SIZE).save(tmp_path)
    found = torch.load(tmp_path / file, weights_only=True)
    fresh.load_state_dict(found[key] if key else found)
    assert torch.equal(fresh(images())[0], base(images())[0])


@pytest.mark.slow
def test_the_fifteen_lines_of_the_guide_align_a_foreign_model():
    guide = (Path(__file__).resolve().parent.parent / "docs" / "align.md").read_text()
    code = re.search(r"```python\n(from tavq.alignment .*?)```", guide, flags=re.DOTALL).group(1)
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    torch.manual_seed(0)
    dataset = open_dataset("shapes", "train").take(16)
    photos = torch.stack([to_tensor(dataset.load_image(i), SIZE) for i in range(16)])
    model, costs = ForeignVQModel(), []
    optimizer, keys = torch.optim.Adam(model.parameters(), lr=2e-3), list(model.state_dict())
    names = {
        "captions": [example.captions for example in dataset.examples],
        "model": model,
        "optimizer": optimizer,
        "your_loss": F.l1_loss,
    }

    def loader():
        for _ in range(40):
            indices = torch.randperm(16)[:8].tolist()
            yield indices, photos[indices]
            costs.append(float(names["alignment"].report["align/sentences_cost"]))

    exec(code.replace("image_size_px=256", f"image_size_px={SIZE}"), names | {"loader": loader()}, names)
    assert sum(costs[-5:]) < 0.9 * sum(costs[:5])
    assert list(model.state_dict()) == keys


SHORT = ["--image-size-px", str(SIZE), "--probe-steps", "8", "--alignment.samples", "16"]
SHORT += ["--training.batch-size", "8", "--training.log-every", "1", "--training.ema-decay", "0.5"]


@pytest.mark.slow
def test_an_aligned_diffusers_model_loads_again_in_diffusers_and_its_codes_fit_their_texts(
    tmp_path, few_shapes, capsys
):
    torch.manual_seed(0)
    diffusers_model().save_pretrained(tmp_path / "base")
    flags = ["--base", f"diffusers:{tmp_path / 'base'}", "--out", str(tmp_path / "out")]
    fast = ["--training.steps", "25", "--training.warmup-steps", "1", "--training.learning-rate", "2e-3"]
    align.main([*flags, "--data", str(few_shapes), *SHORT, *fast])
    VQModel = vq_model_class()
    before = VQModel.from_pretrained(tmp_path / "base")
    after, info = VQModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert list(after.state_dict()) == list(before.state_dict())
    assert dict(after.config) | {"_name_or_path": ""} == dict(before.config) | {"_name_or_path": ""}
    assert not torch.equal(after.quantize.embedding.weight, before.quantize.embedding.weight)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert set(report["before"]) == set(report["after"]) >= {"l1", "PSNR", "usage", "t2i_R@10", "i2t_R@1"}
    assert report["after"]["l1"] < report["before"]["l1"]
    lines = [line for line in read_log(tmp_path / "out" / "training" / "log.jsonl") if "l1" in line]
    assert lines[-1]["align/sentences_cost"] < lines[0]["align/sentences_cost"]
    assert "before     after" in capsys.readouterr().out


class Moments(nn.Module):
    """The smallest feature network: mean and deviation of each colour."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pixels = images.float().flatten(2) / 255
        return torch.cat([pixels.mean(2), pixels.std(2)], dim=1)


@pytest.mark.slow
def test_a_plain_baseline_trains_the_model_and_leaves_the_projections_of_the_probe(tmp_path, monkeypatch):
    monkeypatch.setattr(train_adapter, "open_dataset", lambda path, split: open_dataset(path, split).take(24))
    torch.manual_seed(0)
    diffusers_model().save_pretrained(tmp_path / "base")
    network = save_network(Moments(), tmp_path / "moments_features.pt")
    out = tmp_path / "out"
    flags = ["--base", f"diffusers:{tmp_path / 'base'}", "--out", str(out), "--data", "shapes"]
    flags += [*SHORT, "--losses.align", "0", "--features", str(network)]
    align.main([*flags, "--training.steps", "12", "--training.warmup-steps", "1"])
    report = json.loads((out / "report.json").read_text())
    assert report["after"]["l1"] < report["before"]["l1"]
    assert report["after"]["rFD-moments"] < report["before"]["rFD-moments"]
    assert not any(
        name.startswith("align/") for line in read_log(out / "training" / "log.jsonl") for name in line
    )
    before, after = (load_file(folder / "heads.safetensors") for folder in (out / "before", out))
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_a_probe_learns_to_read_a_tokenizer_of_ours_and_changes_no_code(
    tmp_path, few_shapes, tiny_checkpoint
):
    source, out = tiny_checkpoint / "tokenizer", tmp_path / "out"
    align.main(
        ["--base", f"tavq:{source}", "--data", str(few_shapes), "--out", str(out), "--probe-only", *SHORT]
    )
    before, after = TAVQTokenizer.from_pretrained(source), TAVQTokenizer.from_pretrained(out)
    changed = {
        name.split(".")[0]
        for name, weights in after.state_dict().items()
        if not torch.equal(weights, before.state_dict()[name])
    }
    assert changed == {"projections"}
    assert after.config.provenance.probed and after.aligned_levels == {1: 1, 2: 2, 3: 3}
    torch.nn.init.ones_(before.projections.per_code_embedding)  # what was learnt before is forgotten
    before.save_pretrained(tmp_path / "other")
    flags = ["--base", f"tavq:{tmp_path / 'other'}", "--data", str(few_shapes), "--out", str(tmp_path / "b")]
    align.main([*flags, "--probe-only", *SHORT])
    other = TAVQTokenizer.from_pretrained(tmp_path / "b")
    assert torch.equal(other.projections.per_code_embedding, after.projections.per_code_embedding)
    assert "after" not in json.loads((out / "report.json").read_text())


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("elsewhere", "expected diffusers:PATH"),
        ("diffusers:/no/such/place", "no VQModel with safetensors at /no/such/place"),
        ("call:no_such_module:build", "check that the module lies on PYTHONPATH"),
        ("call:builtins:dict", "returned a dict"),
    ],
)
def test_a_wrong_base_is_one_line_and_exit_code_2(source, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        align.main(["--base", source, "--data", "shapes", "--out", str(tmp_path)])
    assert exit_.value.code == 2 and message in capsys.readouterr().err


def test_a_tokenizer_of_ours_is_only_probed(tiny_checkpoint, tmp_path, capsys):
    flags = ["--base", f"tavq:{tiny_checkpoint / 'tokenizer'}", "--data", "shapes", "--out", str(tmp_path)]
    with pytest.raises(SystemExit):
        align.main([*flags, "--image-size-px", str(SIZE)])
    assert "--probe-only" in capsys.readouterr().err


@pytest.mark.slow
def test_a_chain_is_trained_on_the_ids_of_a_model_of_another_library(few_shapes, tmp_path, monkeypatch):
    """Tokenized, a captioner and a generator trained on its codes, captioned, generated and reconstructed by
    the pipeline, with the model's own folder as the tokenizer."""
    chain = tmp_path / "chain"
    torch.manual_seed(0)
    DiffusersAdapter(diffusers_model(), SIZE).save(chain / "tokenizer")
    tokenizer = open_tokenizer(chain / "tokenizer")
    assert tokenizer.image_size_px == SIZE and tokenizer.grid_size == (16, 16)
    ids = tokenizer.encode(images())
    assert torch.allclose(
        tokenizer.decode(ids), tokenizer.adapter.base(images()).sample.clamp(-1, 1), atol=1e-4
    )

    tokenize.main(
        [
            "--data",
            str(few_shapes),
            "--out",
            str(tmp_path / "tokens"),
            "--checkpoint",
            str(chain / "tokenizer"),
        ]
    )
    common = [
        "--preset",
        "tiny",
        "--tokens",
        str(tmp_path / "tokens"),
        "--tokenizer",
        str(chain / "tokenizer"),
    ]
    common += ["--training.steps", "2", "--training.batch-size", "4", "--out"]
    train_captioner.main([*common, str(chain / "captioner")])
    train_generator.main([*common, str(chain / "generator")])

    pipeline = Pipeline.from_pretrained(chain)
    photo = open_dataset(str(few_shapes), "val").load_image(0)
    assert pipeline.caption([photo])[0][0].text
    assert pipeline.generate("a red circle")[0].image.size == (SIZE, SIZE)
    assert pipeline.reconstruct(photo)[0].image.size == (SIZE, SIZE)
    with pytest.raises(ValueError, match="--align none"):
        pipeline.heatmaps(photo, "a red circle")

    measure = ["--checkpoint", str(chain), "--data", str(few_shapes), "--split", "val", "--out"]
    run_caption.main([*measure, str(tmp_path / "caption.json")])
    run_tokenizer.main([*measure, str(tmp_path / "tokenizer.json"), "--no-frechet"])


def test_taming_models_decode_their_ids_and_unknown_decoders_are_named():
    for build in (ForeignVQModel, lambda: ForeignVQModel(l2_norm=True)):
        tokenizer = ForeignTokenizer(adapt(build().eval(), SIZE))
        rebuilt, _ = tokenizer.adapter.reconstruct(images())
        assert torch.allclose(tokenizer.decode(tokenizer.encode(images())), rebuilt.clamp(-1, 1), atol=1e-5)
    around = ForeignTokenizer(adapt(Around(**LEARNED), SIZE))
    with pytest.raises(ValueError, match="can be captioned, not decoded"):
        around.decode(around.encode(images()))


def test_a_tokenizer_of_this_project_takes_no_other_size(tiny_checkpoint):
    with pytest.raises(ValueError, match="leave --image-size-px out"):
        open_tokenizer(tiny_checkpoint / "tokenizer", 64)
