"""Trains, exports and measures the embedded model. One H100 or H200 takes about twenty minutes for everything:

    python -m tools.train_tiny all --out out/tiny

Each stage is also a command of its own and reads what the stages before it left in ``--out``:
vae -> judge -> transformer -> export -> evaluate -> cpu -> card -> install.

Several GPUs of one machine share the transformer's training and the evaluation:

    torchrun --nproc-per-node 4 -m tools.train_tiny all --out out/tiny
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import fields
from pathlib import Path

import torch

from tools.train_tiny.common import NO_GRAPHS, Budget, Log, prepare
from tools.train_tiny.train_transformer import Recipe
from tools.train_tiny.world import World

SHARED = ("transformer", "evaluate")  # stages that all processes work on; the first one does the others
STAGES = ("vae", "judge", "transformer", "export", "evaluate", "cpu", "card", "install")


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(
        prog="train_tiny", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("stage", choices=("all", *STAGES), help="all = vae to evaluate, leaving out what exists already")
    p.add_argument("--out", type=Path, default=Path("out/tiny"), help="working folder (default: %(default)s)")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument(
        "--vae-seconds", type=float, default=75, help="training time of the autoencoder (default: %(default)s)"
    )
    p.add_argument("--judge-seconds", type=float, default=40, help="of the judge (default: %(default)s)")
    p.add_argument("--seconds", type=float, default=900, help="of the transformer (default: %(default)s)")
    p.add_argument("--vae-steps", type=int, default=0, help="steps instead of seconds, to repeat a run exactly")
    p.add_argument("--judge-steps", type=int, default=0)
    p.add_argument("--steps", type=int, default=0)
    p.add_argument("--scheduler", choices=("euler", "unipc"), default="euler", help="that the pipeline is shipped with")
    p.add_argument("--start", type=Path, help="a transformer.pt or a pipeline's folder to go on from")
    p.add_argument("--no-compile", action="store_true", help="train the transformer without torch.compile")
    p.add_argument(NO_GRAPHS, action="store_true", help="run every training step eagerly, without CUDA graphs")
    p.add_argument("--no-sweep", action="store_true", help="measure the recommended settings only")
    p.add_argument(
        "--smoke", action="store_true", help="tiny sizes and a few steps: runs every stage on a CPU in two minutes"
    )
    recipe = p.add_argument_group("the transformer's recipe")
    for f in fields(Recipe):
        option = "--" + f.name.replace("_", "-")
        recipe.add_argument(option, type=type(f.default), default=f.default, help=f.metadata["help"] + " (%(default)s)")
    return p.parse_args()


def main() -> None:
    args = parse()
    if args.smoke:
        args.vae_steps, args.judge_steps, args.steps = 12, 12, 22
    prepare(args.seed, args.device)
    args.world = World.join(args.device)
    log = Log(args.out, args.world.rank)
    log(f"train_tiny {args.stage}: torch {torch.__version__}, {args.world.size} x {args.device}, seed {args.seed}")
    stages = STAGES[:5] if args.stage == "all" else (args.stage,)
    made = {"vae": "vae.pt", "judge": "judge.safetensors"}
    for stage in stages:
        if args.stage == "all" and stage in made and (args.out / made[stage]).exists():
            log(f"{stage}: {made[stage]} is there already")
            continue
        torch.manual_seed(args.seed)
        if args.world.rank == 0 or stage in SHARED:
            RUN[stage](args, log)
        args.world.wait()
    args.world.leave()


def run_vae(args: argparse.Namespace, log: Log) -> None:
    from tools.train_tiny import train_vae

    train_vae.train(Budget(args.vae_seconds, args.vae_steps), log, args.device, args.smoke)


def run_judge(args: argparse.Namespace, log: Log) -> None:
    from tools.train_tiny import train_judge

    train_judge.train(Budget(args.judge_seconds, args.judge_steps), log, args.device, args.smoke)


def run_transformer(args: argparse.Namespace, log: Log) -> None:
    from tools.train_tiny import train_transformer, train_vae

    vae = train_vae.load(args.out / "vae.pt", args.device, args.smoke)
    train_transformer.train(
        vae,
        Budget(args.seconds, args.steps),
        log,
        args.device,
        recipe=Recipe(**{f.name: getattr(args, f.name) for f in fields(Recipe)}),
        world=args.world,
        seed=args.seed,
        start=args.start,
        compile_blocks=not args.no_compile,
        smoke=args.smoke,
    )


def run_export(args: argparse.Namespace, log: Log) -> None:
    from tools.train_tiny import models, train_transformer, train_vae

    vae = train_vae.load(args.out / "vae.pt", "cpu", args.smoke)
    parts = train_transformer.load(args.out / "transformer.pt", "cpu", args.smoke)
    shutil.rmtree(args.out / "weights", ignore_errors=True)
    models.save_pipeline(args.out / "weights", vae, *parts, args.scheduler, log)
    shutil.copy(args.out / "judge.safetensors", args.out / "weights")
    for path in (args.out / "weights").rglob("*.safetensors"):  # written readable by their owner only
        path.chmod(0o644)
    models.check_sizes(args.out / "weights", log)


def run_evaluate(args: argparse.Namespace, log: Log) -> None:
    from safetensors.torch import load_file

    from latentfast.tiny.judge import Judge, JudgeNet
    from tools.train_tiny import evaluate

    net = JudgeNet()
    net.load_state_dict({k: v.float() for k, v in load_file(str(args.out / "weights" / "judge.safetensors")).items()})
    judge = Judge(net, args.device)
    evaluate.evaluate(
        args.out / "weights", judge, log, args.device, args.world, sweep=not args.no_sweep, smoke=args.smoke
    )


def run_cpu(args: argparse.Namespace, log: Log) -> None:
    from tools.train_tiny import evaluate

    value = evaluate.cpu_seconds(args.out / "weights", repeats=1 if args.smoke else 3)
    evaluate.save_metrics(args.out / "metrics.json", cpu=value)
    log("prompt to pixels:", value)


def run_card(args: argparse.Namespace, log: Log) -> None:
    from tools.train_tiny import card

    (args.out / "MODEL_CARD.md").write_text(card.write(args.out))
    log(f"wrote {args.out / 'MODEL_CARD.md'}")


def run_install(args: argparse.Namespace, log: Log) -> None:
    import latentfast.tiny

    package = Path(latentfast.tiny.__file__).parent
    shutil.rmtree(package / "weights", ignore_errors=True)
    shutil.copytree(args.out / "weights", package / "weights")
    for name in ("MODEL_CARD.md", "metrics.json", "training.json"):
        shutil.copy(args.out / name, package / name)
    log(f"installed into {package}")


RUN = {
    "vae": run_vae,
    "judge": run_judge,
    "transformer": run_transformer,
    "export": run_export,
    "evaluate": run_evaluate,
    "cpu": run_cpu,
    "card": run_card,
    "install": run_install,
}

if __name__ == "__main__":
    main()
