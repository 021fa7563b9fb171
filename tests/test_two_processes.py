"""Two real processes under torchrun (gloo, CPU): they read the same token set and train as one does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tavq.data.token_writer import write_tokens
from tavq.data.tokens import TokenMeta, TokenRecord

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.slow  # every test starts processes that train


@pytest.fixture(scope="module")
def tokens_dir(tmp_path_factory):
    random = np.random.default_rng(0)
    records = []
    for split in ("train", "val"):
        for number in range(12):
            ids = random.integers(0, 8, (2, 2, 4))
            captions = (f"A dog by {number}.", "A cat by water.")
            records.append(TokenRecord(f"{split}{number}", split, ids, captions))
    directory = tmp_path_factory.mktemp("two-processes") / "tokens"
    write_tokens(directory, records, TokenMeta(8, (2, 4), "codebook", "tokenizer", "made up", 16), 5)
    return directory


def run_processes(count: int, *arguments: object) -> str:
    """Run `python ARGUMENTS` in `count` processes that form one group; return what they print."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    # `accelerate launch --cpu` would start one process and not say so.
    environment = {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *launch, *map(str, arguments)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_process_reads_the_whole_token_set(tokens_dir, tmp_path):
    script = tmp_path / "read.py"
    script.write_text(
        "import os, sys\n"
        "from tavq.data.tokens import open_tokens\n"
        "names = open_tokens(sys.argv[1], 'train').names\n"
        "line = ' '.join([os.environ['RANK'], os.environ['WORLD_SIZE'], *names])\n"
        "sys.stdout.write(line + chr(10))\n"
    )
    names = " ".join(f"train{n}" for n in range(12))
    printed = run_processes(2, script, tokens_dir)
    assert sorted(printed.splitlines()) == [f"{rank} 2 {names}" for rank in range(2)]


@pytest.mark.parametrize("model", ["generator", "captioner"])
def test_two_processes_of_four_examples_train_as_one_of_eight(tokens_dir, tmp_path, model):
    flags = ["--preset", "tiny", "--tokens", tokens_dir, "--training.steps", 3, "--training.warmup-steps", 0]
    # Each process draws its own dropout, and the two losses are averages over captions of one length.
    flags += ["--model.dropout", 0]
    flags += ["--null-text-rate", 0] if model == "generator" else ["--model.token-dropout", 1e-9]
    weights = {}
    for count in (1, 2):
        out = tmp_path / f"of-{count}"
        run_processes(
            count, "-m", "tavq", "train", model, *flags, "--out", out, "--training.batch-size", 8 // count
        )
        weights[count] = load_file(out / "model.safetensors")
    assert weights[1].keys() == weights[2].keys()
    for name, one in weights[1].items():
        np.testing.assert_allclose(one, weights[2][name], atol=2e-5, err_msg=name)


TRAIN_AND_COMPARE = """
import os, sys, torch
from tavq.tokenizer import train as module
from tavq.tokenizer.config import RUN_PRESETS
from tavq.data.layouts import open_dataset
from tavq.base.arguments import parse
from tavq.training.loop import Trainer

module.open_dataset = lambda path, split: open_dataset(path, split).take(16)
run = parse(module.TokenizerRun, sys.argv[1:], prog="test", presets=RUN_PRESETS)
task = module.TokenizerTask(run)
trainer = Trainer(task, run.training, run.out, run)
trainer.run()
state = torch.cat([t.flatten().double() for t in task.shipped.state_dict().values()])
parts = [torch.empty_like(state) for _ in range(torch.distributed.get_world_size())]
torch.distributed.all_gather(parts, state)
if trainer.is_main:
    print("apart by", float((parts[0] - parts[1]).abs().max()), flush=True)
torch.distributed.barrier()  # neither leaves while the other still speaks
sys.stdout.flush()
os._exit(0)  # a thread of gloo now and then outlives the interpreter and aborts it
"""


@pytest.mark.parametrize(
    "flags",
    [
        ("--align", "none"),
        ("--align", "lgvq", "--lgvq.width", "16", "--lgvq.layers", "1"),
        ("--align", "ot", "--alignment.level-weights", "0", "1", "1"),
        ("--align", "none", "--model.quantizer.name", "fsq", "--model.quantizer.num-codes", "1000"),
        ("--align", "ot", "--training.batch-size", "1", "--losses.decode-every", "2"),
    ],
    ids=["plain", "lgvq", "a level left out", "fsq", "one example a process"],
)
def test_the_tokenizer_stays_the_same_in_both_processes(tmp_path, perceptual_network, flags):
    """Each of these once ended with parameters that took no part in the loss; states are saved after each
    step."""
    script = tmp_path / "train.py"
    script.write_text(TRAIN_AND_COMPARE)
    common = ["--preset", "tiny", "--training.steps", 4, "--training.evaluate-every", 4, "--fit-steps", 0]
    common += [
        "--training.checkpoint-minutes",
        0,
        "--training.batch-size",
        4,
        "--perceptual",
        perceptual_network,
    ]
    common += ["--losses.adversarial-start", 0.25, "--out", tmp_path / "run"]
    printed = run_processes(2, script, *common, *flags)
    assert "apart by 0.0\n" in printed
