"""`llmquant sensitivity`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from llmquant.cli.console import console, errors, progress_bar, write_json

if TYPE_CHECKING:
    from llmquant.tune.scores import Scores


def sensitivity(
    model: Annotated[str, typer.Argument(help="Local folder of a plain Hugging Face model, or its hub id.")],
    scheme: Annotated[
        str, typer.Option(help="What each layer is quantized to; several with commas: int3-g64,int4-g64.")
    ] = "int3-g64",
    method: Annotated[
        str,
        typer.Option(
            help="measured: the KL itself, one run a layer and scheme. fisher: an estimate of it to second order, all "
            "layers and schemes in one pass. data-free: from the weights alone, only a ranking."
        ),
    ] = "measured",
    text: Annotated[
        str, typer.Option(help="builtin (CPython's help topics), wikitext2 (its train split), or a text file's path.")
    ] = "builtin",
    tokens: Annotated[int, typer.Option(help="Tokens to read, in windows of --context; KL needs few.")] = 1024,
    context: Annotated[int, typer.Option(help="Tokens a window.")] = 512,
    seed: Annotated[int, typer.Option(help="Which windows of the text are taken.")] = 0,
    together: Annotated[
        bool, typer.Option("--together", help="Take weights that read one input (q, k, v; gate, up) as one layer.")
    ] = False,
    embeddings: Annotated[bool, typer.Option("--embeddings", help="Embeddings and tied heads, too.")] = False,
    dtype: Annotated[str, typer.Option(help="To compute in: auto, float32, bfloat16 or float16.")] = "auto",
    top: Annotated[int, typer.Option(min=1, help="Layers to list; --json has all.")] = 20,
    json: Annotated[Path | None, typer.Option(help="Also write all figures to this file ('-': only stdout).")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Also draw them to this file (.png, .svg or .pdf); needs llmquant[plot].")
    ] = None,
) -> None:
    """Show which layers suffer most: each alone in a scheme, all others plain.

    Scores are mean KL from the plain model, in nats a token, the worst layer first. `measured` also takes the estimate
    `fisher`, and says how well the two agree on the order (Spearman's rank correlation). Scores are kept in the user's
    cache folder (LLMQUANT_CACHE), so the second call costs nothing.

    Examples:

    * `llmquant sensitivity ./SmolLM2 --scheme int3-g64 --plot layers.png`

    * `llmquant sensitivity ./SmolLM2 --scheme int2-g32,int4-g64 --method fisher --json scores.json`
    """
    from llmquant.convert.budget import load_plain
    from llmquant.tune.sensitivity import sensitivity as score

    if plot:
        from llmquant.cli.bench_plot import require_matplotlib

        require_matplotlib()
    plain, tokenizer, folder = load_plain(model, dtype)
    found: dict[str, Scores] = {}
    for kind in [method, "fisher"] if method == "measured" else [method]:
        with progress_bar(f"Scoring ({kind})") as progress:
            found[kind] = score(
                plain,
                scheme,
                text,
                tokenizer=tokenizer,
                method=kind,
                embeddings=embeddings,
                together=together,
                tokens=tokens,
                context=context,
                seed=seed,
                progress=progress,
            )
    record = record_of(found)
    if json:
        write_json(record, json)
    if not json or str(json) != "-":
        print_record(record, top)
    if plot:
        from llmquant.cli.tune_plot import draw_scores

        draw_scores(found[method], plot, title=f"{folder.name}: each layer alone ({method})")
        errors.print(f"plot: {plot}", highlight=False, soft_wrap=True)


def record_of(found: dict[str, Scores]) -> dict[str, Any]:
    """The first scores, and how well the others agree with them, a scheme at a time and over all."""
    from llmquant.tune.scores import rank_correlation

    (method, scores), *others = found.items()
    pairs = [(group.name, name) for group in scores.groups for name in group.options]
    names = list(dict.fromkeys(name for _, name in pairs))

    def column(of: Scores, scheme: str | None) -> list[float]:
        return [o.score for g in of.groups for name, o in g.options.items() if scheme in (None, name)]

    agreement = {
        other: {name or "all": rank_correlation(column(scores, name), column(them, name)) for name in [*names, None]}
        for other, them in others
    }
    return {**scores.to_dict(), "method": method, "rank_correlation": agreement}


def print_record(record: dict[str, Any], top: int) -> None:
    """The worst layers, each scheme in a column; then what the figures are."""
    groups = record["groups"]
    schemes = list(groups[0]["options"])
    ranked = sorted(groups, key=lambda g: -g["options"][schemes[0]]["score"])
    unit = "ranking" if record["method"] == "data-free" else "nats"
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("#", justify="right")
    table.add_column("layer", overflow="fold")
    table.add_column("weights", justify="right")
    for name in schemes:
        table.add_column(f"{name}, {unit}", justify="right", no_wrap=True)
    for number, group in enumerate(ranked[:top], 1):
        scores = [f"{group['options'][name]['score']:.3g}" for name in schemes]
        table.add_row(str(number), group["name"], f"{group['elements']:,}", *scores)
    console.print(table, highlight=False)
    more = f"{len(groups)} layers in all, by {schemes[0]}. " if len(groups) > top else ""
    read = f"{record['tokens']} tokens" if record["tokens"] else "no data"
    console.print(f"[dim]{more}Method {record['method']} on {read}.[/]", highlight=False)
    for other, by_scheme in record["rank_correlation"].items():
        said = ", ".join(f"{name} {rho:.3f}" for name, rho in by_scheme.items())
        console.print(f"[dim]Rank correlation with {other}: {said}.[/]", highlight=False, soft_wrap=True)
