"""Training in several processes, and the auxiliary losses that bind words to shapes and shapes to places."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import WanTransformer3DModel

from latentfast.tiny import Scene, Shape, caption, scene
from latentfast.tiny.caption import make_tokenizer
from tools.train_tiny import evaluate, models, train_transformer
from tools.train_tiny.binding import Binding
from tools.train_tiny.common import Log
from tools.train_tiny.grounding import Grounding, coverage
from tools.train_tiny.pool import draw_captions

ROOT = Path(__file__).parents[1]
# Each process trains, and then all tell the first one their weights; it compares them.
TRAIN = """
import sys, torch
from pathlib import Path
from tools.train_tiny import common, models, train_transformer as t
from tools.train_tiny.world import World
torch.set_num_threads(1)
world = World.join("cpu")
torch.manual_seed(0)
seen = []
original = t.Snapshot
t.Snapshot = lambda params: seen.append(params) or original(params)
vae = models.make_vae(smoke=True)
models.seal_vae(vae, torch.zeros(16), torch.ones(16))
log = common.Log(Path(sys.argv[1]), world.rank)
recipe = t.Recipe(binding=0.1, warmup=5, text_steps=3)
budget = common.Budget(steps=40)
t.train(vae, budget, log, "cpu", recipe=recipe, world=world, compile_blocks=False, smoke=True)
weights = world.gather(torch.cat([p.detach().flatten() for p in seen[0]]))
drawn = world.gather(torch.rand(1).item())
if world.rank == 0:
    torch.save({"weights": weights, "drawn": drawn}, Path(sys.argv[1]) / "seen.pt")
world.leave()
"""


def test_processes_keep_the_same_weights(tmp_path: Path) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    common = os.environ | {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", TRAIN, str(tmp_path)]
    ranks = [
        subprocess.Popen(command, cwd=ROOT, env=common | {"RANK": str(r)}, stderr=subprocess.PIPE, text=True)
        for r in range(2)
    ]
    errors = [p.communicate(timeout=300)[1] for p in ranks]
    assert [p.returncode for p in ranks] == [0, 0], errors
    seen = torch.load(tmp_path / "seen.pt")
    assert torch.equal(*seen["weights"])
    assert seen["drawn"][0] != seen["drawn"][1], "each process draws its own scenes and noise"
    text_encoder, transformer = train_transformer.load(tmp_path / "transformer.pt", "cpu", smoke=True)
    assert all(p.isfinite().all() for m in (text_encoder, transformer) for p in m.parameters())


def test_words_find_the_shape_they_describe() -> None:
    wanted = Scene((Shape("star", "red", "big", "up"), Shape("circle", "green", "big", "left")), "green", "dim")
    words = make_tokenizer()(caption(wanted), return_tensors="pt")
    owner, mentioned = Binding(8).owners(words.input_ids, scene.to_table([wanted]))
    assert mentioned.all()
    found = dict(zip(make_tokenizer().convert_ids_to_tokens(words.input_ids[0]), owner[0].tolist(), strict=True))
    assert {w: k for w, k in found.items() if k >= 0} == {"red": 0, "star": 0, "up": 0, "circle": 1, "left": 1}


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_text_encoder_learns_binding_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder, probe = models.make_text_encoder(smoke=True), Binding(128)
    table = scene.random_table(256, two=1.0, generator=torch.Generator().manual_seed(0))
    ids = draw_captions(scene.from_table(table), 0, each=1, complete=1.0)
    pool = SimpleNamespace(table=table, ids=ids)

    def loss() -> float:
        with torch.no_grad():
            return probe(train_transformer.embed(encoder, ids[:, 0].long()), ids[:, 0].long(), table)[0].item()

    before = loss()
    train_transformer.teach_text(encoder, probe, pool, 80, 32, Log(tmp_path), "cpu")
    assert loss() < 0.8 * before


def test_guidance_is_chosen_among_those_that_keep_one_shape() -> None:
    def row(guidance: float, one: float, two: float) -> dict:
        return {"guidance_scale": guidance, "one_shape": {"all": one}, "two_shapes": {"binding": two}}

    assert evaluate.choose([row(1.5, 0.97, 0.5), row(2.0, 0.94, 0.6), row(3.0, 0.92, 0.9)]) == 2.0
    assert evaluate.choose([row(1.5, 0.91, 0.5), row(2.0, 0.9, 0.9)]) == 1.5


def test_coverage_stands_in_the_transformers_order() -> None:
    masks = torch.zeros(1, 2, 9, 48, 32)
    masks[0, 0, 0, 32:, 16:] = 1  # the first frame alone, lower right patch
    masks[0, 1, 5:7, :16, :16] = 1  # two of the four frames of the third latent, upper left patch
    cover = coverage(masks)
    assert cover.shape == (1, 2, 3 * 3 * 2)
    assert cover[0, 0].nonzero().flatten().tolist() == [5] and cover[0, 0, 5] == 1
    assert cover[0, 1].nonzero().flatten().tolist() == [12] and cover[0, 1, 12] == 0.5
    tokens = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=1, attention_head_dim=12, in_channels=1, out_channels=1,
        text_dim=4, freq_dim=4, ffn_dim=4, num_layers=1,
    ).patch_embedding  # fmt: skip
    torch.nn.init.ones_(tokens.weight)
    latents = torch.zeros(1, 1, 3, 6, 4)  # a latent pixel is eight of the picture's
    latents[0, 0, 0, 4:, 2:] = 1
    seen = (tokens(latents) - tokens(torch.zeros_like(latents))).flatten(2)[0, 0]
    assert seen.nonzero().flatten().tolist() == [5]


def test_grounding_is_least_where_every_token_tells_its_own_shape() -> None:
    torch.manual_seed(0)
    table = scene.random_table(4, two=1.0, generator=torch.Generator().manual_seed(1))
    cover = torch.zeros(4, 2, 6)
    cover[:, 0, 1] = cover[:, 1, 4] = 1
    states = torch.randn(4, 6, 64, requires_grad=True)
    ground = Grounding(64)
    optimizer = torch.optim.Adam([states, *ground.parameters()], 0.05)
    for _ in range(150):
        optimizer.zero_grad()
        loss = ground(states, cover, table)
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    # The same states for scenes whose two shapes have changed places are wrong.
    swapped = torch.cat([table[:, 4:8], table[:, :4], table[:, 8:]], 1)
    assert ground(states, cover, swapped) > 10 * loss
