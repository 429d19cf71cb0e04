"""The commands and their options; the work is in the modules named after what it does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from latentfast.cli import bench, cache, recipe
from latentfast.cli.options import grouped
from latentfast.cli.request import Request

__all__ = ["run"]

# One line for a mistake: no boxes and no usage text around it (see latentfast.cli.errors).
app = typer.Typer(
    name="latentfast",
    help="Make, mix and edit clips of video diffusion models in their latents, on latentfast's kernels.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(bench.app)
app.add_typer(cache.app)
app.add_typer(recipe.app)

# torch takes negative seeds and wraps them around silently, and numbers above 64 bits are an error of its own.
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the starting noise, drawn on the CPU.")]
Fps = Annotated[int, typer.Option(min=1, max=240, help="Frames a second of the mp4.")]
SaveLatents = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Also keep the latents, as safetensors.", dir_okay=False)
]


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback behind an error's line.")] = False,
) -> None:
    """Options of every command."""  # --debug itself is read in latentfast.cli.main


@app.command()
@grouped
def demo(
    *,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the clips and the report go.")] = Path(
        "latentfast-demo"
    ),
    seed: Seed = 0,
    request: Request,
) -> None:
    """Show what latentfast does on real clips: a folder with mp4 files, report.html and run.json."""
    from latentfast.cli.demo import run_demo

    run_demo(request, out=out, seed=seed)


@app.command()
@grouped
def generate(
    *,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What the clip shows.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The mp4.")] = Path("clip.mp4"),
    seed: Seed = 0,
    fps: Fps = 16,
    save_latents: SaveLatents = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="A latent cache: what was made is found there, and what was interrupted goes on from there.",
            file_okay=False,
        ),
    ] = None,
    request: Request,
) -> None:
    """Make a clip from a prompt."""
    from latentfast.cli import clips

    clips.generate(request, clips.Output(out, fps, save_latents), prompt=prompt, seed=seed, cache=cache)


@app.command()
@grouped
def interpolate(
    *,
    prompt_a: Annotated[str, typer.Argument(metavar="PROMPT_A", help="What the first clip shows.")],
    prompt_b: Annotated[
        str | None, typer.Argument(metavar="[PROMPT_B]", help="What the last clip shows; default: the same.")
    ] = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The mp4, the clips side by side.")] = Path("path.mp4"),
    seeds: Annotated[
        tuple[int, int], typer.Option(min=0, max=2**32 - 1, help="Seeds of the first and the last clip.")
    ] = (0, 1),
    count: Annotated[int, typer.Option(min=2, help="Clips on the path, both ends included.")] = 5,
    space: Annotated[
        str,
        typer.Option(
            metavar="[noise|latent]",
            help="noise: mix the starting noises (slerp) and prompts, denoise each. latent: denoise the ends, "
            "slerp between the finished latents.",
        ),
    ] = "noise",
    columns: Annotated[int | None, typer.Option(min=1, help="Clips in a row; default: all.")] = None,
    fps: Fps = 16,
    save_latents: SaveLatents = None,
    request: Request,
) -> None:
    """Make the clips on the way from one seed or prompt to another."""
    from latentfast.cli import clips

    clips.interpolate(
        request,
        clips.Output(out, fps, save_latents),
        prompts=(prompt_a, prompt_a if prompt_b is None else prompt_b),
        seeds=seeds,
        count=count,
        space=space,
        columns=columns,
    )


@app.command()
@grouped
def edit(
    *,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What the source clip shows.")],
    edit_prompt: Annotated[
        str, typer.Argument(metavar="EDIT_PROMPT", help="What the edited clip shows inside the mask.")
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The mp4 of the edited clip.")] = Path("edit.mp4"),
    mask: Annotated[
        str,
        typer.Option(
            metavar="auto|difference|X0,Y0,X1,Y1|PICTURE",
            help="Where the edit may act: where the attention to words looks, where the two clips come apart, a box "
            "in pixels, or a picture (white acts).",
        ),
    ] = "auto",
    words: Annotated[
        list[str] | None,
        typer.Option(
            "--words",
            metavar="WORDS",
            help="With --mask auto: words of PROMPT for what is edited (repeatable); default: those that EDIT_PROMPT "
            "has not.",
        ),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(metavar="WORDS", help="With --mask auto: words of PROMPT for what must stay (repeatable)."),
    ] = None,
    strength: Annotated[
        float, typer.Option(help="Share of the steps in which the edit acts, above 0 and up to 1.")
    ] = 1.0,
    observe: Annotated[
        float,
        typer.Option(min=0, max=1, help="With --mask difference: share of those steps before the region is fixed."),
    ] = 0.1,
    compare: Annotated[bool, typer.Option("--compare", help="Put the source at the edit's left.")] = False,
    seed: Seed = 0,
    fps: Fps = 16,
    save_latents: SaveLatents = None,
    request: Request,
) -> None:
    """Make a clip and change it inside a region only: outside, the latents keep their bits."""
    from latentfast.cli import clips

    clips.edit(
        request,
        clips.Output(out, fps, save_latents),
        prompt=prompt,
        edit_prompt=edit_prompt,
        seed=seed,
        mask=mask,
        words=words or (),
        keep=keep or (),
        strength=strength,
        observe=observe,
        compare=compare,
    )


@app.command()
@grouped
def studio(
    *,
    host: Annotated[str, typer.Option(help="Address to bind to; one that others reach needs --token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8321,
    token: Annotated[
        str | None, typer.Option(help="What the page's address must have; default: a new one, printed.")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Keep the clips that are made there.", file_okay=False)
    ] = None,
    request: Request,
) -> None:
    """Open a local page to make a clip and edit it live: sliders, masks of words, undo, export."""
    from latentfast.cli.studio import run_studio

    run_studio(request, host=host, port=port, token=token, cache=cache)


@app.command()
def replay(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run.json, or the folder that it is in.")],
    model: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="The pipeline, if it is not where it was.", file_okay=False)
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N; default: the record's.")] = None,
) -> None:
    """Make a recorded result again, compare checksums, and say what is different; exit with 1 if the result is."""
    from latentfast.cli.replay import replay as again

    raise typer.Exit(0 if again(run, model=model, device=device) else 1)


@app.command()
def doctor() -> None:
    """Print versions, build flags, the card and the backends with reasons."""
    from latentfast import doctor as module

    module.main()


def run(arguments: Sequence[str]) -> int:
    """Parse the arguments and run the command; errors are raised, not printed."""
    command = typer.main.get_command(app)
    try:
        # Not command.main(): it turns Ctrl-C into an exception of its own after printing to the terminal.
        with command.make_context("latentfast", list(arguments) or ["--help"]) as context:
            command.invoke(context)
    except typer.Exit as done:
        return done.exit_code
    return 0
